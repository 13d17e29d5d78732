"""Prompts' token ids against the whole rendered prompt, marker texts, truncation, labels, the cache, threads."""

from __future__ import annotations

import functools
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")
pytest.importorskip("jinja2")

import prompt_tokenizers as styles
import tokenizers
from tokenizers import AddedToken

from fastrerank.inputs.limits import TextLimits, TooLong
from fastrerank.inputs.prompts import Template, list_templates, prompt_tokenizer
from fastrerank.inputs.prompts.prompt_tokenizer import Prompt, PromptTokenizer
from fastrerank.inputs.prompts.token_cache import TokenCache, Tokens
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


@functools.cache
def tokenizer_of(style: str) -> Any:
    return styles.STYLES[style]()


@functools.cache
def prompts_of(style: str, name: str, **options: Any) -> PromptTokenizer:
    return PromptTokenizer(tokenizer_of(style), Template.load(name), **options)


def count_of(template: Template, count: int = 3) -> int:
    return {"pointwise": 1, "pairwise": 2}.get(template.kind, count)


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
    monkeypatch.setattr(prompt_tokenizer, "whole_run", lambda *_: pytest.fail("a run was tokenised whole"))
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


# ---- labels


def test_labels_of_the_last_position():
    qwen = tokenizer_of("qwen")
    vocabulary = qwen.get_vocab()
    assert prompts_of("qwen", "first").label_ids(26).tolist() == [vocabulary[chr(65 + i)] for i in range(26)]
    assert prompts_of("llama2", "first").label_ids(3).tolist() == [tokenizer_of("llama2").get_vocab()[c] for c in "ABC"]
    assert prompts_of("qwen", "erank").label_ids().tolist() == [vocabulary[str(i)] for i in range(10)]
    assert prompts_of("qwen", "prp").label_ids().tolist() == [vocabulary["ĠA"], vocabulary["ĠB"]]
    assert prompts_of("qwen", "setwise").label_ids(1).dtype == np.int64
    assert prompts_of("t5", "rankt5").label_ids().tolist() == [
        tokenizer_of("t5").convert_tokens_to_ids("<extra_id_10>")
    ]
    logits = PromptTokenizer(styles.qwen(), Template.load("rank_zephyr"), readout="logits")
    assert logits.label_ids(9).tolist() == [vocabulary[str(i)] for i in range(1, 10)]
    assert logits.encode("q", [["d"]])[0].ids[-1] == vocabulary["["]


def test_labels_that_are_no_single_tokens_are_refused():
    with pytest.raises(
        ValueError, match=r"label 'yes' of template 'qwen3-reranker' is not a single token.*\[.*'y', 'es'\]"
    ):
        prompts_of("qwen", "qwen3-reranker").label_ids()


def test_a_merge_with_the_bracket_is_refused():
    """A vocabulary with the token "[A" cannot be read at the position behind "["."""
    data = json.loads(styles.byte_level(styles.QWEN_SPLIT).to_str())
    data["model"]["vocab"]["[A"] = len(data["model"]["vocab"])
    data["model"]["merges"].append(["[", "A"])
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(data))
    tokenizer.add_special_tokens(styles.special("<|im_start|>", "<|im_end|>"))
    merged = styles.wrap(tokenizer, styles.CHATML)
    prompts = PromptTokenizer(merged, Template.load("first"))
    with pytest.raises(ValueError, match=r"label 'A' of template 'first'.*\[A"):
        prompts.label_ids(2)


def test_label_counts():
    with pytest.raises(ValueError, match=r"27 documents .* 26 letters"):
        prompts_of("qwen", "first").label_ids(27)
    with pytest.raises(ValueError, match="27 documents"):
        prompts_of("qwen", "first").encode("q", [["d"] * 27])
    with pytest.raises(ValueError, match="say of how many"):
        prompts_of("qwen", "first").label_ids()
    with pytest.raises(ValueError, match="not identifiers"):
        prompts_of("qwen", "prp").label_ids(2)
    with pytest.raises(ValueError, match="read by generate"):
        prompts_of("qwen", "rankgpt").label_ids(2)
    with pytest.raises(ValueError, match="read by head"):
        prompts_of("llama2", "rankllama").label_ids()
    with pytest.raises(ValueError, match="digits 1 to 9"):
        prompts_of("qwen", "rank_zephyr", readout="logits").label_ids(10)
    with pytest.raises(ValueError, match="at most 23"):
        prompts_of("qwen", "setwise").encode("q", [["d"] * 24])


# ---- truncation


