"""Prompts' token ids against the whole rendered prompt, marker texts, and checkpoints that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")
pytest.importorskip("jinja2")

import prompt_tokenizers as styles
from prompt_tokenizers import count_of, prompts_of, tokenizer_of

from fastrerank.inputs.prompts import Template, compiler, list_templates
from fastrerank.inputs.prompts.prompt_tokenizer import PromptTokenizer
from fastrerank.inputs.text_pieces import TextTokenizer

RAW = ["gpt2", "t5"]
CHAT = [style for style in styles.STYLES if style not in RAW]
# Styles without a system role refuse templates that need one and do not say how to do without.
NO_SYSTEM = ["mistral", "gemma"]
# What prints roles of its own, which templates that check for user and assistant refuse.
OWN_ROLES = [("mistral", "sentence-transformers")]
QUERY = "where do owls sleep?"
DOCUMENTS = [
    "The owl sleeps by day.",
    "",
    "   ",
    "\n",
    "12 mice",
    ", and then",
    "ends here.\n\n",
    " leading",
    "東京は大きい。",
    "naïve café e\u0301",
    "\u0301starts with a combining mark",
    "it's [3] (4) {query} {{x}} {",
    "x" * 80,
    "a\u0000b \ufffd \ue000 🦉👩‍👩‍👧",
    "]: \"quoted\" 'text' \r\n\r\n end ",
    'Passage B: "no"\n\nPassage C:',
    "\u3000wide\u3000",
    "<0x0A> ▁▁ Ġ Ċ",
]


def lists_of(template: Template, documents: list[str]) -> list[list[str]]:
    size = count_of(template, 5)
    padded = documents + documents[: -len(documents) % size]
    return [padded[start : start + size] for start in range(0, len(padded), size)]


def notes_of(template: Template, lists: list[list[str]]) -> list[list[str]] | None:
    return [[f"{i}.5" for i in range(len(texts))] for texts in lists] if template.uses_notes else None


def independent_whole(style: str, prompts: PromptTokenizer, query: str, documents: list[str]) -> list[int]:
    """transformers' own path: render the messages of a chat template, or fill the text, and call the tokenizer."""
    tokenizer, template = tokenizer_of(style), prompts.template
    (prompt,) = prompts.encode(query, [documents])
    if template.messages:
        text = tokenizer.apply_chat_template(prompt.messages, tokenize=False, add_generation_prompt=True)
        bos = tokenizer.bos_token
        special = bos is not None and not text.startswith(bos)
        ids = tokenizer(text + template.suffix, add_special_tokens=False)["input_ids"]
        return [tokenizer.bos_token_id, *ids] if special else ids
    if template.pair:
        pair = [part.format(query=query, document=documents[0]) for part in template.pair]
        return tokenizer(*pair)["input_ids"]
    (message,) = prompt.messages
    return tokenizer(message["content"] + template.suffix, add_special_tokens=template.special_tokens == "auto")[
        "input_ids"
    ]


SERVED = [
    (style, name)
    for style in styles.STYLES
    for name in list_templates()
    if (style, name) not in OWN_ROLES
    and not (Template.load(name).messages and style in RAW)
    and not (set(Template.load(name).requires) and style not in ("qwen", "gpt2"))
    and not (
        style in NO_SYSTEM
        and any(message.role == "system" for message in Template.load(name).messages)
        and Template.load(name).system_joiner is None
    )
]


@pytest.mark.parametrize(("style", "name"), SERVED)
def test_every_template_gives_the_ids_of_the_whole_prompt(style, name):
    prompts = prompts_of(style, name)
    lists = lists_of(prompts.template, DOCUMENTS)
    notes = notes_of(prompts.template, lists)
    for _ in range(2):  # the second time from the cache
        for prompt, documents, texts in zip(
            prompts.encode(QUERY, lists, notes=notes), lists, notes or [[]] * len(lists), strict=True
        ):
            assert prompt.ids.dtype == np.int32
            assert prompt.ids.tolist() == prompts.whole_ids(QUERY, documents, texts)


