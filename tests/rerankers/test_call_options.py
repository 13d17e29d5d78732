"""What one call may ask: a label, an instruction, limits of texts. Each acts as when loaded with it, or is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_pointwise import save as save_pointwise

import fastrerank
from fastrerank import CrossEncoder
from fastrerank.inputs.limits import TextLimits, TooLong
from fastrerank.rerankers.attention import AttentionReranker
from fastrerank.rerankers.call import NO_OPTIONS, CallOptions
from fastrerank.rerankers.labels import label_scores, named_label, resolve_label
from fastrerank.rerankers.pointwise import PointwiseReranker

Tiny = Callable[..., Path]
QUERY = "how long do fleas live"
LONG = "a flea lives up to one year the owl sleeps by day cats sleep all day"
TEXTS = [LONG, "the owl hunts mice", "", LONG + " the river bank"]


def labelled(tiny: Tiny, tmp_path: Path, names: list[str], **config: Any) -> Path:
    """A tiny BERT whose head has these labels."""
    folder = tmp_path / "-".join(names)
    shutil.copytree(tiny("bert", labels=len(names)), folder)
    stored = json.loads((folder / "config.json").read_text())
    stored |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}, **config}
    (folder / "config.json").write_text(json.dumps(stored))
    return folder


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["not_relevant", "relevant"], 1),
        (["Relevant", "Not Relevant"], 0),
        (["no", "YES"], 1),
        (["x"], 0),
        (["contradiction", "entailment", "neutral"], 1),
        (["LABEL_0", "LABEL_1"], None),
        (["a", "b", "c"], None),
        (["yes", "relevant"], None),
        (["irrelevant", "perfect"], None),
        (["false", "true"], 1),
    ],
)
def test_a_name_tells_which_label_ranks_or_none_does(names: list[str], expected: int | None) -> None:
    assert named_label(names) == expected


def test_labels_by_name_and_number() -> None:
    names = ["contradiction", "Entailment", "neutral"]
    assert [resolve_label(label, names) for label in ("Entailment", "entailment", 2, np.int64(0))] == [1, 1, 2, 0]
    for label in ("related", 3, -1):
        with pytest.raises(ValueError, match=r"label must be one of 0 \('contradiction'\), 1 \('Entailment'\), 2"):
            resolve_label(label, names)
    for wrong in (True, 1.0, None):
        with pytest.raises(TypeError, match="label must be a name"):
            resolve_label(wrong, names)  # type: ignore[arg-type]


def test_a_label_ranks_by_its_log_odds(tiny: Tiny, tmp_path: Path) -> None:
    names = ["contradiction", "entailment", "neutral"]
    model = CrossEncoder(labelled(tiny, tmp_path, names))
    assert (model.labels, model.label) == (names, 1)
    logits = model.predict([(QUERY, text) for text in TEXTS]).astype(np.float64)
    for label, name in enumerate(names):
        others = np.delete(logits, label, axis=1)
        expected = logits[:, label] - np.log(np.exp(others).sum(axis=1))
        scores = model.score(QUERY, TEXTS, label=name)
        assert scores.dtype == np.float32
        np.testing.assert_allclose(scores, expected, rtol=0, atol=2e-6 * max(1, np.abs(logits).max()))
        rows = model.rank(QUERY, TEXTS, label=label)
        assert [row["corpus_id"] for row in rows] == np.lexsort((range(len(TEXTS)), -scores)).tolist()
        softmax = np.exp(logits[:, label]) / np.exp(logits).sum(axis=1)
        np.testing.assert_allclose([row["score"] for row in rows], softmax[[r["corpus_id"] for r in rows]], atol=1e-6)
        assert [row["score"] for row in model.rank(QUERY, TEXTS, label=name, raw=True)] == sorted(scores)[::-1]
        np.testing.assert_array_equal(model.predict([(QUERY, t) for t in TEXTS], label=name), logits[:, label])
    assert model.rank(QUERY, TEXTS) == model.rank(QUERY, TEXTS, label="entailment")
    relu = model.rank(QUERY, TEXTS, label=2, activation_fn="relu")
    assert [row["score"] for row in relu] == sorted(np.maximum(logits[:, 2], 0), reverse=True)


def test_independent_labels_rank_by_their_own_logit(tiny: Tiny, tmp_path: Path) -> None:
    model = CrossEncoder(labelled(tiny, tmp_path, ["a", "b"], problem_type="multi_label_classification"), label="b")
    logits = model.predict([(QUERY, text) for text in TEXTS], activation_fn="identity")
    np.testing.assert_array_equal(model.score(QUERY, TEXTS), logits[:, 1])
    np.testing.assert_array_equal(model.score(QUERY, TEXTS, label=0), logits[:, 0])


def test_several_labels_without_a_telling_name_ask_for_one(tiny: Tiny, tmp_path: Path) -> None:
    folder = labelled(tiny, tmp_path, ["LABEL_0", "LABEL_1"])
    model = CrossEncoder(folder)
    for call in (model.score, model.rank):
        with pytest.raises(ValueError, match="one label of the 2 has to be the one that ranks"):
            call(QUERY, TEXTS)
        assert len(call(QUERY, TEXTS, label=1)) == len(TEXTS)
    with pytest.raises(ValueError, match="label must be one of"):
        CrossEncoder(folder, label="relevant")
    np.testing.assert_array_equal(CrossEncoder(folder, label=1).score(QUERY, TEXTS), model.score(QUERY, TEXTS, label=1))


def test_label_scores_of_large_logits_do_not_overflow() -> None:
    scores = label_scores(np.array([[3e38, -3e38], [1e4, 1e4 + 1]], np.float32), 1)
    assert scores.tolist() == [-float(np.finfo(np.float32).max), 1.0]


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_limits_cut_as_texts_that_were_cut_before(tiny: Tiny, family: str) -> None:
    model = CrossEncoder(tiny(family))

    def cut(count: int, left: bool = False) -> list[str]:
        words = [text.split() for text in TEXTS]
        return [" ".join((w[-count:] if left else w[:count]) if w else w) for w in words]

    np.testing.assert_array_equal(model.score(QUERY, TEXTS, max_tokens_per_doc=3), model.score(QUERY, cut(3)))
    assert model.last_usage["truncated"] == 0  # of the texts that were cut before
    left = model.score(QUERY, TEXTS, max_tokens_per_doc=4, truncation_side="left")
    assert model.last_usage["truncated"] == 2
    np.testing.assert_array_equal(left, model.score(QUERY, cut(4, left=True)))
    short = model.score(QUERY, TEXTS, max_tokens_per_query=2)
    assert model.last_usage["query_truncated"]
    np.testing.assert_array_equal(short, model.score("how long", TEXTS))
    limit = 14
    np.testing.assert_array_equal(
        model.score(QUERY, TEXTS, max_length=limit), CrossEncoder(tiny(family), max_length=limit).score(QUERY, TEXTS)
    )
    for options in ({"max_length": limit}, {"max_tokens_per_doc": 3}, {"max_tokens_per_query": 2}):
        with pytest.raises(TooLong, match="truncate=False"):
            model.score(QUERY, TEXTS, truncate=False, **options)
    np.testing.assert_array_equal(model.score(QUERY, TEXTS, truncate=False), model.score(QUERY, TEXTS))
    many = model.score_many([QUERY, "owl"], [TEXTS, TEXTS[:1]], max_tokens_per_doc=3)
    np.testing.assert_array_equal(many[1], model.score("owl", cut(3)[:1]))


@pytest.mark.parametrize("method", ["embedding", "late-interaction"])
def test_limits_of_methods_by_vectors(tiny: Tiny, method: str) -> None:
    model = fastrerank.load(str(tiny("bert")), method=method)
    short = [" ".join(text.split()[-3:]) for text in TEXTS]
    found = model.score(QUERY, TEXTS, max_tokens_per_doc=3, truncation_side="left", max_tokens_per_query=2)
    np.testing.assert_array_equal(found, model.score("how long", short))
    with pytest.raises(TooLong, match=r"texts\[0\] has at least"):
        model.score(QUERY, TEXTS, max_tokens_per_doc=3, truncate=False)
    with pytest.raises(ValueError, match=f"method '{method}' cannot honour instruction"):
        model.score(QUERY, TEXTS, instruction="find")


SILENT = """
kind = "pointwise"
source = "a test"
score = "difference"
labels = ["yes", "no"]
text = "Query: {query} Document: {document} Relevant:\\n"
"""


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pointwise(tmp_path_factory.mktemp("models") / "Qwen3-Reranker-tiny")


def test_an_instruction_of_a_call_equals_that_of_loading(qwen: Path, tmp_path: Path) -> None:
    model = PointwiseReranker(qwen)
    plain = model.score(QUERY, TEXTS)
    for instruction in ("find the answer", "x", "find the answer"):
        expected = PointwiseReranker(qwen, instruction=instruction).score(QUERY, TEXTS)
        np.testing.assert_array_equal(model.score(QUERY, TEXTS, instruction=instruction), expected)
        assert (expected != plain).any()
    np.testing.assert_array_equal(model.score(QUERY, TEXTS), plain)
    (tmp_path / "silent.toml").write_text(SILENT)
    silent = PointwiseReranker(qwen, template=tmp_path / "silent.toml")
    assert model.honoured_options - silent.honoured_options == {"instruction"}  # what /info lists
    with pytest.raises(ValueError, match="no place for an instruction"):
        silent.check_options(instruction="find")


def test_limits_of_prompts(qwen: Path) -> None:
    model = PointwiseReranker(qwen)
    owls = "Owls hunt mice at night. " * 12
    count = len(model.prompts.encode(QUERY, [[owls]])[0].ids)
    expected = PointwiseReranker(qwen, max_length=count - 5).score(QUERY, [owls])
    np.testing.assert_array_equal(model.score(QUERY, [owls], max_length=count - 5), expected)
    assert model.last_usage["truncated"] == 1
    ids = model.prompts.encode(QUERY, [[owls]], limits=TextLimits(max_length=count - 5, truncation_side="left"))[0].ids
    whole = model.prompts.encode(QUERY, [[owls]])[0].ids
    same = next(i for i in range(len(ids)) if ids[i] != whole[i])
    np.testing.assert_array_equal(ids[same:], whole[same + 5 :])  # the document lost its first five tokens
    for options in ({"max_length": count - 5}, {"max_tokens_per_doc": 4}, {"max_tokens_per_query": 1}):
        assert np.isfinite(model.score(QUERY, [owls], **options)).all()
        with pytest.raises(TooLong, match="truncate=False"):
            model.score(QUERY, [owls], truncate=False, **options)
    cut = model.prompts.within("a document", owls, 4, TextLimits())[0]
    np.testing.assert_array_equal(model.score(QUERY, [owls], max_tokens_per_doc=4), model.score(QUERY, [cut]))
    with pytest.raises(ValueError, match="max_length must be at most"):
        model.score(QUERY, [owls], max_length=10**6)


def test_rank_shows_probabilities_and_raw_scores_on_request(qwen: Path) -> None:
    model = PointwiseReranker(qwen)
    raw = model.score(QUERY, TEXTS)
    rows = model.rank(QUERY, TEXTS)
    np.testing.assert_allclose([row["score"] for row in rows], 1 / (1 + np.exp(-np.sort(raw)[::-1])), rtol=1e-6)
    assert [row["score"] for row in model.rank(QUERY, TEXTS, raw=True)] == sorted(raw, reverse=True)
    best = rows[0]["score"]
    assert model.rank(QUERY, TEXTS, score_threshold=best) == [row for row in rows if row["score"] >= best]
    assert model.rank(QUERY, TEXTS, score_threshold=1.5) == []
    with pytest.raises(ValueError, match="score_threshold must be a finite number"):
        model.rank(QUERY, TEXTS, score_threshold=float("nan"))


def test_options_of_methods_that_read_attention(tmp_path: Path) -> None:
    from attention_models import DOCUMENTS, save

    folder = save(tmp_path / "llama", "llama")
    model = AttentionReranker(folder, dtype="float32")
    expected = AttentionReranker(folder, dtype="float32", instruction="qa").score("owls", DOCUMENTS)
    np.testing.assert_array_equal(model.score("owls", DOCUMENTS, instruction="qa"), expected)
    assert (expected != model.score("owls", DOCUMENTS)).any()
    assert len(model.rank("owls", DOCUMENTS, max_tokens_per_doc=2, explain=True)) == len(DOCUMENTS)
    assert model.last_usage["truncated"] > 0
    for options in ({"max_tokens_per_doc": 2}, {"max_tokens_per_query": 1}):
        with pytest.raises(TooLong, match="truncate=False"):
            model.score("owls hunt at night", DOCUMENTS, truncate=False, **options)
    with pytest.raises(ValueError, match="cannot honour truncation_side"):
        model.score("owls", DOCUMENTS, truncation_side="left")


def test_a_pair_that_the_tokenizer_joins_has_no_place_for_an_instruction(tiny: Tiny) -> None:
    model = CrossEncoder(tiny("bert"))
    calls: list[Callable[[], Any]] = [
        lambda: model.score(QUERY, TEXTS, instruction="x"),
        lambda: model.rank(QUERY, TEXTS, instruction="x"),
        lambda: model.predict([(QUERY, LONG)], instruction="x"),
        lambda: model.check_options(instruction="x"),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="instruction is for checkpoints whose chat template renders the pairs"):
            call()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_length": 0}, ValueError, "max_length must be at least 1, got 0"),
        ({"max_tokens_per_doc": -1}, ValueError, "max_tokens_per_doc must be at least 1, got -1"),
        ({"max_tokens_per_query": "5"}, TypeError, "max_tokens_per_query must be an int or None, got str"),
        ({"max_tokens_per_doc": True}, TypeError, "max_tokens_per_doc must be an int"),
        ({"truncation_side": "middle"}, ValueError, "truncation_side must be 'right', 'left' or None, got 'middle'"),
        ({"truncate": 1}, TypeError, "truncate must be True or False, got int"),
        ({"label": 1.5}, TypeError, "label must be a name"),
        ({"instruction": 5}, TypeError, "instruction must be str or None, got int"),
        ({"instructions": "x"}, TypeError, "'instructions' is not an option of a call; there are label, instruction"),
    ],
)
def test_bad_options_are_named(tiny: Tiny, options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = CrossEncoder(tiny("bert"))
    with pytest.raises(error, match=message):
        model.score(QUERY, TEXTS, **options)
    with pytest.raises(error, match=message):
        model.score_many([QUERY], [TEXTS], **options)


def test_options_are_hashable_and_give_their_keywords_back() -> None:
    every = {
        "label": "yes",
        "instruction": "find",
        "max_length": 64,
        "max_tokens_per_doc": 8,
        "max_tokens_per_query": 4,
        "truncation_side": "left",
        "truncate": False,
    }
    options = CallOptions.of(every, list(every), "x")
    assert options.keywords() == every
    assert hash(options) == hash(CallOptions.of(every, list(every), "x"))
    assert options != NO_OPTIONS
    assert CallOptions.of(dict.fromkeys(every) | {"truncate": True}, (), "x") == NO_OPTIONS
    assert NO_OPTIONS.keywords() == {}
