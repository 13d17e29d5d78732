"""Where a search finds the items that look best: a scan of all item vectors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fastrerank import ops

__all__ = ["Scan"]

Ids = npt.NDArray[np.int64]


class Scan:
    """Exact: every query reads every item. `shards` are one index whose ids run on from one to the next."""

    def __init__(self, shards: Sequence[ops.PackedItems], threads: int | None = None) -> None:
        self._shards = list(shards)
        self._starts = np.cumsum([0, *(shard.N for shard in self._shards)])
        self._threads = threads
        self.width = self._shards[0].K
        self.count = int(self._starts[-1])

    def gather(self, ids: Ids) -> npt.NDArray[np.float32]:
        """Stored vectors of the items, float32 (n, K)."""
        if len(self._shards) == 1:
            return np.ascontiguousarray(self._shards[0].vectors(ids).T)
        vectors = np.empty((len(ids), self.width), np.float32)
        for number, shard in enumerate(self._shards):
            inside = np.flatnonzero((ids >= self._starts[number]) & (ids < self._starts[number + 1]))
            vectors[inside] = shard.vectors(ids[inside] - self._starts[number]).T
        return vectors

    def top(self, queries: npt.NDArray[np.float32], k: int, exclude: Ids) -> Ids:
        """The k items of largest product with each query (B, K), but for those in its row of `exclude` (B, E)."""
        return ops.cur_topk(queries, self._shards, k, exclude=exclude, threads=self._threads)[0]