def limited(style: str, name: str, room: int, count: int, query: str = QUERY) -> tuple[PromptTokenizer, int]:
    """Prompts that leave `room` tokens for `count` documents, and the tokens of everything else."""
    free = prompts_of(style, name, max_length=1_000_000)
    fixed = len(free.encode(query, [[""] * count])[0].ids)
    return PromptTokenizer(tokenizer_of(style), Template.load(name), max_length=fixed + room), fixed


@pytest.mark.parametrize(
    ("style", "name"), [("qwen", "first"), ("llama2", "first"), ("gemma", "prp"), ("t5", "monot5")]
)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_only_documents_are_cut_and_the_longest_evenly(style, name, data):
    free = prompts_of(style, name, max_length=1_000_000)
    count = count_of(free.template, 4)
    words = st.lists(st.sampled_from(["owl", "mice", "12", "東京", "it's", "sleeps", "."]), max_size=30).map(" ".join)
    documents = data.draw(st.lists(words, min_size=count, max_size=count))
    fixed = len(free.encode(QUERY, [[""] * count])[0].ids)
    limit = fixed + data.draw(st.integers(2 * count + 6, 60))
    tight = PromptTokenizer(tokenizer_of(style), free.template, max_length=limit)
    (whole,), (cut,) = free.encode(QUERY, [documents]), tight.encode(QUERY, [documents])
    assert len(cut.ids) == min(limit, len(whole.ids))
    assert cut.truncated.any() == (len(whole.ids) > limit)
    if len(whole.ids) <= limit:
        assert cut.ids.tolist() == whole.ids.tolist()
    # What is left is the whole prompt less tokens, in order: the question and the suffix are still there.
    rest = iter(whole.ids.tolist())
    assert all(token in rest for token in cut.ids.tolist())
    tail = tight.encode(QUERY, [["a"] * count])[0].ids[-4:].tolist()
    assert cut.ids[-4:].tolist() == tail or not free.template.messages


def test_cuts_are_even():
    prompts, fixed = limited("qwen", "first", 40, 3)
    long = " ".join(["owl"] * 60)
    (prompt,) = prompts.encode(QUERY, [["one two", long, long]])
    assert len(prompt.ids) == fixed + 40
    assert prompt.truncated.tolist() == [False, True, True]
    text = tokenizer_of("qwen").decode(prompt.ids.tolist())
    shown = [text.split(f"\n[{c}]")[1].split("\n")[0].count("owl") for c in "BC"]
    assert abs(shown[0] - shown[1]) <= 1
    assert "[A] one two\n" in text


@pytest.mark.parametrize("start", ["", "\u0301"])  # with a mark, the run of text is tokenised as a whole
@pytest.mark.parametrize(
    ("style", "template"),
    [("qwen", "qwen3-reranker"), ("llama2", "relevance"), ("t5", "rankt5")],
)
def test_of_long_documents_the_end_stays_where_the_left_side_is_cut(style, template, start):
    prompts = prompts_of(style, template, max_length=10**6)
    short, long = (start + " ".join(f"owl {i} sleeps," for i in range(count)) for count in (2500, 6000))
    assert 16 * 500 + 8192 < len(short) < 65536 < len(long)
    for most in (500, 700):
        limits = TextLimits(max_length=most, truncation_side="left")
        for text in (short, long):
            whole = prompts.encode(QUERY, [[text]])[0].ids
            for _ in range(2):  # tokenised, and from the cache
                right = prompts.encode(QUERY, [[text]], limits=TextLimits(max_length=most))[0].ids
                (found,) = prompts.encode(QUERY, [[text]], limits=limits)
                assert found.truncated.tolist() == [True]
                assert len(found.ids) == most
                begin = int(np.argmax(found.ids != whole[:most]))
                assert begin < 200
                assert found.ids.tolist() == [*whole[:begin], *whole[begin - most :]]
                end = int(np.argmax(right != whole[:most]))
                assert end > most - 40
                assert right.tolist() == [*whole[:end], *whole[end - most :]]


def test_characters_that_a_normalizer_makes_longer_count_as_their_tokens():
    prompts = prompts_of("t5", "rankt5", max_length=1000)
    for text in ("\ufdfa" * 10, "a\ufdfa" * 4):  # 18 characters each, of three bytes
        count = len(prompts._text.encode_spans(text, False)[0])
        most = len(text.encode()) + 1
        assert count > most
        kept, cut = prompts.within("a document", text, most, TextLimits())
        assert cut
        assert kept == text[: len(kept)] != text
        with pytest.raises(TooLong, match=f"a document has at least {count} tokens, the limit is {most}"):
            prompts.within("a document", text, most, TextLimits(truncate=False))
    # "\ufb01" is three bytes and "fi": nothing is cut where it fits, whatever its size seems to say.
    assert prompts.within("a document", "\ufb01" * 3, 7, TextLimits()) == ("\ufb01" * 3, False)
    limited = replace(Template.load("rankt5"), document_unit="tokens", document_limit=31)
    assert PromptTokenizer(tokenizer_of("t5"), limited).encode(QUERY, [["\ufdfa" * 10]])[0].truncated.all()


