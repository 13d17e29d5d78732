"""Labels behind prompts, documents cut to fit, and arguments that are refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")
pytest.importorskip("jinja2")

import prompt_tokenizers as styles
import tokenizers
from prompt_tokenizers import count_of, prompts_of, tokenizer_of

from fastrerank.inputs.limits import TextLimits, TooLong
from fastrerank.inputs.prompts import Template
from fastrerank.inputs.prompts.prompt_tokenizer import PromptTokenizer

QUERY = "where do owls sleep?"


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
        count = len(prompts._compiler.text.encode_spans(text, False)[0])
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
