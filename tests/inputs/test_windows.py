"""Long texts: ids of joined windows against those of the whole text, and memory that does not grow with characters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import tokenizers
from long_texts import HOSTILE, KINDS, make

from fastrerank.inputs import Tokenizer, windows
from fastrerank.inputs.backend import TokenizingError, encodable, encode_batch
from fastrerank.inputs.windows import Windows

# Windows of these tests, so that a text of some thousand characters has several.
SIZE = 1024


@cache
def tokenizer(kind: str) -> tokenizers.Tokenizer:
    return KINDS[kind]()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_WINDOW": SIZE, "_OVERLAP": 512, "_MARGIN": 128, "_KEPT": 512}.items():
        monkeypatch.setattr(windows, name, value)


def repeats(text: str) -> bool:
    """Return whether a pattern of up to 16 characters repeats over more than the overlap of two windows."""
    size = windows._OVERLAP
    return any(
        text[begin : begin + size] == text[begin + period : begin + period + size]
        for begin in range(0, len(text) - size, size // 2)
        for period in range(1, 17)
        if begin + period + size <= len(text)
    )


def assert_same(kind: str, found: list[int], expected: list[int], place: object, text: str) -> None:
    """Assert that the ids are equal.

    A unigram model may have several best paths: then the characters and the score must be equal. In a text that repeats
    one pattern beyond a window, each join may add three tokens: see docs/explanation/numerics.md.
    """
    if found == expected:
        return
    model = json.loads(tokenizer(kind).to_str())["model"]
    assert model["type"] == "Unigram", (kind, place)
    if repeats(text):
        assert 0 <= len(found) - len(expected) <= 3 * (len(text) // windows._WINDOW), (kind, place)
        return
    scores = [
        (round(sum(model["vocab"][token][1] for token in ids), 3), "".join(model["vocab"][token][0] for token in ids))
        for ids in (found, expected)
    ]
    assert scores[0] == scores[1], (kind, place)


def check(kind: str, seeds: range) -> None:
    own, joined = tokenizer(kind), Windows(tokenizer(kind))
    for seed in seeds:
        text = make(seed, SIZE * (1 + seed % 5))
        expected = own.encode(encodable(text), add_special_tokens=False)
        assert_same(kind, joined.ids(text).tolist(), expected.ids, seed, text)
        ids, spans = joined.spans(text)
        assert_same(kind, ids, expected.ids, seed, text)
        assert all(0 <= start <= end <= len(text) for start, end in spans)
        assert [start for start, _ in spans] == sorted(start for start, _ in spans)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", KINDS)
def test_joined_windows_give_the_ids_of_the_whole_text(kind: str) -> None:
    check(kind, range(7))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("lstrip", [False, True])
@pytest.mark.parametrize("single_word", [False, True])
def test_spans_behind_gaps_that_a_normalizer_strips_are_those_of_the_whole_text(
    normalized: bool, lstrip: bool, single_word: bool
) -> None:
    own = KINDS["t5"]()
    own.add_tokens([tokenizers.AddedToken("<sep>", normalized=normalized, lstrip=lstrip, single_word=single_word)])
    joined = Windows(own)
    for gap in (1, 10, 64, 300, 3000):
        for after in ("<sep> more owls", "<sep>x more", "\x1c<sep> s"):
            for count in (5, 100):
                blank = " " * gap
                text = (
                    f"{'The old owl sees. ' * count}{blank}{after}{' and the rest of it ' * count}{blank}{after}{blank}"
                )
                expected = own.encode(text, add_special_tokens=False)
                assert joined.spans(text) == (expected.ids, expected.offsets), (gap, after, count)


@pytest.mark.nightly
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", KINDS)
def test_joined_windows_give_the_ids_of_the_whole_text_at_length(kind: str) -> None:
    check(kind, range(7, 300))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("xlm-roberta", "xlm-roberta-words", "t5")])
@pytest.mark.parametrize("left", [False, True])
def test_as_many_ids_as_count_are_those_of_the_whole_text(kind: str, left: bool) -> None:
    own, joined = tokenizer(kind), Windows(tokenizer(kind))
    for seed in range(4):
        text = make(seed + 100, 6000)
        expected = own.encode(encodable(text), add_special_tokens=False).ids
        for room in (1, 30, 300):
            found = joined.ids(text, room, left=left).tolist()
            assert len(found) > room or len(found) == len(expected)
            count = min(room + 1, len(expected))
            assert (found[-count:] if left else found[:count]) == (expected[-count:] if left else expected[:count])


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", ["bert", "qwen", "llama2", "roberta"])
def test_a_bounded_text_begins_and_ends_as_the_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "_WHOLE", 1000)
    own, joined = tokenizer(kind), Windows(tokenizer(kind))
    for seed in range(8):
        text = encodable(make(seed + 200, 9000))
        short = joined.bounded(text, 40)
        first = own.encode(text, add_special_tokens=False).ids
        assert own.encode(short, add_special_tokens=False).ids[:41] == first[:41]
        assert text.endswith(short[-500:])
        assert len(short) < len(text) or len(first) < 200


@pytest.mark.parametrize(("kind", "side"), [("bert", "right"), ("roberta", "right"), ("qwen", "left")])
def test_long_documents_and_queries_are_cut_as_transformers_cuts_them(kind: str, side: str) -> None:
    from transformers import PreTrainedTokenizerFast

    own = tokenizers.Tokenizer.from_str(tokenizer(kind).to_str())
    first, last = ("[CLS]", "[SEP]") if kind == "bert" else ("<|end|>", "</s>")
    own.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} $B {last}",
        special_tokens=[(token, own.token_to_id(token)) for token in (first, last)],
    )
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(own.to_str()), truncation_side=side, pad_token=last
    )
    ours = Tokenizer(own, 128, truncation_side=side)
    texts = [
        "!" * 70_000,
        " " * 70_000 + "x",
        "東京国大" * 20_000,
        "ab" * 40_000,
        "The owl sleeps. " * 6000,
        "?!.,- " * 12_000,
        "a" + "\u0301" * 70_000,
        encodable(make(5, 70_000)),
        encodable(make(6, 70_000)),
    ]
    batch = ours.pairs("who?", texts)
    expected = theirs(["who?"] * len(texts), texts, truncation="only_second", max_length=128)["input_ids"]
    for i in range(len(texts)):
        assert batch.ids[batch.offsets[i] : batch.offsets[i + 1]].tolist() == expected[i], texts[i][:20]
    counts = [len(own.encode(encodable(text), add_special_tokens=False)) for text in texts]
    room = 128 - 3 - len(own.encode("who?", add_special_tokens=False))
    assert batch.truncated.tolist() == [count > room for count in counts]
    singles = ours.singles(texts)
    assert singles.truncated.tolist() == [count > 126 for count in counts]
    assert [ours.pairs(text, ["x"]).query_truncated for text in texts] == [count > 125 for count in counts]


@pytest.mark.parametrize(
    "style",
    ["qwen", pytest.param("llama3", marks=pytest.mark.nightly), pytest.param("mistral", marks=pytest.mark.nightly)],
)
def test_prompts_of_long_texts_are_those_of_whole_texts(style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents and queries through templates, pairs through a chat template, and documents in one prompt."""
    import prompt_tokenizers

    from fastrerank.inputs import text_pieces as runs
    from fastrerank.inputs.prompts import Template, compiler, prompt_tokenizer
    from fastrerank.inputs.prompts.attention_policy import Policy
    from fastrerank.inputs.prompts.attention_prompts import AttentionPrompts

    texts = [
        "!" * 80_000,
        "The owl sleeps. " * 6000,
        "東京国大" * 20_000,
        "ab" * 40_000,
        encodable(make(8, 80_000)),
        "x",
    ]
    own = getattr(prompt_tokenizers, style)()
    policy = Policy.load("icr")
    found = []
    for whole in (False, True):
        if whole:
            for module in (windows, runs, compiler):
                monkeypatch.setattr(module, "most_whole", lambda _: 1 << 30)
        pointwise = prompt_tokenizer.PromptTokenizer(own, Template.load("prp"), max_length=400)
        prompts = pointwise.encode("who?", [[texts[i], texts[i - 1]] for i in range(len(texts))])
        attention = AttentionPrompts(
            own, policy, instruction=policy.instructions[policy.instruction], words=None, max_length=300
        )
        read = attention.encode("who?", texts, most=50)
        rows = [(prompt.ids.tolist(), prompt.truncated.tolist()) for prompt in prompts]
        rows.append((read.context.tolist(), read.spans.tolist(), read.truncated.tolist()))
        rows += [pointwise.shorten(text, 30) for text in texts]
        found.append(rows)
        with pytest.raises(ValueError, match="leave no room for the documents"):
            pointwise.encode("The owl sleeps. " * 6000, [["a", "b"]])
    assert found[0] == found[1]


