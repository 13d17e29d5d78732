"""Chat templates: the same text as transformers renders, and a bound for those that never end or fill memory."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any

import prompt_tokenizers
import pytest

from fastrerank.inputs.prompts import Template, chat_rendering
from fastrerank.inputs.prompts.chat_rendering import TemplateBudgetError, render
from fastrerank.inputs.prompts.prompt_tokenizer import PromptTokenizer

CONVERSATIONS = [
    [{"role": "user", "content": "hi {x} "}],
    [
        {"role": "system", "content": " be brief\n"},
        {"role": "user", "content": "a\n"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ],
    [{"role": "query", "content": "q"}, {"role": "document", "content": "d"}],
]
HONEST = [
    getattr(prompt_tokenizers, name) for name in ("CHATML", "LLAMA3", "LLAMA2", "MISTRAL", "ZEPHYR", "GEMMA", "PHI3")
]
HONEST += [
    "{% set ns = namespace(n=0, parts=[]) %}{% for m in messages %}{% set ns.n = ns.n + m.content | length %}"
    "{% set ns.parts = ns.parts + [m.role ~ ':' ~ m.content] %}{% endfor %}{{ ns.n }}{{ ns.parts | join(', ') }}",
    "{% macro one(m) %}<{{ m.role | upper }}>{{ m['content'].strip().split('\\n')[-1] }}{% endmacro %}"
    "{% for m in messages %}{{ one(m) }}{% if not loop.last %}{{ loop.index }}/{{ loop.length }}{% endif %}"
    "{% endfor %}",
    "{% for m in messages if m.role != 'system' %}{{ loop.previtem.role if loop.previtem }}{{ m | tojson(indent=2) }}"
    "{% else %}none{% endfor %}{{ messages | map(attribute='role') | list }}{{ 'ab' * 3 }}{{ 7 // 2 }}{{ 2 ** 5 }}",
    "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ '%s=%r' | format(m.role, 1) }}"
    "{% endfor %}"
    "{{ dict(a=1) }}{{ (1, 'b', [2]) }}{{ {'k': [1, 2]} }}{{ '{:>8}|{}'.format('x', 2) }}{{ 'a-b'.replace('-', '+') }}",
    "{% set x %}{{ bos_token }}{{ eos_token }}{% endset %}{{ x ~ pad_token ~ none ~ nothing }}{{ tools is none }}",
    "{% for m in messages %}{{ (m.role | safe) ~ '<|im_end|>' ~ m.content ~ ('<a>' | e) }}{% endfor %}"
    "{% autoescape true %}{{ ('<b>' | safe) ~ '<c>' ~ 1 }}{% endautoescape %}"
    "{% autoescape own is defined %}{{ ('<b>' | safe) ~ '<c>' }}{{ '<d>' ~ '<e>' }}{% endautoescape %}",
    "{% for a, b in [(1, 2), (3, 4)] recursive %}{{ a }}{{ loop([(5, 6)]) if loop.depth < 3 }}{{ b }}{% endfor %}",
]
ENDLESS = {
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}"
    "{% endfor %}{% endfor %}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "big power": "{{ 10 ** 4000 }}",
    "repeat": "{{ 'x' * 10 ** 9 }}",
    "list": "{{ [1] * 10 ** 9 }}",
    "doubling": "{% set n = namespace(a='ab') %}{% for i in range(60) %}{% set n.a = n.a ~ n.a %}{% endfor %}{{ n.a }}",
    "adding": "{% set n = namespace(a='ab') %}{% for i in range(60) %}{% set n.a = n.a + n.a %}{% endfor %}{{ n.a }}",
    "laughs": "{% set n = namespace(a=[1]) %}{% for i in range(60) %}{% set n.a = [n.a, n.a] %}{% endfor %}{{ n.a }}",
    "json": "{% set n = namespace(a=[1]) %}{% for i in range(60) %}{% set n.a = {'a': n.a, 'b': n.a} %}{% endfor %}"
    "{{ n.a | tojson }}",
    "namespaces": "{% set n = namespace(a=1) %}{% for i in range(60) %}{% set n.a = namespace(b=n.a, c=n.a) %}"
    "{% endfor %}{{ n.a }}",
    "center": "{{ 'x' | center(1000000000) }}",
    "center method": "{{ 'x'.center(1000000000) }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "replace": "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
    "replace method": "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "join": "{{ (['a' * 99999] * 99999) | join }}",
    "indent": "{{ ('a\\n' * 50000) | indent(50000) }}",
    "expand": "{{ '\\t'.expandtabs(1000000000) }}",
    "macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursive loop": "{% for c in 'xy' recursive %}{{ loop('xy') if loop.depth < 60 }}{% endfor %}",
    "output": "{% for a in range(9999) %}{{ 'xxxxxxxxxx' * 1000 }}{% endfor %}",
    "constants": "{{ 'x' | center(99999) }}" * 100,
    "block": "{% filter center(1000000000) %}x{% endfilter %}",
    "source": "{{ 'a' }}" * 30_000,
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return prompt_tokenizers.qwen()


def outcome(call: Any, *args: Any, **options: Any) -> str:
    try:
        return str(call(*args, **options))
    except Exception as error:
        return f"{type(error).__name__} {error}"


@pytest.mark.parametrize("source", HONEST)
def test_honest_templates_render_as_transformers_renders_them(tokenizer: Any, source: str) -> None:
    tokenizer.chat_template = source
    for messages in CONVERSATIONS:
        for options in ({"add_generation_prompt": True}, {"add_generation_prompt": False, "own": 7}):
            expected = outcome(tokenizer.apply_chat_template, messages, tokenize=False, **options)
            assert outcome(render, tokenizer, messages, **options) == expected


@pytest.mark.parametrize("name", ENDLESS)
def test_templates_without_an_end_are_stopped(tokenizer: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_rendering, "MOST_CHARS", 400_000)
    tokenizer.chat_template = ENDLESS[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(TemplateBudgetError, match="chat template was stopped, as it"):
        render(tokenizer, CONVERSATIONS[0])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


def test_time_is_bounded_too(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_rendering, "MOST_SECONDS", 0.05)
    tokenizer.chat_template = "{% for i in range(99999) %}{{ (range(9999) | list | sort | length) * 0 }}{% endfor %}"
    begin = time.monotonic()
    with pytest.raises(TemplateBudgetError, match=r"more than 0\.05 seconds|characters of text"):
        render(tokenizer, CONVERSATIONS[0])
    assert time.monotonic() - begin < 60


def test_a_checkpoint_with_an_endless_template_is_refused_by_name(tmp_path: Path) -> None:
    made = prompt_tokenizers.qwen()
    made.chat_template = ENDLESS["nested ranges"]
    made.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", "max_position_embeddings": 512}))
    chat = next(name for name in ("prp", "rankgpt", "qwen3-reranker") if Template.load(name).chat)
    with pytest.raises(ValueError, match=f"{tmp_path.name}.*steps of loops"):
        PromptTokenizer.load(tmp_path, Template.load(chat))