def test_no_room_says_by_how_many_tokens():
    prompts, _ = limited("qwen", "qwen3-reranker", 5, 1)
    long = QUERY + " owls" * 50
    free = prompts_of("qwen", "qwen3-reranker", max_length=1_000_000)
    need = len(free.encode(long, [[""]])[0].ids) + 1 - prompts.max_length
    with pytest.raises(ValueError, match=r"leave no room .* limit of \d+ tokens by (\d+)") as caught:
        prompts.encode(long, [["some document"]])
    assert abs(int(str(caught.value).split(" by ")[1].split()[0]) - need) <= 1
    with pytest.raises(ValueError, match="leave no room"):
        prompts.encode(QUERY, [["some document"]], reserve=20)
    assert not prompts.encode(QUERY, [[""]])[0].truncated.any()


@pytest.mark.parametrize(("style", "name"), [("qwen", "prp"), ("llama2", "prp"), ("qwen", "coderankllm")])
def test_limits_in_tokens(style, name):
    prompts = prompts_of(style, name)
    limit = prompts.template.document_limit
    long = " ".join(["owl"] * (3 * limit))
    count = count_of(prompts.template, 2)
    (prompt,) = prompts.encode("q", [[long, "short"][:count]])
    assert prompt.truncated.tolist() == [True, False]
    kept = "".join(message["content"] for message in prompt.messages)
    tokens = len(tokenizer_of(style)(" ".join(["owl"] * kept.count("owl")), add_special_tokens=False)["input_ids"])
    assert limit - 2 <= tokens <= limit + 1


def test_published_word_limit_is_reported():
    (prompt,) = prompts_of("qwen", "first").encode("q", [["owl " * 301, "owl " * 300]])
    assert prompt.truncated.tolist() == [True, False]


def test_the_smaller_limit_holds(tmp_path):
    folder = styles.save("qwen", tmp_path)
    (folder / "config.json").write_text('{"max_position_embeddings": 600}')
    assert PromptTokenizer.load(folder, Template.load("qwen3-reranker")).max_length == 600
    assert PromptTokenizer.load(folder, Template.load("erank")).max_length == 600
    assert PromptTokenizer.load(folder, Template.load("monot5")).max_length == 512
    assert PromptTokenizer.load(folder, Template.load("monot5"), max_length=550).max_length == 550
    for wrong, kind in [(0, ValueError), (True, TypeError), ("9", TypeError)]:
        with pytest.raises(kind, match="max_length"):
            PromptTokenizer.load(folder, Template.load("monot5"), max_length=wrong)


# ---- arguments


def test_wrong_types_name_their_position():
    prompts = prompts_of("qwen", "first")
    with pytest.raises(TypeError, match=r"query must be str, got NoneType"):
        prompts.encode(None, [["d"]])
    with pytest.raises(TypeError, match=r"lists\[1\]\[0\] must be str, got int"):
        prompts.encode("q", [["d"], [3]])
    with pytest.raises(TypeError, match=r"lists\[0\] must be a list"):
        prompts.encode("q", ["d"])
    with pytest.raises(TypeError, match="lists must be"):
        prompts.encode("q", "d")
    with pytest.raises(TypeError, match=r"notes\[0\]\[0\] must be str, got float"):
        prompts_of("qwen", "insertrank").encode("q", [["d"]], notes=[[1.5]])
    with pytest.raises(ValueError, match="pass notes"):
        prompts_of("qwen", "insertrank").encode("q", [["d"]])
    with pytest.raises(ValueError, match="prints no notes"):
        prompts.encode("q", [["d"]], notes=[["n"]])
    with pytest.raises(ValueError, match="for every document"):
        prompts_of("qwen", "insertrank").encode("q", [["d"]], notes=[["n", "m"]])
    with pytest.raises(ValueError, match=r"lists\[0\] must hold 2"):
        prompts_of("qwen", "prp").encode("q", [["d"]])
    with pytest.raises(ValueError, match=r"lists\[1\] must hold at least one"):
        prompts.encode("q", [["d"], []])
    assert prompts.encode("q", []) == []


@pytest.mark.parametrize("name", ["first", "qwen3-reranker"])
def test_lone_surrogates_become_replacement_characters(name):
    prompts = prompts_of("qwen", name)
    (odd,) = prompts.encode("q \udc00", [["a\ud800b"]])
    (even,) = prompts.encode("q \ufffd", [["a\ufffdb"]])
    assert odd.ids.tolist() == even.ids.tolist()


