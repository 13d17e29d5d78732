"""Exact top-k of products with packed items."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt

import fastrerank._cpu as _cpu
from fastrerank.ops._cur_topk.items import PackedItems, as_shards
from fastrerank.runtime import cpu

if TYPE_CHECKING:
    import torch

    from fastrerank.ops._cur_topk.cuda import CudaItems

__all__ = ["cur_topk"]


@overload
def cur_topk(
    queries: npt.NDArray[np.float32],
    items: PackedItems | Sequence[PackedItems],
    k: int,
    *,
    exclude: Any = ...,
    threads: int | None = ...,
    rescore: PackedItems | Sequence[PackedItems] | None = ...,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]: ...
@overload
def cur_topk(
    queries: torch.Tensor,
    items: CudaItems | Sequence[CudaItems],
    k: int,
    *,
    exclude: Any = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...
def cur_topk(
    queries: Any, items: Any, k: int, *, exclude: Any = None, threads: int | None = None, rescore: Any = None
) -> tuple[Any, Any]:
    """The k largest of `queries @ items.vectors()` in every row, exactly.

    A score is summed in float64 over the stored values and rounded to float32 once. The order is by score descending,
    then by id ascending.

    On a CUDA device (`items.to("cuda")`, and `queries` a tensor there) the result is two tensors on it. Kernels scan
    int8 and bfloat16 items, and exact scores decide among the 2 k + 64 best that they find. All scores are computed in
    float64 if an error bound does not prove that these contain the best k, for float32 items, for bfloat16 items wider
    than 16,384, and for k above 1,024. For these limits, k includes the most ids that a query excludes. Sums have
    another order on a device, so a score may differ from the CPU's in its last bit.

    Args:
        queries: float32 (B, K).
        items: from `cur_pack`; a sequence of them is one index, whose ids continue from one to the next.
        k: at least 1. The result has fewer columns where there are fewer items.
        exclude: ids to leave out: integers (E,) for all queries, or one array for each of the B queries. In an array
            (B, E), negative ids are ignored. Ids of no item raise ValueError.
        threads: CPU threads; None for the default. The result does not depend on it.
        rescore: the same items in "float32" or "bfloat16", where `items` are int8: the result is then that of
            `cur_topk(queries, rescore, k)`, but few of its vectors are read.

    Returns ids int64 and scores float32 (B, k'): k' = min(k, N - the fewest ids that a query excludes). Rows with
    fewer items end with id -1 and score -infinity.

    Raises TypeError, ValueError naming the argument; for NaN in queries, and if a score is NaN, because it adds
    infinities of both signs or multiplies an infinity by 0.

    Example:
        >>> from fastrerank.ops import cur_pack
        >>> items = cur_pack(np.array([[1, 5, 3, 5]], np.float32), "float32")
        >>> ids, scores = cur_topk(np.ones((1, 1), np.float32), items, 3)
        >>> ids.tolist(), scores.tolist()
        ([[1, 3, 2]], [[5.0, 5.0, 3.0]])
    """
    if type(queries).__module__ == "torch":
        return _on_device(queries, items, k, exclude, rescore)
    shards = as_shards(items, "items")
    width, count = shards[0].K, sum([shard.N for shard in shards])
    queries = _checked_queries(queries, width)
    _check_sizes(k, count)
    exact = shards if rescore is None else _checked_rescore(rescore, shards)
    gone = begins = None
    most = count
    if exclude is not None:
        left_out = _checked_exclude(exclude, len(queries), count)
        gone = np.concatenate([*left_out, np.empty(0, np.int64)])
        begins = np.cumsum([0, *map(len, left_out)], dtype=np.int64)
        most -= min(map(len, left_out), default=0)
    keep = min(int(k), most)
    ids = np.empty((len(queries), keep), np.int64)
    scores = np.empty((len(queries), keep), np.float32)
    if keep < 1:
        _check_finite(queries)
        return ids, scores
    fault, row, item = _cpu.cur_topk(
        [
            (_address(a.data), _address(a.scale if a.scales == "item" else None), _address(b.data), a.N)
            for a, b in zip(shards, exact, strict=True)
        ],
        shards[0].storage,
        exact[0].storage,
        rescore is not None,
        width,
        _address(shards[0].scale if shards[0].scales == "anchor" else None),
        _address(queries),
        len(queries),
        keep,
        _address(gone),
        _address(begins),
        _address(ids),
        _address(scores),
        cpu.num_threads(threads),
        cpu.isa(),
    )
    if fault == 1:
        raise ValueError(f"queries and items give a score that is NaN: query {row}, item {item}")
    if fault == 2:
        raise ValueError(f"rescore must hold the items that items were rounded from; item {item} is another")
    if fault == 3:
        raise ValueError(f"queries must be finite, got {queries[row, item]} in query {row}, column {item}")
    return ids, scores


def _on_device(queries: Any, items: Any, k: int, exclude: Any, rescore: Any) -> tuple[Any, Any]:
    cuda = importlib.import_module("fastrerank.ops._cur_topk.cuda")
    shards = cuda.checked_shards(items)
    queries = cuda.checked_queries(queries, shards)
    count = sum(shard.N for shard in shards)
    _check_sizes(k, count)
    if rescore is not None:
        raise ValueError("rescore is for items on the CPU; on a device the answer is that over `items`")
    left_out = _checked_exclude(exclude.cpu().numpy() if hasattr(exclude, "cpu") else exclude, len(queries), count)
    keep = min(int(k), count - min(map(len, left_out), default=0))
    return cuda.cur_topk_cuda(queries, shards, int(k), left_out, keep)  # type: ignore[no-any-return]


def _check_sizes(k: Any, count: int) -> None:
    if count >= 1 << 31:
        raise ValueError(f"items must be fewer than 2**31 in all, got {count}")
    if not isinstance(k, (int, np.integer)) or isinstance(k, bool) or k < 1:
        raise ValueError(f"k must be an int of at least 1, got {k!r}")


def _address(array: npt.NDArray[Any] | None) -> int:
    # A scan evicts Python's objects from the caches, and `.ctypes` would need many of them.
    return 0 if array is None else int(array.__array_interface__["data"][0])


def _checked_queries(queries: Any, width: int) -> npt.NDArray[np.float32]:
    if not isinstance(queries, np.ndarray) or queries.dtype != np.float32:
        got = getattr(queries, "dtype", type(queries).__name__)
        raise TypeError(f"queries must be a float32 NumPy array, got {got}")
    if queries.ndim != 2 or queries.shape[1] != width:
        raise ValueError(f"queries must be (B, {width}), the items' width, got shape {queries.shape}")
    # The scan reads the buffer, so a subclass (a masked array) becomes its plain array.
    return queries if type(queries) is np.ndarray and queries.flags.c_contiguous else np.ascontiguousarray(queries)


def _check_finite(queries: npt.NDArray[np.float32]) -> None:
    bad = np.argwhere(~np.isfinite(queries))
    if bad.size:
        row, column = bad[0]
        raise ValueError(f"queries must be finite, got {queries[row, column]} in query {row}, column {column}")


def _checked_rescore(rescore: Any, shards: list[PackedItems]) -> list[PackedItems]:
    exact = as_shards(rescore, "rescore")
    if shards[0].storage != "int8" or exact[0].storage == "int8":
        raise ValueError(
            f"rescore must be float32 or bfloat16 items for int8 items, got {exact[0].storage} for {shards[0].storage}"
        )
    if exact[0].K != shards[0].K or [shard.N for shard in exact] != [shard.N for shard in shards]:
        raise ValueError(
            f"rescore must hold the same items: width {shards[0].K} and {[s.N for s in shards]} items, "
            f"got width {exact[0].K} and {[s.N for s in exact]}"
        )
    return exact


def _checked_exclude(exclude: Any, rows: int, count: int) -> list[npt.NDArray[np.int64]]:
    """The ids that each query leaves out, ascending and once each."""
    if exclude is None:
        return [np.empty(0, np.int64)] * rows
    if isinstance(exclude, np.ndarray) and exclude.ndim == 2:
        if len(exclude) != rows or exclude.dtype.kind not in "iu":
            raise ValueError(f"exclude must be integers ({rows}, E), got {exclude.dtype} {exclude.shape}")
        lists = [row[row >= 0] for row in exclude]
    elif isinstance(exclude, (list, tuple)) and exclude and not isinstance(exclude[0], (int, np.integer)):
        if len(exclude) != rows:
            raise ValueError(f"exclude must have one array for each of {rows} queries, got {len(exclude)}")
        lists = list(exclude)
    else:
        lists = [exclude]
    result = []
    for ids in lists:
        array = np.asarray(ids)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise ValueError(f"exclude must hold integer ids, got {array.dtype} of shape {array.shape}")
        unique = np.unique(array.astype(np.int64))
        if unique.size and not (unique[0] >= 0 and unique[-1] < count):
            raise ValueError(f"exclude must hold ids within 0 .. {count - 1}, got {unique[0]} .. {unique[-1]}")
        result.append(unique)
    return result if len(result) == rows else result * rows
