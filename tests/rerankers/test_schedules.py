"""Ranking algorithms against their sequential forms, for consistent and inconsistent answers."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrerank.rerankers.grouprank import groups
from fastrerank.rerankers.schedules import (
    Schedule,
    all_pairs,
    heapsort,
    run_together,
    setwise,
    sliding,
    sliding_windows,
    untouched,
    windows,
)

Won = Callable[[int, int], float]
SIZES = st.integers(0, 40)
SEEDS = st.integers(0, 2**32)
KINDS = st.sampled_from(["consistent", "grades", "random", "soft", "ties"])


def comparator(kind: str, seed: int, n: int) -> Won:
    """How far i wins against j: from an order, from grades with ties, or without any order (intransitive)."""
    values = list(range(n))
    random.Random(seed).shuffle(values)
    if kind == "grades":
        values = [value // 4 for value in values]

    def won(i: int, j: int) -> float:
        if kind in ("consistent", "grades"):
            return 0.5 + 0.5 * ((values[i] > values[j]) - (values[i] < values[j]))
        drawn = random.Random(f"{seed} {min(i, j)} {max(i, j)}")
        p = {"random": drawn.choice([0.0, 0.5, 1.0]), "soft": drawn.random(), "ties": 0.5}[kind]
        return p if i < j else 1.0 - p

    return won


def drive(schedule: Schedule[Any, Any], answer: Callable[[Any], Any]) -> tuple[list[int], list[Any], int]:
    """(order, all questions, steps) of one schedule."""
    asked: list[Any] = []

    def ask(questions: list[tuple[int, Any]]) -> list[Any]:
        asked.extend(question for _, question in questions)
        return [answer(question) for _, question in questions]

    (ranking,), steps = run_together([schedule], ask)
    assert sorted(ranking.order) == list(range(len(ranking.order)))
    assert ranking.order == sorted(range(len(ranking.order)), key=lambda i: (-ranking.scores[i], i))
    return ranking.order, asked, steps


def with_rest(top: list[int], n: int) -> list[int]:
    return top + [i for i in range(n) if i not in top]


def plain_heapsort(n: int, k: int, best_of: Callable[[Sequence[int]], int], arity: int) -> list[int]:
    """The textbook form: sift down from the last parent, then swap the root to the end k times."""
    heap = list(range(n))

    def sift(place: int, size: int) -> None:
        while children := range(arity * place + 1, min(arity * place + arity + 1, size)):
            places = [place, *children]
            best = places[best_of([heap[i] for i in places])]
            if best == place:
                return
            heap[place], heap[best] = heap[best], heap[place]
            place = best

    for place in range(n // arity, -1, -1):
        sift(place, n)
    top = []
    for size in range(n, max(n - k, 0), -1):
        top.append(heap[0])
        heap[0] = heap[size - 1]
        sift(0, size - 1)
    return with_rest(top, n)


def best_by(won: Won, asked: set[tuple[int, int]]) -> Callable[[Sequence[int]], int]:
    def best_of(documents: Sequence[int]) -> int:
        best = 0
        for i in range(1, len(documents)):
            asked.add((min(documents[i], documents[best]), max(documents[i], documents[best])))
            if won(documents[i], documents[best]) > 0.5:
                best = i
        return best

    return best_of


def plain_bubble(n: int, passes: int, won: Won) -> tuple[list[int], int]:
    """Bubble passes with the published skipping of the tail that the last pass left untouched."""
    order, last, compared = list(range(n)), n - 1, 0
    for done in range(min(passes, n)):
        place, changed = last, False
        while place > done:
            compared += 1
            if won(order[place], order[place - 1]) > 0.5:
                order[place - 1], order[place] = order[place], order[place - 1]
                if not changed:
                    changed = True
                    last += last != n - 1
            if not changed:
                last -= 1
            place -= 1
    return order, compared


@pytest.mark.parametrize(
    ("n", "count"), [(20, 1), (30, 2), (40, 3), (95, 9), (100, 9), (1, 1), (10, 1), (7, 1), (0, 0)]
)
def test_window_counts(n: int, count: int) -> None:
    spans = windows(n)
    assert len(spans) == count
    assert untouched(n) == 0
    if n == 95:
        assert spans[-1] == (0, 15)


def test_rankgpt_rule_leaves_the_head() -> None:
    assert windows(100, rule="rankgpt") == windows(100)
    assert windows(95, rule="rankgpt") == windows(95)[:-1]
    assert untouched(95, rule="rankgpt") == 5
    assert untouched(12, rule="rankgpt") == 0
    order, _, _ = drive(sliding_windows(95, rule="rankgpt"), lambda shown: list(range(len(shown)))[::-1])
    assert order[:5] == [0, 1, 2, 3, 4]


@given(n=st.integers(1, 120), window=st.integers(2, 26), data=st.data())
def test_windows_follow_the_published_loops(n: int, window: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, window - 1))
    wide = min(window, n)
    published = []
    begin, end = n - wide, n
    while end > 0 and begin + stride != 0:
        begin = max(begin, 0)
        published.append((begin, end))
        begin, end = begin - stride, end - stride
    # The published loop ranks no window at all where the first one starts at the head and is not longer than a stride.
    assert windows(n, window, stride) == (published or [(0, n)])
    whole = [(begin, begin + wide) for begin in range(n - wide, -1, -stride)]
    assert windows(n, window, stride, "rankgpt") == (whole if n > window else [(0, n)])
    assert untouched(n, window, stride, "rankgpt") == (n - wide) % stride


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((1, 1), "window"),
        ((True, 1), "window"),
        ((20, 20), "stride"),
        ((20, 0), "stride"),
        ((20, 10, "zigzag"), "rankgpt"),
    ],
)
def test_bad_windows_are_named(arguments: tuple[Any, ...], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        windows(50, *arguments)


@given(n=SIZES, seed=SEEDS)
def test_windows_carry_the_best_to_the_head(n: int, seed: int) -> None:
    values = list(range(n))
    random.Random(seed).shuffle(values)
    order, asked, steps = drive(
        sliding_windows(n, 8, 4), lambda shown: sorted(range(len(shown)), key=lambda i: -values[shown[i]])
    )
    best = sorted(range(n), key=lambda i: -values[i])
    assert order[:4] == best[:4]
    assert steps == len(asked) == len(windows(n, 8, 4))


def test_answers_that_are_no_permutation_are_refused() -> None:
    with pytest.raises(ValueError, match="permute"):
        drive(sliding_windows(3), lambda _: [0, 0, 1])
    with pytest.raises(ValueError, match="number 5"):
        drive(setwise(3), lambda _: 5)
    with pytest.raises(ValueError, match="one answer per question: 3, got 2"):
        run_together([all_pairs(3)], lambda questions: [0.5] * (len(questions) - 1))


@given(n=SIZES, seed=SEEDS, kind=KINDS)
def test_all_pairs_sums_what_each_won(n: int, seed: int, kind: str) -> None:
    won = comparator(kind, seed, n)
    order, asked, steps = drive(all_pairs(n), lambda pair: won(*pair))
    credit = [
        sum(won(min(i, j), max(i, j)) if i < j else 1.0 - won(j, i) for j in range(n) if j != i) for i in range(n)
    ]
    assert len(asked) == n * (n - 1) // 2
    assert steps == (n > 1)
    if kind != "soft":  # halves add exactly
        assert order == sorted(range(n), key=lambda i: (-credit[i], i))
    if kind == "ties":
        assert order == list(range(n))
    if kind == "consistent":
        assert all(won(above, below) == 1.0 for above, below in pairwise(order))


@given(n=SIZES, k=st.integers(1, 45), seed=SEEDS, kind=KINDS)
@settings(max_examples=300)
def test_heapsort_decides_as_the_sequential_one(n: int, k: int, seed: int, kind: str) -> None:
    won = comparator(kind, seed, n)
    compared: set[tuple[int, int]] = set()
    order, asked, _ = drive(heapsort(n, k), lambda pair: won(*pair))
    assert order == plain_heapsort(n, k, best_by(won, compared), 2)
    assert len(set(asked)) == len(asked)
    assert all(i < j for i, j in asked)
    if kind == "consistent":
        best = sorted(range(n), key=lambda i: sum(won(j, i) for j in range(n) if j != i))
        assert order[:k] == best[:k]


@pytest.mark.parametrize("kind", ["consistent", "grades", "random", "soft", "ties"])
def test_heapsort_takes_few_steps(kind: str) -> None:
    for seed in range(40):
        won = comparator(kind, seed, 100)
        compared: set[tuple[int, int]] = set()
        plain_heapsort(100, 10, best_by(won, compared), 2)
        _, asked, steps = drive(heapsort(100, 10), lambda pair, won=won: won(*pair))
        assert steps <= 80
        # What is asked ahead of need: at most one comparison for each of the extraction's two upper levels.
        assert len(asked) <= len(compared) + 2 * 10 + 4


@pytest.mark.parametrize("values", [range(100), range(100, 0, -1), [i % 2 for i in range(100)]])
def test_heapsort_takes_few_steps_on_sorted_lists(values: Sequence[int]) -> None:
    def won(pair: tuple[int, int]) -> float:
        return 0.5 + 0.5 * ((values[pair[0]] > values[pair[1]]) - (values[pair[0]] < values[pair[1]]))

    assert drive(heapsort(100, 10), won)[2] <= 80


@given(share=st.floats(0, 1), seed=SEEDS)
@settings(max_examples=60)
def test_heapsort_takes_few_steps_whatever_is_answered(share: float, seed: int) -> None:
    drawn = random.Random(seed)
    assert drive(heapsort(100, 10), lambda _: float(drawn.random() < share))[2] <= 80


@given(n=SIZES, passes=st.integers(1, 45), seed=SEEDS, kind=KINDS)
@settings(max_examples=200)
def test_sliding_decides_as_the_sequential_one(n: int, passes: int, seed: int, kind: str) -> None:
    won = comparator(kind, seed, n)
    order, asked, steps = drive(sliding(n, passes), lambda pair: won(*pair))
    expected, compared = plain_bubble(n, passes, won)
    assert order == expected
    assert len(set(asked)) == len(asked) <= compared
    assert steps <= max(0, n - 1) + 2 * max(0, min(passes, n - 1) - 1)
    if kind == "consistent":
        best = sorted(range(n), key=lambda i: sum(won(j, i) for j in range(n) if j != i))
        assert order[:passes] == best[:passes]


def test_sliding_counts() -> None:
    order, asked, steps = drive(sliding(100, 10), lambda _: 0.0)  # every lower document wins
    assert (order[:10], len(asked)) == (list(range(99, 89, -1)), sum(99 - i for i in range(10)))
    assert steps <= 117
    assert len(drive(sliding(100, 10), lambda _: 1.0)[1]) == 99  # one pass finds nothing to do


@given(n=SIZES, k=st.integers(1, 45), size=st.integers(2, 20), seed=SEEDS, consistent=st.booleans())
@settings(max_examples=200)
def test_setwise_decides_as_the_sequential_one(n: int, k: int, size: int, seed: int, consistent: bool) -> None:
    values = list(range(n))
    random.Random(seed).shuffle(values)

    def best_of(documents: Sequence[int]) -> int:
        if consistent:
            return max(range(len(documents)), key=lambda i: values[documents[i]])
        return random.Random(f"{seed} {list(documents)}").randrange(len(documents))

    order, asked, _ = drive(setwise(n, k, size), best_of)
    assert order == plain_heapsort(n, k, best_of, size - 1)
    assert len(set(asked)) == len(asked)
    assert all(2 <= len(documents) <= size for documents in asked)
    if consistent:
        assert order[:k] == sorted(range(n), key=lambda i: -values[i])[:k]


@pytest.mark.parametrize(("size", "most"), [(4, 90), (10, 40), (20, 30)])
def test_setwise_counts(size: int, most: int) -> None:
    for seed in range(10):
        values = random.Random(seed).sample(range(100), 100)
        _, asked, steps = drive(
            setwise(100, 10, size), lambda shown, v=values: max(range(len(shown)), key=lambda i: v[shown[i]])
        )
        assert steps <= len(asked) <= most


@given(n=SIZES, size=st.integers(1, 25), epochs=st.integers(1, 3), seed=SEEDS)
def test_groups_average_over_epochs(n: int, size: int, epochs: int, seed: int) -> None:
    values = [random.Random(f"{seed} {i}").random() for i in range(n)]
    asked: list[tuple[int, ...]] = []

    def ask(questions: list[tuple[int, tuple[int, ...]]]) -> list[list[float | None]]:
        asked.extend(shown for _, shown in questions)
        return [[values[i] if i % 5 else None for i in shown] for _, shown in questions]

    (ranking,), steps = run_together([groups(n, size, epochs, seed, values, 0.6)], ask)
    assert steps == (n > 0)
    assert sorted(i for shown in asked for i in shown) == sorted(list(range(n)) * epochs)
    assert len(asked) == epochs * -(-n // size)
    assert ranking.scores == pytest.approx([0.6 * (v if i % 5 else 0.0) + 0.4 * v for i, v in enumerate(values)])
    assert run_together([groups(n, size, epochs, seed)], lambda q: [[0.0] * len(s) for _, s in q])[0][0].order == list(
        range(n)
    )


def test_groups_depend_on_the_seed_alone() -> None:
    def shown(seed: int) -> list[Any]:
        return drive(groups(30, 10, 2, seed), lambda some: [0.5] * len(some))[1]

    assert shown(7) == shown(7)
    assert shown(7) != shown(8)


@given(
    sizes=st.lists(st.integers(0, 15), max_size=6),
    seed=SEEDS,
    kind=KINDS,
    name=st.sampled_from(["heap", "bubble", "all"]),
)
def test_many_queries_together_equal_one_at_a_time(sizes: list[int], seed: int, kind: str, name: str) -> None:
    make = {"heap": lambda n: heapsort(n, 4), "bubble": lambda n: sliding(n, 4), "all": all_pairs}[name]
    won = [comparator(kind, seed + i, n) for i, n in enumerate(sizes)]
    calls = []

    def ask(questions: list[tuple[int, tuple[int, int]]]) -> list[float]:
        calls.append(questions)
        return [won[query](*pair) for query, pair in questions]

    rankings, steps = run_together([make(n) for n in sizes], ask)
    alone = [drive(make(n), lambda pair, i=i: won[i](*pair)) for i, n in enumerate(sizes)]
    assert [ranking.order for ranking in rankings] == [order for order, _, _ in alone]
    assert steps == len(calls) == max([steps for _, _, steps in alone], default=0)
    assert sorted(q for call in calls for q in call) == sorted(
        (i, pair) for i, (_, asked, _) in enumerate(alone) for pair in asked
    )
