"""Pairs through chat templates: `fastrerank.CrossEncoder` against `sentence_transformers.CrossEncoder`."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

st = pytest.importorskip("sentence_transformers")
import decoders
import prompt_tokenizers
import torch
import transformers

import fastrerank
from fastrerank import CrossEncoder
from fastrerank.rerankers.pointwise import PointwiseReranker
from fastrerank.text.chat_pairs import chat_template_of

QUERY = "how long do fleas live?"
TEXTS = [
    "A flea lives up to one year.", "Cats sleep all day [3].", "", "A flea lives up to one year.", "x", " 7 mice\n",
    "{query} {{ document }} {0}", "Owls hunt mice at night. " * 12, "東京は大きい。\n\n- one (two)",
]  # fmt: skip
PAIRS = [(QUERY, text) for text in TEXTS] + [("owl?", "Owls hunt."), ("", "a query of nothing")]
BOUND = 2e-5
ROLES = (
    "{{% for m in messages %}}<|im_start|>{{{{ 'system' if m.role == 'system' else 'user' }}}}\n"
    "{{{{ {{'query': '<Query>: ', 'document': '<Document>: '}}.get(m.role, '') }}}}{{{{ {} }}}}<|im_end|>\n{{% endfor %}}"
    "{{% if add_generation_prompt %}}<|im_start|>assistant\n<think>\n\n</think>\n\n{{% endif %}}"
)
FIND = "messages | selectattr('role', 'eq', '{}') | map(attribute='content') | first"
# Qwen3-Reranker's prompt as a template for query and document.
RERANKER = (
    "<|im_start|>system\n{{ " + FIND.format("system") + " | default('Judge.') }}<|im_end|>\n<|im_start|>user\n"
    "<Query>: {{ " + FIND.format("query") + " }}\n<Document>: {{ " + FIND.format("document") + " }}<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
DOCUMENT_FIRST = (
    "<|im_start|>user\n{{ " + FIND.format("document") + " }}<|im_end|>\n<|im_start|>user\n{{ " + FIND.format("query")
    + " }}<|im_end|>\n"
)  # fmt: skip
# Instruction-tuned models' templates know three roles, and print nothing for others.
INSTRUCT = (
    "{% for m in messages %}{% if m.role in ('system', 'user', 'assistant') %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
)
TEMPLATES: dict[str, tuple[str, str, str]] = {  # family, style of the tokenizer, chat template
    "loop": ("qwen3", "qwen", prompt_tokenizers.CHATML),
    "roles": ("qwen2", "qwen", ROLES.format("m.content")),
    "parts": ("qwen3", "qwen", ROLES.format("m.content[0].text")),
    "reranker": ("qwen3", "qwen", RERANKER),
    "prints BOS, trims": ("llama", "llama3", prompt_tokenizers.LLAMA3),
    "no BOS": ("mistral", "zephyr", prompt_tokenizers.ZEPHYR),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`checkpoint(family, style, chat template, labels)` -> folder of a random classifier. Do not write to it."""
    made: dict[Any, Path] = {}

    def build(family: str, style: str, chat: str | None, labels: int = 1) -> Path:
        key = (family, style, chat, labels)
        if key not in made:
            made[key] = _save(tmp_path_factory.mktemp(family), *key)
        return made[key]

    return build


def _save(folder: Path, family: str, style: str, chat: str | None, labels: int) -> Path:
    prompt_tokenizers.save(style, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = chat
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or "<|end_of_text|>"
    tokenizer.save_pretrained(folder)
    name, settings = decoders._SETTINGS[family]
    changes = {"vocab_size": len(tokenizer), "max_position_embeddings": 600, "pad_token_id": tokenizer.pad_token_id}
    config = getattr(transformers, f"{name}Config")(**(settings | changes), num_labels=labels)
    model = getattr(transformers, f"{name}ForSequenceClassification")(config)
    decoders.randomise(model, 0).save_pretrained(folder)
    return folder


def theirs_of(folder: Path, **options: Any) -> Any:
    return st.CrossEncoder(str(folder), device="cpu", local_files_only=True, **options)


def assert_equal(ours: np.ndarray, expected: np.ndarray) -> None:
    assert ours.dtype == np.float32
    assert ours.shape == expected.shape
    assert np.abs(ours - expected).max() <= BOUND * max(1, np.abs(expected).max())


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("labels", [1, 3])
def test_scores_equal_sentence_transformers(checkpoint: Callable[..., Path], name: str, labels: int) -> None:
    folder = checkpoint(*TEMPLATES[name], labels)
    theirs, ours = theirs_of(folder), CrossEncoder(folder)
    expected = theirs.predict(PAIRS, activation_fn=torch.nn.Identity())
    assert np.ptp(expected) > 0.3
    assert_equal(ours.predict(PAIRS, activation_fn=torch.nn.Identity()), expected)
    assert_equal(ours.predict(PAIRS), theirs.predict(PAIRS))
    joined = CrossEncoder(folder, chat_template="").predict(PAIRS, activation_fn="identity")
    assert np.abs(joined - expected).max() > 0.1
    if labels == 1:
        assert np.abs(ours.score(QUERY, TEXTS) - expected[: len(TEXTS)]).max() <= BOUND * np.abs(expected).max()
        rows, wanted = ours.rank(QUERY, TEXTS, return_documents=True), theirs.rank(QUERY, TEXTS, return_documents=True)
        assert [row["corpus_id"] for row in rows] == [row["corpus_id"] for row in wanted]
        assert [row["text"] for row in rows] == [row["text"] for row in wanted]
