"""Recall on held-out anchor queries, whose exact scores of all items are in the index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastrerank.search.checks import positive
from fastrerank.search.contents import Settings

if TYPE_CHECKING:
    from fastrerank.search.index import CURIndex

__all__ = ["Curve", "Trial", "as_rows", "chart", "hold_out", "recall", "recall_curve", "tune"]

Matrix = npt.NDArray[Any]
_ROUNDS = (2, 3, 5, 8, 10, 15, 20)
_FIRST = (0.05, 0.1, 0.2, 0.4)
_RIDGES = (0.003, 0.01, 0.02, 0.05, 0.1)


@dataclass(frozen=True)
class Trial:
    """Settings and the recall that they gave."""

    settings: Settings
    recall: float


@dataclass(frozen=True)
class Curve:
    """Recall of the exact best k against the budget, mean over `queries` queries of which all scores are known."""

    k: int
    budgets: list[int]
    recalls: list[float]
    queries: int
    name: str = "adaptive search"


def hold_out(index: CURIndex, count: int, seed: int = 0) -> tuple[CURIndex, Matrix]:
    """The index without `count` of its anchor queries, and their stored scores, float32 (count, N).

    ValueError for an index on given vectors, which has no anchor queries, and with fewer than two of them.
    """
    held = index._contents
    if held.kind != "scores":
        raise ValueError(
            "an index on given vectors has no anchor queries to hold out; compare with exact scores instead"
        )
    if held.width < 2 or held.count == 0:
        raise ValueError(f"holding out needs items and at least 2 anchor queries, got {held.count} and {held.width}")
    rows = np.random.default_rng(seed).permutation(held.width)
    count = min(positive("queries", count), held.width // 2)
    vectors = index.vectors()
    first = held.shards[0]
    rest = type(index).from_scores(
        vectors[np.sort(rows[count:])],
        storage=first.storage,
        scales=first.scales,
        seed=seed,
        ridge=index.settings.ridge,
    )
    rest.settings = index.settings
    return rest, vectors[np.sort(rows[:count])]


def recall(found: Matrix, exact: Matrix) -> float:
    """Share of the exact best k of each row that is in `found` (B, k), mean over rows; ties go to the lower id."""
    k = found.shape[1]
    best = np.argsort(-exact, axis=1, kind="stable")[:, :k]
    return float(np.mean([np.isin(own, rows).mean() for own, rows in zip(best, found, strict=True)]))


def recall_curve(index: CURIndex, exact: Matrix, k: int, budgets: Sequence[int], **options: Any) -> Curve:
    """The recall of `index.search_many` with each budget on queries whose scores of all items are `exact` (B, N).

    Column i of `exact` is the i-th item of `index.ids`. Budgets below k are left out.

    Example:
        >>> recall_curve(index, exact_scores, k=10, budgets=[50, 100, 200]).recalls  # doctest: +SKIP
        [0.71, 0.91, 0.98]
    """
    names = index.ids
    used = [budget for budget in budgets if budget >= k]
    found = []
    for budget in used:
        ids, _ = index.search_many(
            lambda query, item: exact[query, np.searchsorted(names, item)], len(exact), k, budget, **options
        )
        found.append(recall(np.searchsorted(names, ids), exact))
    return Curve(k, used, found, len(exact))


def tune(
    index: CURIndex,
    k: int,
    budget: int,
    *,
    queries: int = 48,
    seed: int = 0,
    rounds: Sequence[int] = _ROUNDS,
    first: Sequence[float] = _FIRST,
    ridges: Sequence[float] = _RIDGES,
) -> list[Trial]:
    """Recall of settings on held-out anchor queries, best first: rounds and the first share, and then the ridge.

    Settings whose recall is within half a standard error of the best one's count as equal; of those the fewest rounds
    are taken, which cost fewest scans and batches.
    """
    rest, exact = hold_out(index, queries, seed)

    def trial(settings: Settings) -> tuple[Trial, float]:
        rest.settings = settings
        ids, _ = rest.search_many(lambda query, item: exact[query, item], len(exact), k, budget)
        each = [recall(ids[row : row + 1], exact[row : row + 1]) for row in range(len(exact))]
        return Trial(settings, float(np.mean(each))), float(np.std(each) / np.sqrt(len(each)))

    ridge = index.settings.ridge
    trials = [trial(Settings(r, f, ridge)) for r in rounds for f in first]
    best = _simplest(trials)
    trials += [trial(Settings(best.settings.rounds, best.settings.first, value)) for value in ridges if value != ridge]
    best = _simplest(trials)
    others = sorted((some for some, _ in trials if some != best), key=lambda some: -some.recall)
    return [best, *others]


def _simplest(trials: Sequence[tuple[Trial, float]]) -> Trial:
    top, error = max(trials, key=lambda some: some[0].recall)
    equal = [some for some, _ in trials if some.recall >= top.recall - error / 2]
    return min(equal, key=lambda some: (some.settings.rounds, -some.recall))


def chart(curves: Sequence[Curve], title: str) -> str:
    """An SVG of recall against budget, on a logarithmic axis, without scripts and fonts of its own."""
    width, height, left, bottom, top = 640, 360, 56, 44, 40
    budgets = sorted({budget for curve in curves for budget in curve.budgets})
    if not budgets:
        raise ValueError("there is no budget to draw: give budgets of at least k")
    low, high = np.log(budgets[0]), np.log(max(budgets[-1], budgets[0] + 1))
    floor = min(0.9, *(value for curve in curves for value in curve.recalls))
    floor = np.floor(10 * floor) / 10

    def at(budget: int, value: float) -> tuple[float, float]:
        across = left + (np.log(budget) - low) / (high - low) * (width - left - 24)
        return float(across), float(height - bottom - (value - floor) / (1 - floor) * (height - bottom - top))

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="12" role="img" aria-label="{escape(title)}">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="8" y="20" font-size="14" fill="#212529">{escape(title)}</text>',
    ]
    for value in np.arange(floor, 1.001, 0.1 if floor < 0.8 else 0.05):
        x, y = at(budgets[0], float(value))
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{width - 24}" y2="{y:.1f}" stroke="#dee2e6"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end" fill="#495057">{value:.2f}</text>')
    for budget in budgets:
        x, y = at(budget, floor)
        parts.append(f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle" fill="#495057">{budget}</text>')
    parts.append(f'<text x="{width / 2}" y="{height - 8}" text-anchor="middle" fill="#495057">calls per query</text>')
    for number, curve in enumerate(curves):
        colour = ("#d9480f", "#1971c2", "#868e96", "#2f9e44", "#9c36b5")[number % 5]
        points = [at(budget, value) for budget, value in zip(curve.budgets, curve.recalls, strict=True)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
        label = escape(f"{curve.name}, k={curve.k}")
        parts.append(
            f'<text x="{left + 8 + 190 * (number % 3)}" y="{36 + 14 * (number // 3)}" fill="{colour}">{label}</text>'
        )
    return "".join(parts) + "</svg>\n"


def as_rows(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Trials for JSON."""
    return [{**asdict(some.settings), "recall": some.recall} for some in trials]
