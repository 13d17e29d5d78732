"""Budgeted search of many queries in lockstep: rounds of scoring, fitting and scanning."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fastrerank.search.solver import RidgeFits, least_norm

__all__ = ["Candidates", "Effort", "Plan", "adaptive_search", "best", "checked_scores", "round_sizes"]

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
PairScorer = Callable[[npt.NDArray[np.int64], npt.NDArray[np.int64]], Any]  # (queries, ids) -> scores

_NAMED = 8  # item ids that an error message lists


class Candidates(Protocol):
    """Item vectors, and the items of largest product with a query vector."""

    width: int
    count: int

    def gather(self, ids: Ids) -> npt.NDArray[np.float32]:
        """Vectors of the items, float32 (n, K)."""

    def top(self, queries: npt.NDArray[np.float32], k: int, exclude: Ids) -> Ids:
        """The k items of largest product with each query, without those of its row in `exclude`: (B, k)."""


@dataclass
class Effort:
    """What a search cost: calls of the scorer, rounds, batches of calls, and seconds per stage.

    `error` is the root mean square of the leave-one-out errors of the last fit over all queries: the expected error of
    an estimate for an item like the scored ones. None where nothing was fitted.
    """

    calls: int = 0
    rounds: int = 0
    batches: int = 0
    error: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Any:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin


@dataclass(frozen=True)
class Plan:
    """How the calls of one query are spent.

    `sizes`: calls per round. `first` (B, sizes[0]): items of the first round. `ridge`: absolute; 0 is the
    pseudo-inverse. `prior`: u0, (K,) or (B, K), or None. `mix`: 0 fits around u0; above 0, u is
    (1 - mix) times the fit without u0, plus mix times u0 (AXN).
    """

    sizes: list[int]
    first: Ids
    ridge: float
    prior: npt.NDArray[Any] | None = None
    mix: float = 0.0


def round_sizes(budget: int, rounds: int, first: float) -> list[int]:
    """Calls per round: a share `first` of the budget, then equal parts of the rest; they sum to `budget`.

    Example:
        >>> round_sizes(100, 5, 0.2)
        [20, 20, 20, 20, 20]
    """
    rounds = min(rounds, budget)
    if rounds == 1:
        return [budget]
    head = min(max(1, round(first * budget)), budget - rounds + 1)
    cuts = head + np.arange(rounds) * (budget - head) // (rounds - 1)
    return [head, *(int(size) for size in np.diff(cuts))]


def adaptive_search(
    items: Candidates, score: PairScorer, plan: Plan, effort: Effort, named_by: Callable[[Ids], Ids]
) -> tuple[Ids, Floats]:
    """Spend the plan's calls on B queries in lockstep; return all scored items and scores, each (B, budget).

    `score(queries, ids)` is called once per round with the pairs of all queries: numbers of queries and item ids,
    int64 (n,). No pair comes twice. `named_by` gives the ids by which errors name items. Raises what
    `checked_scores` raises.
    """
    count, budget = len(plan.first), sum(plan.sizes)
    ids = np.empty((count, budget), np.int64)
    scores = np.empty((count, budget))
    mixed = plan.mix > 0.0
    ridge_fits = (
        RidgeFits(count, budget, items.width, ridge=plan.ridge, prior=None if mixed else plan.prior)
        if plan.ridge > 0 and len(plan.sizes) > 1
        else None
    )
    vectors: npt.NDArray[np.float32] = np.empty((count, 0, items.width), np.float32)
    done = 0
    for number, size in enumerate(plan.sizes):
        chosen = (
            plan.first
            if number == 0
            else _next(items, plan, ids[:, :done], scores[:, :done], ridge_fits, vectors, size, effort)
        )
        with effort.stage("scorer"):
            queries = np.repeat(np.arange(count), size)
            fresh = checked_scores(score, queries, chosen.reshape(-1), named_by).reshape(count, size)
        effort.calls += count * size
        effort.batches += 1
        ids[:, done : done + size], scores[:, done : done + size] = chosen, fresh
        done += size
        if number + 1 == len(plan.sizes):
            break
        with effort.stage("fit"):
            gathered = items.gather(chosen.reshape(-1)).reshape(count, size, items.width)
            if ridge_fits is None:
                vectors = np.concatenate([vectors, gathered], axis=1)
            else:
                ridge_fits.add(gathered, fresh)
    effort.rounds += len(plan.sizes)
    if ridge_fits is not None:
        effort.error = float(np.sqrt(np.mean(np.square(ridge_fits.errors()))))
    return ids, scores


def _next(
    items: Candidates,
    plan: Plan,
    ids: Ids,
    scores: Floats,
    fits: RidgeFits | None,
    vectors: npt.NDArray[np.float32],
    size: int,
    effort: Effort,
) -> Ids:
    """The items that look best and are not scored, (B, size)."""
    with effort.stage("fit"):
        weights = _least_norm(items.width, plan, scores, vectors) if fits is None else fits.weights()
        if plan.mix > 0.0 and plan.prior is not None:
            weights = ((1 - plan.mix) * weights + plan.mix * plan.prior).astype(np.float32)
    with effort.stage("scan"):
        return items.top(weights, size, ids)


def _least_norm(width: int, plan: Plan, scores: Floats, vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    count, done = scores.shape
    if 0.7 * width <= done <= 1.3 * width:
        warnings.warn(
            f"ridge=0 with {done} scored items and item vectors of width {width}: where the two are close the "
            "unregularised fit is dominated by noise; use a ridge, or fewer or more items",
            RuntimeWarning,
            stacklevel=5,
        )
    prior = np.zeros(width) if plan.prior is None or plan.mix > 0.0 else plan.prior
    prior = np.broadcast_to(prior, (count, width)).astype(float)
    fitted = [
        prior[b] + least_norm(vectors[b].T, scores[b] - vectors[b].astype(np.float64) @ prior[b]) for b in range(count)
    ]
    return np.asarray(fitted, np.float32).reshape(count, width)


def best(ids: Ids, scores: Floats, k: int) -> tuple[Ids, Floats]:
    """The k scored items of each query by score descending, then id ascending: (B, k) each."""
    order = np.lexsort((ids, -scores), axis=-1)[:, :k]
    return np.take_along_axis(ids, order, 1), np.take_along_axis(scores, order, 1)


def checked_scores(score: PairScorer, queries: Ids, ids: Ids, label: Callable[[Ids], Ids] | None = None) -> Floats:
    """`score(queries, ids)` as float64 (n,).

    Raises RuntimeError if the scorer raises, ValueError for what is not n numbers or not finite; both name items.
    """
    shown = ids if label is None else label(ids)
    try:
        returned = score(queries, ids)
    except Exception as error:
        raise RuntimeError(f"the scorer failed on items {named(shown)}: {type(error).__name__}: {error}") from error
    try:
        values = np.asarray(returned, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the scorer must return one number per item, got {type(returned).__name__} for items {named(shown)}"
        ) from error
    if values.shape != ids.shape:
        raise ValueError(
            f"the scorer must return {len(ids)} scores, one per item, got shape {values.shape} for items {named(shown)}"
        )
    bad = ~np.isfinite(values)
    if bad.any():
        raise ValueError(f"the scorer returned NaN or infinity for items {named(shown[bad])}")
    return values


def named(ids: Sequence[int] | Ids) -> str:
    """Ids for a message, at most eight of them."""
    shown = ", ".join(str(int(i)) for i in ids[:_NAMED])
    return f"[{shown}{f', and {len(ids) - _NAMED} more' if len(ids) > _NAMED else ''}]"