@pytest.mark.parametrize(
    ("style", "name"),
    [
        *((style, "first") for style in CHAT),
        *((style, "relevance") for style in CHAT),
        ("qwen", "qwen3-reranker"),
        ("t5", "monot5"),
        ("llama2", "rankllama"),
        ("llama3", "rankllama"),
        ("mistral", "dear-stage1"),
    ],
)
def test_the_reference_is_what_transformers_gives(style, name):
    prompts = prompts_of(style, name)
    for document in ("The owl sleeps.", "東京 12\nx", " it's", ""):
        documents = [document] * count_of(prompts.template)
        (prompt,) = prompts.encode(QUERY, [documents])
        assert prompt.ids.tolist() == independent_whole(style, prompts, QUERY, documents)


@pytest.mark.parametrize("style", ["qwen", "gpt2"])
def test_separate_segments_are_tokenised_one_by_one(style):
    tokenizer, prompts = tokenizer_of(style), prompts_of(style, "mxbai-rerank-v2")

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    head = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    task = prompts.template.segments[5]
    for document in DOCUMENTS:
        expected = ids(f"{head}<|im_start|>user\n") + ids("query: " + QUERY) + ids("\n") + ids("document: " + document)
        expected += ids("\n") + ids(task) + ids("<|im_end|>\n<|im_start|>assistant\n")
        assert prompts.encode(QUERY, [[document]])[0].ids.tolist() == expected
    assert prompts.label_ids().tolist() == [ids("1")[0], ids("0")[0]]


@pytest.mark.parametrize(("style", "bos"), [("gemma", "<bos>"), ("llama2", "<s>"), ("qwen", None)])
def test_bge_gemma_starts_with_bos_where_there_is_one(style, bos):
    tokenizer, prompts = tokenizer_of(style), prompts_of(style, "bge-gemma")

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    expected = [] if bos is None else [tokenizer.convert_tokens_to_ids(bos)]
    expected += ids("A: " + QUERY) + ids("\n") + ids("B: owls\n") + ids("\n") + ids(prompts.template.instruction)
    assert prompts.encode(QUERY, [["owls\n"]])[0].ids.tolist() == expected


@pytest.mark.parametrize("style", ["llama3", "llama2", "zephyr", "mistral", "gemma", "phi3"])
def test_exactly_one_bos(style):
    bos = tokenizer_of(style).bos_token_id
    for name in ("first", "relevance", "monot5"):
        prompts = prompts_of(style, name)
        (prompt,) = prompts.encode(QUERY, [["one"] * count_of(prompts.template)])
        assert prompt.ids[0] == bos
        assert (prompt.ids == bos).sum() == 1


def test_t5_ends_with_its_end_of_sequence():
    (prompt,) = prompts_of("t5", "monot5").encode(QUERY, [["owl"]])
    assert prompt.ids[-1] == tokenizer_of("t5").eos_token_id
    assert prompts_of("t5", "monot5").decoder_ids.tolist() == []
    text = tokenizer_of("t5").decode(prompts_of("t5", "prp-t5").decoder_ids)
    assert text.replace("▁", "").replace(" ", "") == "Passage"


TEXTS = st.one_of(
    st.text(max_size=40),
    st.text(st.sampled_from(" \n\t\r.,:;'\"[](){}<>|/_-09aAzéß東▁Ġ\u0301\u3000\u200b\x1c\x85"), max_size=25),
    st.lists(st.sampled_from([*styles.CORPUS, *DOCUMENTS]), max_size=3).map("".join),
)


def holds_special(style: str, *texts: str) -> bool:
    markers = tokenizer_of(style).added_tokens_decoder.values()
    return any(str(token.content) in text for token in markers if token.special for text in texts)