# ---- cache and threads


def test_documents_are_tokenised_once_per_content():
    prompts = PromptTokenizer(tokenizer_of("qwen"), Template.load("first"))
    start = prompts.cache_info
    documents = [f"document number {i}" for i in range(20)]
    prompts.encode(QUERY, [documents])
    middle = prompts.cache_info
    assert middle.misses - start.misses == 20
    prompts.encode("another query", [documents[::-1], documents[5:15]])
    end = prompts.cache_info
    assert end.misses == middle.misses
    assert end.hits - middle.hits == 20  # each content once a call, at whatever place it stands


def test_the_cache_is_bounded_and_least_recently_used():
    cache: TokenCache[str] = TokenCache(10_000)
    tokens = Tokens(np.arange(100, dtype=np.int32), 0, 100, False)
    for i in range(100):
        cache.put("kind", str(i), tokens)
        assert cache.get("kind", "0") is not None  # used all the time, so never dropped
        assert cache.info().bytes <= 10_000
    assert cache.get("kind", "1") is None
    assert cache.get("kind", "99") is not None
    assert 5 < cache.info().entries < 20
    cache.put("kind", "large", Tokens(np.zeros(5_000, np.int32), 0, 0, False))
    assert cache.get("kind", "large") is None
    small = PromptTokenizer(tokenizer_of("qwen"), Template.load("first"), cache_bytes=3000)
    for i in range(50):
        small.encode("q", [[f"document number {i}"]])
    assert 0 < small.cache_info.bytes <= 3000
    none = PromptTokenizer(tokenizer_of("qwen"), Template.load("first"), cache_bytes=0)
    assert none.encode("q", [["d"]])[0].ids.tolist() == small.encode("q", [["d"]])[0].ids.tolist()


@pytest.mark.parametrize("style", ["qwen", "llama2", "gemma"])
def test_one_object_serves_many_threads(style):
    prompts = PromptTokenizer(tokenizer_of(style), Template.load("first"), cache_bytes=20_000)
    work = [(f"query {i % 7}", [[f"text {j * i % 23} owl" for j in range(2 + i % 9)]]) for i in range(200)]
    expected = [prompts.whole_ids(query, lists[0]) for query, lists in work[:60]]

    def encode(item: tuple[str, list[list[str]]]) -> list[Prompt]:
        return prompts.encode(*item)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(encode, work))
    assert [prompt.ids.tolist() for (prompt,) in results[:60]] == expected
    assert prompts.cache_info.bytes <= 20_000


# ---- parts


def test_splitting_at_markers_is_leftmost_longest():
    tokenizer = styles.byte_level(None)
    tokenizer.add_special_tokens([AddedToken("<a>", normalized=False), AddedToken("<a><b>", normalized=False)])
    text = TextTokenizer(tokenizer, [])
    parts = text.split("x<a><b><a> y")
    assert [part if isinstance(part, str) else part.content for part in parts] == ["x", "<a><b>", "<a>", " y"]


def test_only_what_the_template_writes_becomes_a_marker():
    tokenizer = styles.byte_level(None)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "<b>", "\n\n", "owl")])
    text = TextTokenizer(tokenizer, ["<think>\n\nowl"])
    assert list(text.markers) == ["<think>"]
    kept = [tokenizer.token_to_id(token) for token in ("<b>", "\n\n", "owl")]
    assert next(iter(text.encode(["<b>\n\nowl"], True))) == kept


def test_cuts_stand_where_no_token_can_cross():
    text = TextTokenizer(tokenizer_of("llama2").backend_tokenizer, [])
    cut = text.cut("\n[B] ")
    assert cut is not None
    assert text.cut("x") is None
    assert text.cut("東京") is None
    vocabulary = tokenizer_of("llama2").get_vocab()
    for place in (cut.first, cut.last):
        assert not any("\n[B]▁"[place - 1 : place + 1] in token for token in vocabulary)


def test_stories_tokenizer():
    folder = Path(__file__).parents[3] / "shared" / "models" / "stories260K"
    if not (folder / "tokenizer.json").is_file():
        pytest.skip("shared/models/stories260K is not here")
    for name in ("monot5", "prp-t5", "setwise-t5", "rankllama", "bge-gemma"):
        prompts = PromptTokenizer.load(folder, Template.load(name), max_length=4000)
        for documents in lists_of(prompts.template, DOCUMENTS):
            if not any(marker in text for text in documents for marker in ("<s>", "</s>", "<unk>")):
                assert prompts.encode(QUERY, [documents])[0].ids.tolist() == prompts.whole_ids(QUERY, documents)
