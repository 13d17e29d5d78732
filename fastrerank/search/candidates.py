"""How a search finds the items of largest product: a scan of all item vectors, or an approximate graph of them."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fastrerank import ops

__all__ = ["KINDS", "Scan", "candidates_of"]

Ids = npt.NDArray[np.int64]
KINDS = ("scan", "faiss", "usearch")
_MODULES = {"faiss": ("faiss", "faiss-cpu"), "usearch": ("usearch.index", "usearch")}
_WIDER = 2  # a graph is asked for this multiple of the items, at least _LEAST, to miss few of the best
_LEAST = 64


class Scan:
    """Exact: every query reads every item. Ids of `shards` continue from one shard to the next."""

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
        """The k items of largest product with each query (B, K), except those in its row of `exclude` (B, E)."""
        return ops.cur_topk(queries, self._shards, k, exclude=exclude, threads=self._threads)[0]


class Graph(Scan):
    """Approximate: items found in a graph of all item vectors, of FAISS or usearch, by inner product.

    A query for which the graph finds too few items is scanned.
    """

    def __init__(self, shards: Sequence[ops.PackedItems], find: Any, threads: int | None = None) -> None:
        super().__init__(shards, threads)
        self._find = find

    def top(self, queries: npt.NDArray[np.float32], k: int, exclude: Ids) -> Ids:
        """About the k items of largest product with each query, except those in its row of `exclude`."""
        wanted = min(self.count, max(_WIDER * (k + exclude.shape[1]), _LEAST))
        found = self._find(queries, wanted)
        chosen = np.empty((len(queries), k), np.int64)
        for row, line in enumerate(found):
            fresh = line[(line >= 0) & ~np.isin(line, exclude[row])][:k]
            if len(fresh) < k:
                fresh = super().top(queries[row : row + 1], k, exclude[row : row + 1])[0]
            chosen[row] = fresh
        return chosen


def candidates_of(kind: str) -> Callable[[Sequence[ops.PackedItems], int | None], Scan]:
    """Return the function that makes the candidates of an index's shards, for "scan", "faiss" or "usearch".

    Raises ValueError for another kind, ImportError where its package is not installed. A graph is built at the first
    search, and again after items were added or removed.
    """
    if kind not in KINDS:
        raise ValueError(f"candidates must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "scan":
        return Scan
    module, package = _MODULES[kind]
    try:
        library = importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"candidates={kind!r} needs {package}, which is not installed: pip install {package}, or use "
            "candidates='scan'"
        ) from error
    lock = threading.Lock()
    made: dict[str, Any] = {}

    def candidates(shards: Sequence[ops.PackedItems], threads: int | None) -> Scan:
        with lock:
            if made.get("of") is not shards:
                made["find"] = _FINDERS[kind](library, shards)
                made["of"] = shards
            return Graph(shards, made["find"], threads)

    return candidates


def _faiss(library: Any, shards: Sequence[ops.PackedItems]) -> Any:
    graph = library.IndexHNSWFlat(shards[0].K, 32, library.METRIC_INNER_PRODUCT)
    for shard in shards:
        graph.add(np.ascontiguousarray(shard.vectors().T))

    def find(queries: npt.NDArray[np.float32], k: int) -> Ids:
        parameters = library.SearchParametersHNSW(efSearch=2 * k)
        ids: Ids = graph.search(queries, k, params=parameters)[1]
        return ids

    return find


def _usearch(library: Any, shards: Sequence[ops.PackedItems]) -> Any:
    graph = library.Index(ndim=shards[0].K, metric="ip", dtype="f32", connectivity=32)
    begin = 0
    for shard in shards:
        graph.add(np.arange(begin, begin + shard.N), np.ascontiguousarray(shard.vectors().T))
        begin += shard.N

    def find(queries: npt.NDArray[np.float32], k: int) -> list[Ids]:
        found = [graph.search(query, k) for query in queries]
        return [np.asarray(hits.keys).astype(np.int64).reshape(-1) for hits in found]

    return find


_FINDERS = {"faiss": _faiss, "usearch": _usearch}