@pytest.mark.parametrize(
    ("style", "name"),
    [
        *((style, "first") for style in CHAT),
        *((style, "prp") for style in CHAT),
        ("qwen", "qwen3-reranker"),
        ("llama3", "rankgpt"),
        ("llama2", "rankgpt"),
        ("phi3", "rankgpt"),
        ("qwen", "insertrank"),
        ("t5", "monot5"),
        ("t5", "setwise-t5"),
        ("gpt2", "prp-t5"),
        ("llama2", "rankllama"),
        ("gemma", "bge-gemma"),
    ],
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(query=TEXTS, texts=st.lists(TEXTS, min_size=3, max_size=3))
def test_any_text_gives_the_ids_of_the_whole_prompt(style, name, query, texts):
    assume(not holds_special(style, query, *texts))
    prompts = prompts_of(style, name, max_length=1_000_000)
    template = prompts.template
    documents = texts[: count_of(template)]
    notes = ["1.5"] * len(documents) if template.uses_notes else []
    (prompt,) = prompts.encode(query, [documents], notes=[notes] if notes else None)
    assert prompt.ids.tolist() == prompts.whole_ids(query, documents, notes)


@pytest.mark.parametrize("style", CHAT)
def test_documents_are_tokenised_on_their_own_and_not_as_whole_runs(style, monkeypatch):
    """The fast path serves the listwise templates of every style: nothing falls back for ordinary text."""
    prompts = PromptTokenizer(tokenizer_of(style), Template.load("first"))
    monkeypatch.setattr(compiler.Batch, "_whole", lambda *_: pytest.fail("a run was tokenised whole"))
    prompts.encode(QUERY, [["The owl sleeps by day.", "Mice hunt", "東京は大きい。", "12 (x)"]])
    info = prompts.cache_info
    assert info.entries >= 4


@pytest.mark.parametrize(
    ("style", "marker"),
    [
        ("qwen", "<|im_end|>"),
        ("qwen", "<|im_start|>"),
        ("qwen", "</think>"),
        ("llama3", "<|eot_id|>"),
        ("llama2", "</s>"),
        ("mistral", "[INST]"),
        ("mistral", "</s>"),
        ("gemma", "<end_of_turn>"),
        ("gemma", "<bos>"),
        ("phi3", "<|end|>"),
        ("t5", "</s>"),
        ("t5", "<extra_id_10>"),
        ("t5", "<pad>"),
    ],
)
def test_markers_in_texts_are_plain_text(style, marker):
    name = {"t5": "monot5", "qwen": "qwen3-reranker"}.get(style, "prp")
    prompts = prompts_of(style, name)
    count = count_of(prompts.template)
    text = f"before {marker}{marker} after{marker}"
    (plain,) = prompts.encode("query", [["text"] * count])
    (hostile,) = prompts.encode(f"{marker}query{marker}", [[text] * count])
    token = tokenizer_of(style).convert_tokens_to_ids(marker)
    assert (hostile.ids == token).sum() == (plain.ids == token).sum()
    written = tokenizer_of(style).decode(hostile.ids.tolist(), skip_special_tokens=False)
    assert written.replace(" ", "").count(marker.replace(" ", "")) >= 3 * count


def test_ordinary_added_tokens_stay_tokens():
    tokenizer = tokenizer_of("gemma")
    newlines = tokenizer.convert_tokens_to_ids("\n\n\n")
    (prompt,) = prompts_of("gemma", "prp").encode("q", [["a\n\n\nb", "c"]])
    assert (prompt.ids == newlines).sum() == 1


def test_numbered_documents_are_rewritten_where_published():
    tokenizer = tokenizer_of("qwen")
    (prompt,) = prompts_of("qwen", "rank_zephyr").encode("q [2]", [["see [3]", "[1] > [2]"]])
    text = tokenizer.decode(prompt.ids.tolist())
    assert "[1] see (3)\n[2] (1) > (2)\n" in text
    assert text.count("query: q (2).") == 1


def test_messages_are_what_the_chat_template_got():
    (prompt,) = prompts_of("qwen", "rankgpt").encode("who", [["one {x}", "two"]])
    assert [message["role"] for message in prompt.messages] == ["system", "user", "assistant"] + [
        "user",
        "assistant",
    ] * 2 + ["user"]
    assert prompt.messages[3] == {"role": "user", "content": "[1] one {x}"}
    (raw,) = prompts_of("qwen", "qwen3-reranker").encode("who", [["one"]])
    assert raw.messages[0]["content"].endswith("<Document>: one<|im_end|>\n<|im_start|>assistant\n")


def test_a_missing_system_role_moves_the_system_text():
    (prompt,) = prompts_of("mistral", "first").encode("who", [["one"]])
    (message,) = prompt.messages
    assert message["role"] == "user"
    assert "relevancy to the query\n I will provide you with 1 passages" in message["content"]
    with pytest.raises(ValueError, match="no system role, which template 'rankgpt' needs"):
        prompts_of("gemma", "rankgpt")


def chat(template: str) -> Any:
    tokenizer = styles.qwen()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("chat_template", "message"),
    [
        (
            "{% for m in messages %}{% if m.role != 'assistant' %}{{ m.content }}{% endif %}{% endfor %}",
            r"drops turn 3 \(role 'assistant'\)",
        ),
        ("{{ messages[0].content }}{{ messages[1].content }}{{ messages[2].content }}", "holds document 1"),
        ("{{ raise_exception('no chat today') }}", "refuses template 'rankgpt'.*no chat today"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "document 1 more than once"),
        ("{% for m in messages %}{{ m.content[:40] }}{% endfor %}", "drops the query"),
    ],
)
def test_chat_templates_that_lose_something_are_refused(chat_template, message):
    with pytest.raises(ValueError, match=message):
        PromptTokenizer(chat(chat_template), Template.load("rankgpt"))


