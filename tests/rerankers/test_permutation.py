"""Written rankings: every text gives a complete ranking; a real trace replays to its published quality."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastrerank.evaluation import load_dataset, measure
from fastrerank.rerankers.grouprank import parse_scores
from fastrerank.rerankers.ranking_parser import after_thinking, answer_of, parse_label, parse_permutation
from fastrerank.rerankers.schedules import run_together, sliding_windows, windows

LIKELY = st.lists(
    st.sampled_from(
        [
            "[1]",
            "[2] > ",
            "[03]",
            "[3, 1, 2]",
            "1, ",
            " and ",
            "Document 2",
            "[9]",
            " > ",
            "[",
            "]",
            "B]",
            "[C]",
            "A",
            "7",
            "9" * 50_000,
            "<think>",
            "</think>",
            "<answer>",
            "<answer>" * 5000,
            "</answer>",
            "```json",
            "```",
            '{"[1]": 5, "[2]": "x"}',
            '{"[1]": NaN}',
            "[" * 50_000,
            "1" + " " * 50_000,
            "{",
            "}",
            "٣",
            "\ud800",
            "\n",
        ]
    )
).map("".join)
TEXTS = st.one_of(st.text(), LIKELY)


@pytest.mark.parametrize(
    ("text", "n", "order", "well_formed"),
    [
        ("[3] > [1] > [2]", 3, [2, 0, 1], True),
        ("  [3]>[1]>[2]\n", 3, [2, 0, 1], True),
        ("3 > 1 > 2", 3, [2, 0, 1], True),
        ("3] > [1] > [2]", 3, [2, 0, 1], True),
        ("[3] > [3] > [1]", 3, [2, 0, 1], False),
        ("[3] > [7] > [1]", 3, [2, 0, 1], False),
        ("[2]", 4, [1, 0, 2, 3], False),
        ("[0] > [1]", 2, [0, 1], False),
        ("", 3, [0, 1, 2], False),
        ("I cannot rank these.", 3, [0, 1, 2], False),
        ("The 3 passages: [2] > [1] > [3]", 3, [1, 0, 2], True),
        ("[" + "1" * 10_000 + "]", 2, [0, 1], False),
        ("[12] > [2]", 2, [1, 0], False),
        ("", 0, [], True),
        *[
            (text, 3, [2, 0, 1], True)
            for text in (
                "[3, 1, 2]",
                "[3,1,2]",
                "3, 1, 2",
                "[3 > 1 > 2]",
                "[3 1 2]",
                "[3; 1; 2]",
                "[3, 1 and 2]",
                "[3, 1, and 2]",
                "([3, 1, 2])",
                "[[3], [1], [2]]",
                "[3], 1, 2",
                "[3, 1] > [2]",
                "The order is [3, 1, 2].",
                "[3], [1], [2]",
                '{"ranking": [3, 1, 2]}',
                '["3", "1", "2"]',
                "[\n  3,\n  1,\n  2\n]",
                "3, 1, 2]",
                "[3] and [1, 2]",
                "[Document 3, Document 1, Document 2]",
                "<answer>[3, 1, 2]</answer>",
                "Best first: 3, 1, 2",
                "1. [3]\n2. [1]\n3. [2]",
                "2 of them: [3, 1, 2]",
            )
        ],
        ("[3] , [1]", 3, [2, 0, 1], False),
        ("[2, 2, 1]", 3, [1, 0, 2], False),
        ("in 2020, 3] > [1]", 3, [2, 0, 1], False),
        ("[1]: 3, [2]: 5", 3, [0, 1, 2], False),  # numbers behind colons are scores
        ("[best of 2, 3]", 3, [2, 0, 1], False),
    ],
)
def test_numeric_permutations(text: str, n: int, order: list[int], well_formed: bool) -> None:
    assert parse_permutation(text, n) == (order, well_formed)


@pytest.mark.parametrize(
    ("text", "n", "order", "well_formed"),
    [
        ("[C] > [A] > [B]", 3, [2, 0, 1], True),
        ("C] > [A] > [B]", 3, [2, 0, 1], True),
        ("C > A > B", 3, [2, 0, 1], True),
        ("Ranking: [C] > [A] > [B]", 3, [2, 0, 1], True),
        ("[C] > [D]", 3, [2, 0, 1], False),
        ("[BC] > [A]", 3, [0, 1, 2], False),
        ("[C, A, B]", 3, [2, 0, 1], True),
        ("A good order: [C, A, B]", 3, [2, 0, 1], True),
        ("[Passage C, Passage A, Passage B]", 3, [2, 0, 1], True),
        ("[A good one] > [B]", 3, [1, 0, 2], False),
        ("because", 2, [0, 1], False),
    ],
)
def test_alphabetic_permutations(text: str, n: int, order: list[int], well_formed: bool) -> None:
    assert parse_permutation(text, n, "alphabetic") == (order, well_formed)


@given(text=TEXTS, n=st.integers(0, 26), identifiers=st.sampled_from(["numeric", "alphabetic"]))
def test_any_text_gives_a_permutation(text: str, n: int, identifiers: str) -> None:
    order, _ = parse_permutation(answer_of(text)[0], n, identifiers)
    assert sorted(order) == list(range(n))


@given(order=st.permutations(range(20)))
def test_written_permutations_are_read_back(order: list[int]) -> None:
    assert parse_permutation(" > ".join(f"[{i + 1}]" for i in order), 20) == (order, True)
    letters = " > ".join(f"[{chr(65 + i)}]" for i in order)
    assert parse_permutation(letters, 20, "alphabetic") == (order, True)


@given(text=TEXTS, n=st.integers(1, 26))
def test_any_text_gives_a_label_and_scores(text: str, n: int) -> None:
    assert 0 <= parse_label(text, n)[0] < n
    scores, well_formed = parse_scores(text, n)
    assert len(scores) == n
    assert all(score is None or 0.0 <= score <= 1.0 for score in scores)
    assert not (well_formed and None in scores)


def test_answers_behind_thoughts() -> None:
    assert answer_of("<think>[1] > [2]</think><answer> [2] > [1] </answer>") == (" [2] > [1] ", True)
    assert answer_of("<think>so <answer>[1]</answer></think> [2] > [1]") == (" [2] > [1]", False)
    assert answer_of("<answer>[1]</answer> no: <answer>[2]</answer>") == ("[2]", True)
    assert answer_of("<think>long</think><answer>[2] > [1]") == ("[2] > [1]", True)
    assert answer_of("[2] > [1]") == ("[2] > [1]", False)
    assert after_thinking("<think>[1]</think>\n[2]") == "\n[2]"
    assert after_thinking("[2]") == "[2]"


@pytest.mark.parametrize(
    ("text", "best"),
    [
        ("<think>[1]?</think>\n<answer>[3]</answer>", (2, True)),
        ("<think>[1]?</think> <ANSWER> [2] </ANSWER>", (1, True)),
        ("<answer>3</answer>", (2, True)),
        ("<answer>[2] or [3]</answer>", (1, False)),
        ("[2]", (1, False)),
        ("<answer>[8]</answer>", (0, False)),
        ("no idea", (0, False)),
    ],
)
def test_labels(text: str, best: tuple[int, bool]) -> None:
    assert parse_label(text, 3) == best


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ('<reason>r</reason><answer>```json\n{"[1]": 5, "[2]": 10, "[3]": 0}\n```</answer>', ([0.5, 1.0, 0.0], True)),
        ('{"1": 5, "2": 2.5, "3": 0}', ([0.5, 0.25, 0.0], True)),
        ('```\n{"[1]": 5}\n```', ([0.5, None, None], False)),
        ('{"[1]": 5, "[2]": "high", "[3]": true}', ([0.5, None, None], False)),
        ('{"[1]": 50, "[2]": -1, "[3]": 1}', ([1.0, 0.0, 0.1], False)),
        ('{"[1]": 5, "[2]": NaN, "[3]": 1}', ([0.5, None, 0.1], False)),
        ('{"[1]": 5, "[2]": 1, "[4]": 1}', ([0.5, 0.1, None], False)),
        ("[5, 3, 1]", ([0.0, 0.0, 0.0], False)),
        ("no JSON", ([0.0, 0.0, 0.0], False)),
        ('{"[1]": 5,', ([0.0, 0.0, 0.0], False)),
        ("1" + "0" * 5000, ([0.0, 0.0, 0.0], False)),
        ('{"[1]": 1' + "0" * 400 + ', "[2]": 1, "[3]": 1}', ([None, 0.1, 0.1], False)),
    ],
)
def test_scores(text: str, scores: tuple[list[float | None], bool]) -> None:
    assert parse_scores(text, 3) == scores


def test_unknown_identifiers_are_refused() -> None:
    with pytest.raises(ValueError, match="'numeric' or 'alphabetic'"):
        parse_permutation("[1]", 1, "roman")
    with pytest.raises(ValueError, match="26 letters cannot name 27"):
        parse_permutation("[A]", 27, "alphabetic")


def rows(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def test_rankvicuna_trace_replays(data_folder: Path) -> None:
    """387 responses of a 7B model, all queries in lockstep: window, parser and order give the recorded ranking."""
    pytest.importorskip("ir_measures")
    traces = rows(data_folder / "dl19-rankvicuna-listwise-trace.jsonl.gz")
    queries = {query.qid: query for query in load_dataset(data_folder / "dl19-passage-bm25-top100.jsonl.gz")}
    counts = [len(queries[trace["qid"]].candidates) for trace in traces]
    for trace, n in zip(traces, counts, strict=True):
        assert [(window["start"], window["end"]) for window in trace["windows"]] == windows(n)
    step = [0] * len(traces)
    formed = []

    def ask(questions: list[tuple[int, tuple[int, ...]]]) -> list[list[int]]:
        answers = []
        for query, shown in questions:
            window = traces[query]["windows"][step[query]]
            step[query] += 1
            order, well_formed = parse_permutation(window["response"], len(shown))
            formed.append(well_formed == window["wellformed"])
            answers.append(order)
        return answers

    rankings, steps = run_together([sliding_windows(n) for n in counts], ask)
    assert steps == 9
    assert sum(step) == 387
    run = {}
    for trace, ranking in zip(traces, rankings, strict=True):
        docids = [candidate.docid for candidate in queries[trace["qid"]].candidates]
        run[trace["qid"]] = [(docids[i], -rank) for rank, i in enumerate(ranking.order)]
        assert [docid for docid, _ in run[trace["qid"]]] == trace["final_docids"]
    values = measure(run, {qid: query.judgements for qid, query in queries.items()})
    assert round(sum(value["nDCG@10"] for value in values.values()) / len(values), 4) == 0.6682
    assert all(formed)
