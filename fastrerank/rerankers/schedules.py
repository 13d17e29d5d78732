"""Ranking algorithms without a model: each yields batches of independent questions and returns a ranking.

A schedule is a generator. It yields a list of questions that do not depend on each other, is sent the list of their
answers, and returns a `Ranking`. Documents are numbers 0..N-1 in first-stage order. Whoever drives it decides what a
question costs; `run_together` drives the schedules of many queries so that each step is one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Iterable, Sequence
from itertools import combinations
from typing import NamedTuple, TypeVar

from fastrerank.rerankers.heap import heap_top

__all__ = [
    "WINDOW_RULES",
    "Ranking",
    "Schedule",
    "all_pairs",
    "check_windows",
    "heapsort",
    "run_together",
    "setwise",
    "sliding",
    "sliding_windows",
    "untouched",
    "windows",
]

WINDOW_RULES = ("rank_llm", "rankgpt")

Q = TypeVar("Q", bound=Hashable)
A = TypeVar("A")
Pair = tuple[int, int]
Documents = tuple[int, ...]


class Ranking(NamedTuple):
    """`order`: documents, best first. `scores`: one per document, never rising along `order`."""

    order: list[int]
    scores: list[float]


Schedule = Generator[list[Q], Sequence[A], Ranking]


def run_together(
    schedules: Sequence[Schedule[Q, A]], ask: Callable[[list[tuple[int, Q]]], Sequence[A]]
) -> tuple[list[Ranking], int]:
    """Equal to driving each schedule alone; every step asks the open questions of all of them in one call.

    Args:
        schedules: generators that have not started.
        ask: gets (number of the schedule, question) pairs, returns one answer each.

    Returns the rankings and the number of steps, which is that of the longest schedule.
    Raises ValueError if `ask` returns another number of answers.

    Example:
        >>> run_together([heapsort(3, 1)], lambda questions: [float(a > b) for _, (a, b) in questions])[0][0].order
        [2, 0, 1]
    """
    rankings: list[Ranking | None] = [None] * len(schedules)
    open_questions: dict[int, list[Q]] = {}

    def advance(i: int, answers: Sequence[A] | None) -> None:
        try:
            questions = next(schedules[i]) if answers is None else schedules[i].send(answers)
            while not questions:
                questions = schedules[i].send([])
        except StopIteration as stop:
            rankings[i] = stop.value
            open_questions.pop(i, None)
        else:
            open_questions[i] = questions

    for i in range(len(schedules)):
        advance(i, None)
    steps = 0
    while open_questions:
        batch = [(i, question) for i, questions in open_questions.items() for question in questions]
        answers = ask(batch)
        if len(answers) != len(batch):
            raise ValueError(f"ask must return one answer per question: {len(batch)}, got {len(answers)}")
        steps += 1
        begin = 0
        for i, questions in list(open_questions.items()):
            advance(i, answers[begin : begin + len(questions)])
            begin += len(questions)
    return [ranking for ranking in rankings if ranking is not None], steps


def check_windows(window: int, stride: int | None, rule: str) -> None:
    """Raise ValueError naming the argument unless windows of these sizes can rank."""
    if isinstance(window, bool) or not isinstance(window, int) or window < 2:
        raise ValueError(f"window must be an int of at least 2 documents, got {window!r}")
    if isinstance(stride, bool) or not isinstance(stride, int) or not 1 <= stride < window:
        raise ValueError(
            f"stride must be an int from 1 to window - 1 = {window - 1}, so that windows overlap, got {stride!r}"
        )
    if rule not in WINDOW_RULES:
        raise ValueError(f"window_rule must be one of {', '.join(map(repr, WINDOW_RULES))}, got {rule!r}")


def windows(n: int, window: int = 20, stride: int = 10, rule: str = "rank_llm") -> list[tuple[int, int]]:
    """Return the [begin, end) of each window over n documents in the order they are ranked, from the tail.

    rule "rank_llm" goes on to the head with a shorter last window; "rankgpt" stops at the last window that is whole,
    which leaves `untouched` documents at the head. Up to `window` documents are one window.

    Sources: castorini/rank_llm; RankGPT, Sun et al. 2023, arXiv 2304.09542.

    Example:
        >>> windows(35), windows(35, rule="rankgpt")
        ([(15, 35), (5, 25), (0, 15)], [(15, 35), (5, 25)])
    """
    check_windows(window, stride, rule)
    if n <= 0:
        return []
    window = min(window, n)
    begin, end = n - window, n
    spans = [(begin, end)]
    while begin > 0 and (begin >= stride or rule == "rank_llm"):
        begin, end = max(begin - stride, 0), end - stride
        spans.append((begin, end))
    return spans


def untouched(n: int, window: int = 20, stride: int = 10, rule: str = "rank_llm") -> int:
    """Return how many documents at the head no window of `windows` reads.

    Example:
        >>> untouched(95), untouched(95, rule="rankgpt")
        (0, 5)
    """
    spans = windows(n, window, stride, rule)
    return spans[-1][0] if spans else 0


def sliding_windows(
    n: int, window: int = 20, stride: int = 10, rule: str = "rank_llm"
) -> Schedule[Documents, Sequence[int]]:
    """Rank window after window from the tail: the best of each window travel on to the next.

    A question is the documents of a window as they stand; its answer holds their positions in it, best first.
    Raises ValueError for an answer that is not a permutation.
    """
    order = list(range(n))
    for begin, end in windows(n, window, stride, rule):
        shown = tuple(order[begin:end])
        (answer,) = yield [shown]
        if sorted(answer) != list(range(len(shown))):
            raise ValueError(f"the answer to a window of {len(shown)} documents must permute 0..{len(shown) - 1}")
        order[begin:end] = [shown[i] for i in answer]
    return _by_rank(order)


def all_pairs(n: int) -> Schedule[Pair, float]:
    """Every pair in one batch; a document's score is the sum of what it won. Ties keep their order.

    A question (i, j) has the answer 1.0 if i wins, 0.0 if j wins, 0.5 for a tie, or a probability that i wins.
    Source: PRP, Qin et al. 2023, arXiv 2306.17563.
    """
    pairs = list(combinations(range(n), 2))
    answers = (yield pairs) if pairs else []
    scores = [0.0] * n
    for (i, j), won in zip(pairs, answers, strict=True):
        scores[i] += won
        scores[j] += 1.0 - won
    return Ranking(sorted(range(n), key=lambda i: (-scores[i], i)), scores)


def heapsort(n: int, top_k: int = 10) -> Schedule[Pair, float]:
    """Equal to a binary max-heap built from the end, whose top_k are extracted; the rest keep their order.

    Ties among the top_k come as the heap gives them, as published, not in first-stage order.

    A question (i, j), i < j, has an answer as in `all_pairs`; i beats j if it is above 0.5, j beats i if it is below.
    No pair is asked twice. Decisions are those of the sequential algorithm for any comparator. There are few steps
    because a sift-down waits only for its two children: all nodes of a level are asked together, and the next
    extraction follows the last one down the heap. A sift-down that the next extraction waits for asks its three
    comparisons at once. 100 documents with top_k 10 take about 40 steps; one comparison at a time would take 260. A
    search for bad comparators found none that needs more than 61.

    Source: PRP, Qin et al. 2023, arXiv 2306.17563.
    """
    known: dict[Pair, float] = {}

    def decide(documents: Documents, urgent: bool) -> int | list[Pair]:
        best = 0
        for i in range(1, len(documents)):
            challenger, champion = documents[i], documents[best]
            pair = (min(challenger, champion), max(challenger, champion))
            if pair not in known:
                rest = combinations(sorted(documents), 2) if urgent and i == 1 else ()
                return [pair, *(other for other in rest if other != pair and other not in known)]
            if known[pair] > 0.5 if challenger == pair[0] else known[pair] < 0.5:
                best = i
        return best

    top = yield from _remembered(heap_top(n, top_k, 2, decide), known)
    return _by_rank(_with_rest(top, n))


def setwise(n: int, top_k: int = 10, set_size: int = 4) -> Schedule[Documents, int]:
    """Equal to a heap in which each parent has set_size - 1 children and one question finds the best of all.

    A question holds the parent, then its children; its answer is the position of the best. The top_k are extracted,
    the rest keep their order. Nodes of one level are asked together, as in `heapsort`.
    Source: Zhuang et al. 2023, arXiv 2310.09497.
    """
    known: dict[Documents, int] = {}

    def decide(documents: Documents, _: bool) -> int | list[Documents]:
        if documents not in known:
            return [documents]
        if not 0 <= known[documents] < len(documents):
            raise ValueError(f"the best of {len(documents)} documents cannot be number {known[documents]}")
        return known[documents]

    top = yield from _remembered(heap_top(n, top_k, set_size - 1, decide), known)
    return _by_rank(_with_rest(top, n))


def sliding(n: int, passes: int = 10) -> Schedule[Pair, float]:
    """Equal to `passes` bubble passes from the bottom: neighbours swap if the lower one wins.

    After pass i position i is final. Questions and answers are those of `heapsort`. No pair is asked twice, so the
    tail that a pass left as it was costs nothing in the next one. Passes follow each other two places apart, which
    changes no decision: 100 documents and 10 passes are at most 117 steps instead of 945.

    Source: PRP, Qin et al. 2023, arXiv 2306.17563.
    """
    known: dict[Pair, float] = {}
    order = list(range(n))
    # lower[p]: the place whose document pass p compares next with the one above it; done when it is p.
    lower = [n - 1] * max(0, min(passes, n - 1))
    while lower and lower[-1] > len(lower) - 1:
        questions: dict[Pair, None] = {}
        for p in range(len(lower)):
            # Ahead of this pass, the one before must be past both places.
            while lower[p] > p and (p == 0 or lower[p - 1] <= max(lower[p] - 2, p - 1)):
                above, below = order[lower[p] - 1], order[lower[p]]
                pair = (min(above, below), max(above, below))
                if pair not in known:
                    questions[pair] = None
                    break
                if known[pair] < 0.5 if above == pair[0] else known[pair] > 0.5:
                    order[lower[p] - 1], order[lower[p]] = below, above
                lower[p] -= 1
        if questions:
            known.update(zip(questions, (yield list(questions)), strict=True))
    return _by_rank(order)


def _remembered(
    schedule: Generator[list[Q], None, list[int]], known: dict[Q, A]
) -> Generator[list[Q], Sequence[A], list[int]]:
    """Drive a schedule that reads its answers from `known`."""
    try:
        while True:
            questions = next(schedule)
            known.update(zip(questions, (yield questions), strict=True))
    except StopIteration as stop:
        top: list[int] = stop.value
        return top


def _with_rest(top: Sequence[int], n: int) -> list[int]:
    chosen = set(top)
    return [*top, *(i for i in range(n) if i not in chosen)]


def _by_rank(order: Iterable[int]) -> Ranking:
    order = list(order)
    scores = [0.0] * len(order)
    for rank, document in enumerate(order):
        scores[document] = float(len(order) - rank)
    return Ranking(order, scores)
