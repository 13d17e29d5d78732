"""`CURIndex`: the best k of N items under an expensive scorer, from few of its calls."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastrerank import ops
from fastrerank.cur.anchors import choose_anchors
from fastrerank.cur.candidates import Scan
from fastrerank.cur.checks import as_ids, as_scores, positive, share
from fastrerank.cur.search import Effort, PairScorer, Plan, adaptive_search, best, round_sizes
from fastrerank.cur.solver import least_norm

__all__ = ["CURIndex", "Settings"]

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
_PACKED_AT_ONCE = 1 << 16  # items
_ANCHORS = 128  # items that are kept for first rounds
_MEMORY = 1 << 29  # bytes that the fits of one batch of queries may take


@dataclass(frozen=True)
class Settings:
    """How `search` spends a budget where the call does not say.

    `rounds`; `first`: share of the budget that the first round takes; `ridge`: relative to the mean squared distance
    of the item vectors from their mean.
    """

    rounds: int = 10
    first: float = 0.1
    ridge: float = 0.02


class CURIndex:
    """Item vectors, and a search for the items that an expensive scorer likes best.

    Vectors are the items' scores for K anchor queries (`from_scores`, `build`: ANNCUR, arXiv 2210.12579, and ADACUR,
    arXiv 2305.02996) or any embeddings (`from_vectors`: AXN, arXiv 2405.03651). `search` scores some items exactly,
    fits a linear model of the scores on the vectors, scores the items that it likes best, and so on.

    One object may be searched from many threads; `add` and `remove` must not run beside a search.

    Example:
        >>> scores = np.random.default_rng(0).normal(size=(8, 3)) @ np.random.default_rng(1).normal(size=(3, 500))
        >>> index = CURIndex.from_scores(scores[:7])
        >>> ids, found = index.search(lambda ids: scores[7][ids], k=5, budget=50)
        >>> ids.tolist() == np.argsort(-scores[7])[:5].tolist()
        True
    """

    def __init__(
        self, shards: Sequence[ops.PackedItems], *, anchors: Ids, spread: float, settings: Settings | None = None
    ) -> None:
        self._shards = list(shards)
        self._anchors = anchors
        self._spread = spread
        self.settings = settings or Settings()
        self._local = threading.local()

    @classmethod
    def from_scores(
        cls, anchor_scores: npt.ArrayLike, *, storage: str = "float32", scales: str | None = None,
        ridge: float | None = None, anchors: str | npt.ArrayLike = "greedy", seed: int = 0,
    ) -> CURIndex:  # fmt: skip
        """An index whose item vectors are the columns of `anchor_scores`.

        Args:
            anchor_scores: (K, N): scores of N items for K anchor queries, of the scorer that `search` will call. Use
                logits, not probabilities: saturated scores are not low-rank.
            storage: "float32", "bfloat16" or "int8".
            scales: of int8, "item" or "anchor".
            ridge: relative, see `Settings`; 0 is the published pseudo-inverse.
            anchors: items of first rounds: "greedy", "leverage" or "random", or their ids, the first ones first.
            seed: of what is drawn.

        Raises ValueError naming the argument; for NaN and infinity too.

        Example:
            >>> CURIndex.from_scores(np.eye(3, 10), storage="int8").count
            10
        """
        matrix = as_scores("anchor_scores", anchor_scores)
        count = matrix.shape[1]
        if isinstance(anchors, str):
            chosen = choose_anchors(matrix, min(count, _ANCHORS), anchors, seed=seed)
        else:
            chosen = as_ids("anchors", anchors)
            if chosen.size and not (0 <= chosen.min() and chosen.max() < count):
                raise ValueError(f"anchors must be items within 0 .. {count - 1}, got {chosen.min()} .. {chosen.max()}")
            rest = np.random.default_rng(seed).permutation(count)
            chosen = np.concatenate([chosen, rest[~np.isin(rest, chosen)]])[: max(_ANCHORS, len(chosen))]
        shards = [
            ops.cur_pack(np.asarray(matrix[:, begin : begin + _PACKED_AT_ONCE], np.float32), storage, scales=scales)
            for begin in range(0, max(count, 1), _PACKED_AT_ONCE)
        ]
        settings = Settings() if ridge is None else Settings(ridge=ridge)
        return cls(shards, anchors=chosen, spread=_spread(matrix), settings=settings)

    @property
    def width(self) -> int:
        """K, the length of an item's vector."""
        return self._shards[0].K

    @property
    def count(self) -> int:
        """N, the number of items."""
        return sum(shard.N for shard in self._shards)

    def __len__(self) -> int:
        return self.count

    @property
    def last_usage(self) -> dict[str, Any]:
        """What this thread's last search cost, as `Effort`'s fields; {} before the first."""
        effort: Effort | None = getattr(self._local, "effort", None)
        return {} if effort is None else dict(vars(effort))

    def top_k(self, query_vectors: npt.ArrayLike, k: int = 100) -> tuple[Ids, npt.NDArray[np.float32]]:
        """The k items of largest product with each query vector, exactly, over the stored values.

        Args:
            query_vectors: (B, K) or (K,).

        Returns ids int64 (B, k) and products float32 (B, k), each by product descending, then id ascending. Raises
        ValueError for a wrong width, k below 1 or above N, NaN.
        """
        queries = np.atleast_2d(np.asarray(query_vectors, np.float32))
        if queries.ndim != 2 or queries.shape[1] != self.width:
            raise ValueError(f"query_vectors must be (B, {self.width}), got shape {np.shape(query_vectors)}")
        self._filled()
        return ops.cur_topk(queries, self._shards, positive("k", k, self.count, "the number of items"))

    def search(
        self, score_items: Callable[[Ids], Any], k: int = 10, budget: int = 200, rounds: int | None = None, *,
        first: float | None = None, ridge: float | None = None, seeds: npt.ArrayLike | None = None,
        prior: npt.ArrayLike | None = None, mix: float = 0.0, threads: int | None = None,
    ) -> tuple[Ids, Floats]:  # fmt: skip
        """The k best items that at most `budget` calls of the scorer find, with their exact scores.

        Args:
            score_items: takes item ids int64 (n,), returns n finite numbers, higher is better. No item comes twice.
            k: at most `budget` and N.
            budget: calls, one per item; of more than N, N are made, and the answer is exact.
            rounds: fits and scans, see `Settings`. 1 scores the first items only; 2 is ANNCUR: anchors, then rerank.
            first: share of the budget for the first round.
            ridge: relative, see `Settings`; 0 is the published pseudo-inverse.
            seeds: items that this query scores first, best first, for example of BM25; anchors fill up the first round.
            prior: a query vector (K,) that is believed before any score: a dual encoder's, where the vectors are.
            mix: above 0, the fitted query vector does not start from `prior` but is mixed with it: AXN's lambda.
            threads: CPU threads of the scans.

        Returns ids int64 (k,) and scores float64 (k,), by score descending, then id ascending. Raises ValueError for
        impossible arguments and for scores that are not n finite numbers, RuntimeError if the scorer raises; both name
        the items.

        Example:
            >>> index.search(lambda ids: model.score(query, [texts[i] for i in ids]), k=10)  # doctest: +SKIP
        """
        if not callable(score_items):
            raise TypeError(f"score_items must be callable, got {type(score_items).__name__}")
        ids, scores = self.search_many(
            lambda _, ids: score_items(ids), 1, k, budget, rounds, first=first, ridge=ridge,
            seeds=None if seeds is None else [seeds], prior=prior, mix=mix, threads=threads,
        )  # fmt: skip
        return ids[0], scores[0]

    def search_many(
        self, score_pairs: PairScorer, queries: int, k: int = 10, budget: int = 200, rounds: int | None = None, *,
        first: float | None = None, ridge: float | None = None, seeds: Sequence[npt.ArrayLike] | None = None,
        prior: npt.ArrayLike | None = None, mix: float = 0.0, threads: int | None = None,
    ) -> tuple[Ids, Floats]:  # fmt: skip
        """`search` for many queries at once: a round of all of them is one call of the scorer and one scan.

        Args:
            score_pairs: takes numbers of queries and item ids, both int64 (n,), returns n numbers.
            queries: how many, B. seeds: one list per query. prior: (K,) or (B, K). The rest: see `search`.

        Returns ids (B, k) and scores (B, k). An answer does not depend on the other queries.
        """
        count = self._filled()
        queries = positive("queries", queries)
        k = positive("k", k, count, "the number of items")
        budget = min(positive("budget", budget), count)
        if budget < k:
            raise ValueError(f"budget must be at least k={k}, got {budget}: the answer holds scored items only")
        settings = self.settings
        sizes = round_sizes(
            budget,
            settings.rounds if rounds is None else positive("rounds", rounds),
            settings.first if first is None else share("first", first),
        )
        relative = settings.ridge if ridge is None else ridge
        if not (isinstance(relative, (int, float)) and 0 <= relative < np.inf):
            raise ValueError(f"ridge must be a number of at least 0, got {relative!r}")
        start = self._first(queries, sizes[0], seeds)
        believed = self._prior(prior, queries)
        mix = share("mix", mix)
        if mix > 0 and believed is None:
            raise ValueError(f"mix={mix} needs a prior to mix with")
        if believed is None:
            believed = np.full((1, self.width), 1 / self.width)
        effort, scan = Effort(), Scan(self._shards, threads)
        ids = np.empty((queries, k), np.int64)
        scores = np.empty((queries, k))
        group = max(1, int(_MEMORY // (budget * 8 * (budget + self.width))))
        for begin in range(0, queries, group):
            part = slice(begin, min(begin + group, queries))
            plan = Plan(
                sizes, start[part], relative * self._spread, believed if len(believed) == 1 else believed[part], mix
            )
            all_ids, all_scores = adaptive_search(
                scan, lambda number, chosen, begin=begin: score_pairs(number + begin, chosen), plan, effort
            )
            ids[part], scores[part] = best(all_ids, all_scores, k)
        self._local.effort = effort
        return ids, scores

    def estimate(
        self, ids: npt.ArrayLike, scores: npt.ArrayLike, *, ridge: float | None = None
    ) -> Floats:  # fmt: skip
        """Estimated scores of all items from exact scores of some, float64 (N,).

        With `ridge=0` that is ANNCUR's `scores @ pinv(R[:, ids]) @ R`, in float64 over the stored values.
        """
        chosen = as_ids("ids", ids)
        values = np.asarray(scores, np.float64)
        if values.shape != chosen.shape:
            raise ValueError(f"scores must have one value for each of {len(chosen)} ids, got shape {values.shape}")
        vectors = np.concatenate([shard.vectors() for shard in self._shards], axis=1).astype(np.float64)
        relative = self.settings.ridge if ridge is None else ridge
        some = vectors[:, chosen]
        if relative == 0:
            weights = least_norm(some, values)
        else:
            prior = np.full(self.width, 1 / self.width)
            dual = some.T @ some + relative * self._spread * np.eye(len(chosen))
            weights = prior + some @ np.linalg.solve(dual, values - prior @ some)
        result: Floats = weights @ vectors
        return result

    def _filled(self) -> int:
        if self.count == 0:
            raise ValueError("the index is empty: add items before searching")
        return self.count

    def _first(self, queries: int, size: int, seeds: Sequence[npt.ArrayLike] | None) -> Ids:
        """Items of the first round, (B, size): each query's seeds, then anchors."""
        anchors = self._anchors
        if len(anchors) < 2 * size:
            rest = np.random.default_rng(0).permutation(self.count)
            anchors = np.concatenate([anchors, rest[~np.isin(rest, anchors)]])
        if seeds is None:
            return np.repeat(anchors[None, :size], queries, axis=0)
        if len(seeds) != queries:
            raise ValueError(f"seeds must have one list for each of {queries} queries, got {len(seeds)}")
        first = np.empty((queries, size), np.int64)
        for number, some in enumerate(seeds):
            own = as_ids("seeds", some)[:size]
            if own.size and not (0 <= own.min() and own.max() < self.count):
                raise ValueError(f"seeds must be items within 0 .. {self.count - 1}, got {own.min()} .. {own.max()}")
            first[number, : len(own)] = own
            first[number, len(own) :] = anchors[~np.isin(anchors, own)][: size - len(own)]
        return first

    def _prior(self, prior: npt.ArrayLike | None, queries: int) -> npt.NDArray[np.float32] | None:
        if prior is None:
            return None
        vectors = np.atleast_2d(np.asarray(prior, np.float32))
        if vectors.shape not in ((1, self.width), (queries, self.width)) or not np.isfinite(vectors).all():
            raise ValueError(
                f"prior must be finite, ({self.width},) or ({queries}, {self.width}), got shape {np.shape(prior)}"
            )
        return vectors


def _spread(vectors: npt.NDArray[Any]) -> float:
    """Mean squared distance of the columns from their mean, of at most 65,536 of them; 1 if they are all equal."""
    step = max(1, vectors.shape[1] >> 16)
    some = np.asarray(vectors[:, ::step], np.float64)
    if not some.shape[1]:
        return 1.0
    value = float(np.square(some - some.mean(axis=1, keepdims=True)).sum(axis=0).mean())
    return value if value > 0 else 1.0
