"""Listwise rerankers over a fake model: windows, readouts, what is counted, what is refused."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import list_fakes as fakes
import numpy as np
import pytest
from list_fakes import Build, by_relevance, documents, order_of

from fastrerank import ListwiseReranker
from fastrerank.rerankers.schedules import windows

QUERY = "who?"


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Build:
    return fakes.builder(monkeypatch, tmp_path)


@pytest.mark.parametrize("n", [1, 2, 19, 20])
def test_one_window_scores_the_identifiers_logits(build: Build, n: int) -> None:
    reranker = build(ListwiseReranker)
    texts = documents(n)
    scores = reranker.score(QUERY, texts)
    assert scores.dtype == np.float32
    assert scores.tolist() == [fakes.relevance(text) for text in texts]
    assert order_of(reranker.rank(QUERY, texts)) == by_relevance(texts)
    usage = reranker.last_usage
    assert (usage["steps"], usage["comparisons"], usage["forwards"], usage["tokens"]) == (1, 1, 1, n + 1)


@pytest.mark.parametrize(("n", "count"), [(21, 2), (30, 2), (40, 3), (95, 9), (100, 9)])
def test_windows_score_by_rank(build: Build, n: int, count: int) -> None:
    reranker = build(ListwiseReranker)
    texts = documents(n)
    scores = reranker.score(QUERY, texts)
    assert sorted(scores.tolist()) == list(range(1, n + 1))
    order = order_of(reranker.rank(QUERY, texts))
    assert order[:10] == by_relevance(texts)[:10]
    assert [scores[i] for i in order] == sorted(scores.tolist(), reverse=True)
    usage = reranker.last_usage
    assert (usage["steps"], usage["comparisons"], usage["forwards"], usage["untouched"]) == (count, count, count, 0)
    assert max(len(ids) for ids in reranker.model.seen) == 21


@pytest.mark.parametrize("options", [{}, {"write": True}, {"template": "reasonrank", "write": True}])
def test_ranking_equals_windows_one_after_the_other(build: Build, options: dict[str, Any]) -> None:
    """With a model whose answers depend on the whole window, against the loop written out."""
    reranker = build(ListwiseReranker, noise=20.0, window=8, stride=3, **options)
    texts = documents(40, seed=3)
    order = list(range(40))
    for begin, end in windows(40, 8, 3):
        shown = order[begin:end]
        values = np.array(reranker.model._values([QUERY, *(texts[i] for i in shown)]), np.float32)
        order[begin:end] = [shown[i] for i in np.argsort(-values, kind="stable")]
    assert order_of(reranker.rank(QUERY, texts)) == order
    assert reranker.last_usage["unparsed"] == 0


@pytest.mark.parametrize(
    "options", [{}, {"write": True}, {"write": True, "template": "grouprank"}, {"window_rule": "rankgpt"}]
)
def test_many_queries_equal_one_at_a_time(build: Build, options: dict[str, Any]) -> None:
    reranker = build(ListwiseReranker, noise=9.0, window=6, stride=4, **options)
    queries = [f"query {'x' * i}" for i in range(6)]
    lists = [documents(n, seed=n) for n in (0, 1, 5, 6, 17, 30)]
    together = reranker.score_many(queries, lists)
    usage, calls = reranker.last_usage, list(reranker.model.calls)
    alone, steps, comparisons = [], [], 0
    for query, texts in zip(queries, lists, strict=True):
        alone.append(reranker.score(query, texts))
        steps.append(reranker.last_usage["steps"])
        comparisons += reranker.last_usage["comparisons"]
    assert all(np.array_equal(a, b) for a, b in zip(together, alone, strict=True))
    assert usage["steps"] == max(steps) == len([count for count in calls if count])
    assert usage["comparisons"] == comparisons


def test_empty_and_odd_lists(build: Build) -> None:
    reranker = build(ListwiseReranker)
    assert reranker.score(QUERY, []).shape == (0,)
    assert reranker.rank(QUERY, []) == []
    assert reranker.score_many([], []) == []
    assert reranker.last_usage["comparisons"] == 0
    assert order_of(reranker.rank(QUERY, ["", "a 3", "a 3", ""])) == [1, 2, 0, 3]
    assert order_of(reranker.rank(QUERY, ["same"] * 45)) == list(range(45))
    assert reranker.rank(QUERY, documents(30), top_k=2, return_documents=True)[0]["text"] == "text 29"
    assert reranker.score(QUERY, ["7 " + "x" * 200, "1"]).tolist() == [7.0, 1.0]
    assert reranker.last_usage["truncated"] == 1


def test_rankgpt_rule_is_followed_and_reported(build: Build, caplog: pytest.LogCaptureFixture) -> None:
    reranker = build(ListwiseReranker, window_rule="rankgpt")
    texts = documents(95)
    with caplog.at_level(logging.WARNING, "fastrerank"):
        order = order_of(reranker.rank(QUERY, texts))
    assert order[:5] == [0, 1, 2, 3, 4]
    assert reranker.last_usage["untouched"] == 5
    assert "no window over 5 documents" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "fastrerank"):
        reranker.rank(QUERY, documents(100))
        reranker.rank(QUERY, documents(7))
    assert reranker.last_usage["untouched"] == 0
    assert not caplog.text


@pytest.mark.parametrize("template", ["first", "rankgpt", "reasonrank"])
def test_written_rankings(build: Build, template: str) -> None:
    reranker = build(ListwiseReranker, template=template, write=True)
    texts = documents(30)
    assert order_of(reranker.rank(QUERY, texts))[:10] == by_relevance(texts)[:10]
    usage = reranker.last_usage
    assert (usage["steps"], usage["comparisons"], usage["unparsed"], usage["forwards"]) == (2, 2, 0, 0)
    assert usage["tokens"] == 2 * 21
    assert reranker.score(QUERY, ["alone"]).tolist() == [1.0]  # no model needed
    assert reranker.last_usage["comparisons"] == 0
    assert reranker.score(QUERY, texts[:3]).tolist() == [3.0 - by_relevance(texts[:3]).index(i) for i in range(3)]


def test_unreadable_texts_are_counted_and_rank_all_the_same(build: Build, caplog: pytest.LogCaptureFixture) -> None:
    answers = random.Random(1)
    garbage = ["", "I cannot.", "[3] > [3] > [99]", "[2", "9" * 5000, "<think>", "[1] > [2] > [3] > [4]"]
    reranker = build(
        ListwiseReranker,
        template="rankgpt",
        window=4,
        stride=2,
        generate=lambda prompts: [answers.choice(garbage) for _ in prompts],
    )
    with caplog.at_level(logging.WARNING, "fastrerank"):
        assert sorted(order_of(reranker.rank(QUERY, documents(30)))) == list(range(30))
    usage = reranker.last_usage
    assert 0 < usage["unparsed"] <= usage["comparisons"] == len(windows(30, 4, 2))
    assert f"{usage['unparsed']} of {usage['comparisons']} answers" in caplog.text
    silent = build(ListwiseReranker, template="rankgpt", generate=lambda prompts: [""] * len(prompts))
    assert order_of(silent.rank(QUERY, documents(30))) == list(range(30))
    assert silent.last_usage["unparsed"] == 2


def test_generate_must_answer_every_prompt(build: Build) -> None:
    for answer in (lambda _: [], lambda prompts: [None] * len(prompts)):
        reranker = build(ListwiseReranker, template="rankgpt", generate=answer)
        with pytest.raises(ValueError, match="one str per prompt"):
            reranker.rank(QUERY, documents(3))


def test_insertrank_prints_first_stage_scores(build: Build) -> None:
    reranker = build(ListwiseReranker, template="insertrank", write=True)
    texts = documents(25)
    first = [20.0 - i / 3 for i in range(25)]
    rows = reranker.rank(QUERY, texts, first_stage=first)
    assert order_of(rows)[:5] == by_relevance(texts)[:5]
    for prompt in reranker.model.seen:
        assert prompt.notes == tuple(f"{first[texts.index(text)]:.3f}" for text in prompt.documents)
    (scores,) = reranker.score_many([QUERY], [texts], first_stage=[first])
    assert np.array_equal(scores, reranker.score(QUERY, texts, first_stage=np.array(first)))
    with pytest.raises(ValueError, match="pass first_stage="):
        reranker.score(QUERY, texts)
    with pytest.raises(ValueError, match="25 finite numbers"):
        reranker.score(QUERY, texts, first_stage=first[1:])
    with pytest.raises(ValueError, match="NaN or infinity"):
        reranker.score(QUERY, texts, first_stage=[float("nan"), *first[1:]])
    with pytest.raises(ValueError, match="one list per query"):
        reranker.score_many([QUERY], [texts], first_stage=[first, first])
    with pytest.raises(ValueError, match="does not print scores"):
        build(ListwiseReranker).score(QUERY, texts, first_stage=first)


def test_grouprank_mixes_groups_with_the_first_stage(build: Build) -> None:
    reranker = build(ListwiseReranker, template="grouprank", window=10, write=True, epochs=3)
    texts = [f"text {number % 11}" for number in range(25)]
    expected = np.array([number % 11 for number in range(25)]) / 10
    assert reranker.score(QUERY, texts) == pytest.approx(expected.astype(np.float32))
    usage = reranker.last_usage
    assert (usage["steps"], usage["comparisons"], usage["unparsed"]) == (1, 9, 0)
    assert sorted(len(prompt.documents) for prompt in reranker.model.seen) == [5] * 3 + [10] * 6
    first = np.linspace(0, 1, 25)
    assert reranker.score(QUERY, texts, first_stage=first) == pytest.approx(0.6 * expected + 0.4 * first, abs=1e-6)
    broken = build(ListwiseReranker, template="grouprank", generate=lambda prompts: ["?"] * len(prompts))
    assert broken.score(QUERY, texts).tolist() == [0.0] * 25
    assert broken.last_usage["unparsed"] == broken.last_usage["comparisons"] == 4


def test_group_shuffles_depend_on_query_and_seed_alone(build: Build) -> None:
    def shown(seed: int, queries: list[str]) -> set[tuple[str, ...]]:
        reranker = build(ListwiseReranker, template="grouprank", window=5, write=True, seed=seed)
        reranker.score_many(queries, [documents(12)] * len(queries))
        return {(prompt.query, *prompt.documents) for prompt in reranker.model.seen}

    assert shown(1, ["a", "b"]) == shown(1, ["b", "a"])
    assert shown(1, ["a"]) <= shown(1, ["b", "a"])
    assert shown(1, ["a"]) != shown(2, ["a"])
    assert len(shown(1, ["\ud800"])) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 1}, "window must be"),
        ({"window": 10, "stride": 10}, "stride must be an int from 1 to window - 1 = 9"),
        ({"stride": 0}, "stride must be"),
        ({"window_rule": "zigzag"}, "'rank_llm', 'rankgpt'"),
        ({"window": 27}, "27 documents in a prompt .*26 letters"),
        ({"window": 27, "write": True}, "27 documents in a prompt .*26 letters"),
        ({"template": "rankgpt", "readout": "logits"}, "20 documents in a prompt .*from 10 on, numbers are several"),
        ({"template": "prp"}, "pairwise"),
        ({"readout": "guess"}, "readout must be"),
        ({"algorithm": "groups"}, "readout='generation'"),
        ({"algorithm": "heap"}, "algorithm must be"),
        ({"epochs": 0}, "epochs must be"),
        ({"seed": -1}, "seed must be"),
        ({"write": True, "readout": "logits"}, "readout must be"),
        ({"write": True, "device": "cpu"}, "without device"),
        ({"readout": "generation", "num_threads": 1}, "does not use num_threads"),
        ({"max_new_tokens": 5}, "max_new_tokens is for"),
        ({"readout": "generation", "max_new_tokens": 4096}, "from 1 to 4095"),
    ],
)
def test_what_cannot_rank_is_refused_by_name(build: Build, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(ListwiseReranker, **options)


def test_generate_must_be_callable(build: Build) -> None:
    with pytest.raises(TypeError, match="callable"):
        build(ListwiseReranker, template="rankgpt", generate="text")


def test_digits_name_up_to_nine_by_logits(build: Build) -> None:
    reranker = build(ListwiseReranker, template="rankgpt", readout="logits", window=9, stride=4)
    texts = documents(30)
    assert order_of(reranker.rank(QUERY, texts))[:5] == by_relevance(texts)[:5]
    assert reranker.template.readout == "logits"


def test_damaged_logits_are_an_error(build: Build) -> None:
    reranker = build(ListwiseReranker)
    texts = documents(30)
    texts[15] = "text 1" + "0" * 400  # infinite
    with pytest.raises(FloatingPointError, match=r"documents \[.*15.*\] of query 0"):
        reranker.score(QUERY, texts)


def test_the_checkpoint_itself_writes(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `generate`, the generator gets what the template needs and the prompts leave it room."""
    made: dict[str, Any] = {}

    class Writer:
        def __init__(self, model: Any, **options: Any) -> None:
            made.update(options, model=model)

        def __call__(self, prompts: Any) -> list[str]:
            return [" > ".join(f"[{i}]" for i in range(len(prompt.documents), 0, -1)) for prompt in prompts]

    monkeypatch.setattr("fastrerank.rerankers.list_questions.TransformersGenerator", Writer)
    reranker = build(ListwiseReranker, template="reasonrank")
    assert (made["max_new_tokens"], made["stop"], reranker.max_length) == (3172, ("</answer>",), 4096 - 3172)
    assert order_of(reranker.rank(QUERY, documents(5))) == [4, 3, 2, 1, 0]
    reranker = build(ListwiseReranker, template="rankgpt", max_new_tokens=100, max_length=500)
    assert (made["max_new_tokens"], made["stop"], reranker.max_length) == (100, (), 500)