def test_a_text_without_a_limit_is_tokenised_to_its_end() -> None:
    own = tokenizer("qwen")
    text = "?!.,- " * 20_000
    plain = tokenizers.Tokenizer.from_str(own.to_str())
    batch = Tokenizer(plain, None).singles([text, "x"])
    expected = own.encode(text, add_special_tokens=False).ids
    assert batch.ids[: batch.offsets[1]].tolist() == expected
    assert not batch.truncated.any()


@pytest.mark.parametrize("kind", ["bert", "qwen", "xlm-roberta"])
def test_hostile_texts_of_31_mb_take_little_memory_and_few_characters(tmp_path: Path, kind: str) -> None:
    tokenizer(kind).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"model_type": "bert", "max_position_embeddings": 512}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    script = Path(__file__).parents[1] / "support" / "long_texts.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["text"] for row in rows] == list(HOSTILE)
    for row in rows:
        assert row["grown_mb"] < 200, row
        assert row["given"] < 1_000_000, row
        assert all(count <= 256 for count in row["tokens"]), row
        assert not row["truncated"][1], row
    by_name = {row["text"]: row["truncated"] for row in rows}
    assert by_name["mixed punctuation"] == [True, False, True]


def test_a_panic_in_the_tokenizer_names_the_text() -> None:
    data = json.loads(tokenizer("qwen").to_str())
    data["pre_tokenizer"] = {"type": "FixedLength", "length": 0}
    broken = tokenizers.Tokenizer.from_str(json.dumps(data))
    assert len(encode_batch(broken, ["", ""])) == 2
    with pytest.raises(TokenizingError, match=r"fails on the text 'The owl sleeps' of 14 characters"):
        encode_batch(broken, ["", "The owl sleeps", ""])


def test_spaces_that_overflow_the_stack_of_a_pattern_are_tokenised() -> None:
    batch = Tokenizer(tokenizers.Tokenizer.from_str(tokenizer("qwen").to_str()), 64).singles([" " * 11_000_000 + "x"])
    assert len(batch.ids) == 64
    assert batch.truncated.all()