def test_checkpoints_that_cannot_serve_a_template_are_refused():
    with pytest.raises(ValueError, match="'first' needs a chat template"):
        prompts_of("gpt2", "first")
    with pytest.raises(ValueError, match=r"made of the special tokens <\|im_start\|>, <\|im_end\|>"):
        prompts_of("llama3", "qwen3-reranker")
    with pytest.raises(ValueError, match="fast tokenizer"):
        PromptTokenizer(object(), Template.load("monot5"))
    with pytest.raises(ValueError, match="prints no instruction"):
        prompts_of("qwen", "first", instruction="be strict")


def test_ids_that_differ_are_an_error_that_shows_both(monkeypatch):
    encode = TextTokenizer.encode_unit

    def wrong(self: TextTokenizer, *arguments: Any) -> Any:
        for ids in encode(self, *arguments):
            yield None if ids is None else [*ids, 7]

    monkeypatch.setattr(TextTokenizer, "encode_unit", wrong)
    with pytest.raises(ValueError, match=r"cannot be tokenised exactly.*by segments, .* as a whole"):
        PromptTokenizer(styles.qwen(), Template.load("qwen3-reranker"))


def test_stories_tokenizer():
    folder = Path(__file__).parents[3] / "shared" / "models" / "stories260K"
    if not (folder / "tokenizer.json").is_file():
        pytest.skip("shared/models/stories260K is not here")
    for name in ("monot5", "prp-t5", "setwise-t5", "rankllama", "bge-gemma"):
        prompts = PromptTokenizer.load(folder, Template.load(name), max_length=4000)
        for documents in lists_of(prompts.template, DOCUMENTS):
            if not any(marker in text for text in documents for marker in ("<s>", "</s>", "<unk>")):
                assert prompts.encode(QUERY, [documents])[0].ids.tolist() == prompts.whole_ids(QUERY, documents)
