"""Exact top-k of products with packed items on a CUDA device: a rough scan, and exact scores of its best."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastrerank.ops._cur_topk.items import TILE, PackedItems

__all__ = ["CudaItems", "cur_topk_cuda", "to_device"]

_MOST_K = 1024  # the kernels take at most _wider(_MOST_K), see csrc/cur_topk/cuda_topk.h
_MOST_SHARED = 1 << 16  # bytes of a query that every GPU has room for beside a block's reservoir
_CHUNK = 1 << 17  # items that are converted to float64 at a time
_HUGE = 2.0**120


@dataclass(frozen=True, repr=False)
class CudaItems:
    """Packed items in a device's memory, from `PackedItems.to`: `data` and `scale` are its arrays as tensors.

    `reach` is the largest norm of an item, times its scale. It bounds the error of a rough score.
    """

    data: torch.Tensor
    scale: torch.Tensor | None
    storage: str
    scales: str | None
    K: int
    N: int
    reach: float

    @property
    def device(self) -> torch.device:
        """Where the items lie."""
        return self.data.device

    @property
    def stored_width(self) -> int:
        """Values of an item, padding included."""
        return (self.data.shape[1] - 4 * TILE) // TILE // {"int8": 1, "bfloat16": 2, "float32": 4}[self.storage]

    def __len__(self) -> int:
        return self.N

    def __repr__(self) -> str:
        return f"CudaItems({self.N} items of width {self.K}, {self.storage}, on {self.device})"

    def vectors(self, ids: torch.Tensor) -> torch.Tensor:
        """The stored values of the items, float64 (n, K), times the scales of items, but not those of anchors."""
        tiles, lanes = ids // TILE, ids % TILE
        wide = self.stored_width
        if self.storage == "int8":
            values = self.data[:, : TILE * wide].view(-1, wide // 4, TILE, 4)[tiles, :, lanes].reshape(-1, wide)
            rows = values[:, : self.K].double() - 128
        else:
            dtype = torch.bfloat16 if self.storage == "bfloat16" else torch.float32
            rows = self.data.view(dtype)[:, : TILE * wide].view(-1, TILE, wide)[tiles, lanes, : self.K].double()
        return rows * self.scale[ids, None] if self.scale is not None and self.scales == "item" else rows


def to_device(items: PackedItems, device: Any) -> CudaItems:
    """`items` on a CUDA device. Raises ValueError for a device of another kind."""
    place = torch.device(device)
    if place.type != "cuda":
        raise ValueError(f"device must be a CUDA device, got {device!r}; items are on the CPU as they are")
    return _moved(items, place)


def _moved(items: PackedItems, place: torch.device) -> CudaItems:
    norms = np.ascontiguousarray(items.data[:, -4 * TILE :]).view(np.float32).reshape(-1)[: items.N]
    norms = norms * items.scale if items.scale is not None and items.scales == "item" else norms
    data = torch.from_numpy(items.data) if items.data.flags.writeable else torch.from_numpy(items.data.copy())
    scale = None if items.scale is None else torch.from_numpy(np.array(items.scale)).to(place)
    reach = float(norms.max(initial=0.0)) * (1 + 2.0**-20)
    return CudaItems(data.to(place), scale, items.storage, items.scales, items.K, items.N, reach)


def cur_topk_cuda(
    queries: torch.Tensor, items: Sequence[CudaItems], k: int, exclude: list[np.ndarray[Any, Any]], keep: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`ops.cur_topk` for checked arguments: `keep` columns; each query leaves out its ids of `exclude`."""
    if keep < 1 or not len(queries):
        check_finite(queries)
        empty = torch.empty((len(queries), max(keep, 0)), dtype=torch.float32, device=queries.device)
        return empty.long(), empty
    most = k + max(map(len, exclude), default=0)
    shards = [(0, items[0])] if len(items) == 1 else _numbered(items)
    begun = [_launch(queries, shard, most) if _scans(shard, most) else None for _, shard in shards]
    found = [_found(queries, shard, first, most, one) for (first, shard), one in zip(shards, begun, strict=True)]
    if len(found) == 1 and most == k:
        return found[0]
    keys = torch.cat(
        [_keys_of(scores, ids + first) for (first, _), (ids, scores) in zip(shards, found, strict=True)], dim=1
    )
    for row, left_out in enumerate(exclude):
        if len(left_out):
            gone = torch.isin(_ids_of(keys[row]), torch.from_numpy(left_out).to(keys.device))
            keys[row] = torch.where(gone, _NO_KEY, keys[row])
    best = keys.topk(keep, dim=1).values
    there = best != _NO_KEY
    return (
        torch.where(there, _ids_of(best), -1),
        torch.where(there, _scores_of(best), -torch.inf),
    )


def _numbered(items: Sequence[CudaItems]) -> list[tuple[int, CudaItems]]:
    firsts = np.cumsum([0, *(shard.N for shard in items)])
    return [(int(first), shard) for first, shard in zip(firsts, items, strict=False) if shard.N]


# A score and an id as one int64, larger for the better item. No two keys are equal, so sorting has one result.
_NO_KEY = -(1 << 63)


def _keys_of(scores: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    bits = (scores + 0.0).view(torch.int32).long()  # -0 + 0 is 0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered << 32) + (0xFFFFFFFF - ids)


def _ids_of(keys: torch.Tensor) -> torch.Tensor:
    return 0xFFFFFFFF - (keys & 0xFFFFFFFF)


def _scores_of(keys: torch.Tensor) -> torch.Tensor:
    ordered = keys >> 32
    return torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).int().view(torch.float32)


def _scans(items: CudaItems, k: int) -> bool:
    """Whether a scan with rounded queries can find the k best; otherwise all scores are computed."""
    shared = items.stored_width * (1 if items.storage == "int8" else 4)
    return (
        items.storage != "float32"
        and k <= _MOST_K
        and shared <= _MOST_SHARED
        and _wider(k) < items.N
        and items.reach <= _HUGE
    )


def _wider(k: int) -> int:
    """How many items get exact scores for k: a rounded query ranks some of them wrong."""
    return 2 * k + 64


@functools.cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


# ids (B, k) int64, scores (B, k) float32, and a function that waits for them and returns each query's status.
_Begun = tuple[torch.Tensor, torch.Tensor, Callable[[], list[int]]]
_NOT_FINITE = 4  # bit of a status, csrc/cur_topk/cuda_topk.h; status 0: the best are found


def _launch(queries: torch.Tensor, items: CudaItems, k: int) -> _Begun:
    """Start the search for the k best on the current stream, without waiting for it."""
    kernels, device, int8 = _kernels(), queries.device, items.storage == "int8"
    rows, wanted, processors, wide = len(queries), _wider(k), _processors(device), items.stored_width
    ids = torch.empty((rows, k), dtype=torch.int64, device=device)
    scores = torch.empty((rows, k), dtype=torch.float32, device=device)
    size = kernels.cur_scratch(int8, items.N, wide, rows, k, wanted, processors)
    scratch = torch.empty(size, dtype=torch.uint8, device=device)
    scale = 0 if items.scale is None else items.scale.data_ptr()
    each = items.scales == "item"
    stream = torch.cuda.current_stream(device).cuda_stream
    kernels.cur_topk(
        int8,
        items.data.data_ptr(),
        items.data.shape[1],
        items.N,
        scale if each else 0,
        0 if each else scale,
        items.K,
        wide,
        items.reach,
        queries.data_ptr(),
        rows,
        k,
        wanted,
        processors,
        scratch.data_ptr(),
        ids.data_ptr(),
        scores.data_ptr(),
        device.index or 0,
        stream,
    )

    def status() -> list[int]:
        # Scratch and queries are in use until then; this function keeps them alive.
        return list(kernels.cur_status(scratch.data_ptr(), len(queries), device.index or 0, stream))

    return ids, scores, status


@functools.cache
def _kernels() -> Any:
    return importlib.import_module("fastrerank._cuda")


def _found(
    queries: torch.Tensor, items: CudaItems, first: int, k: int, begun: _Begun | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and scores (B, min(k, N)) of the best items of one shard."""
    if begun is None:
        check_finite(queries)
        keys = _by_scores(_exact(queries, items), items, first, k, 0)
        return _ids_of(keys), _scores_of(keys)
    ids, scores, wait = begun
    status = wait()
    if any(status):
        if any(one & _NOT_FINITE for one in status):
            check_finite(queries)
        for row in (row for row, one in enumerate(status) if one):
            keys = _by_scores(_exact(queries[row : row + 1], items), items, first, k, row)[0]
            ids[row], scores[row] = _ids_of(keys), _scores_of(keys)
    return ids, scores


def _exact(queries: torch.Tensor, items: CudaItems) -> torch.Tensor:
    """Queries (B, K) in float64, times the scales of anchors."""
    exact = queries.double()
    if items.scale is not None and items.scales == "anchor":
        exact = exact * items.scale.double().reshape(1, -1)
    return exact


def _scores(queries: torch.Tensor, items: CudaItems, ids: torch.Tensor) -> torch.Tensor:
    """Scores, float32 (B, n), summed in float64."""
    return (queries @ items.vectors(ids).T).float()


def _nan(scores: torch.Tensor, ids: torch.Tensor, first: int, row: int) -> ValueError:
    query, place = (int(x[0]) for x in scores.isnan().nonzero(as_tuple=True))
    return ValueError(
        f"queries and items give a score that is NaN: query {row + query}, item {first + int(ids[place])}"
    )


def _by_scores(queries: torch.Tensor, items: CudaItems, first: int, k: int, row: int) -> torch.Tensor:
    """Keys (B, min(k, N)) of the best items, from all scores."""
    best: torch.Tensor | None = None
    for begin in range(0, items.N, _CHUNK):
        ids = torch.arange(begin, min(begin + _CHUNK, items.N), device=items.device)
        scores = _scores(queries, items, ids)
        if bool(scores.isnan().any()):
            raise _nan(scores, ids, first, row)
        keys = _keys_of(scores, ids)
        keys = keys if best is None else torch.cat([best, keys], dim=1)
        best = keys.topk(min(k, keys.shape[1]), dim=1).values
    assert best is not None
    return best


def checked_queries(queries: torch.Tensor, items: Sequence[CudaItems]) -> torch.Tensor:
    """`queries` for these items, contiguous; does not check that they are finite. Raises TypeError, ValueError."""
    if queries.dtype != torch.float32:
        raise TypeError(f"queries must be float32, got {queries.dtype}")
    if queries.ndim != 2 or queries.shape[1] != items[0].K:
        raise ValueError(f"queries must be (B, {items[0].K}), the items' width, got shape {tuple(queries.shape)}")
    if queries.device != items[0].device:
        raise ValueError(f"queries must be on {items[0].device}, where the items are, got {queries.device}")
    return queries.contiguous()


def check_finite(queries: torch.Tensor) -> None:
    """Raise ValueError unless all are finite. It waits for the device, so a scan makes its own check."""
    if not bool(queries.isfinite().all()):
        row, column = (int(x[0]) for x in (~queries.isfinite()).nonzero(as_tuple=True))
        raise ValueError(f"queries must be finite, got {float(queries[row, column])} in query {row}, column {column}")


@functools.cache
def _built() -> bool:
    # Not ops.cuda_info, which asks the driver about every device and takes longer than a scan.
    return importlib.util.find_spec("fastrerank._cuda") is not None


def checked_shards(items: Any) -> list[CudaItems]:
    """`items` as a list of CudaItems of one kind on one device. Raises TypeError, ValueError, RuntimeError."""
    shards = [items] if isinstance(items, CudaItems) else items
    if not isinstance(shards, Sequence) or not shards or not all(isinstance(s, CudaItems) for s in shards):
        got = type(shards[0] if isinstance(shards, Sequence) and shards else items).__name__
        raise TypeError(
            f"items must be on the queries' device, got {got}: PackedItems.to(device) brings them there, or pass "
            "queries as a NumPy array"
        )
    kinds = {(s.storage, s.K, s.scales, s.device) for s in shards} if len(shards) > 1 else set()
    if len(kinds) > 1:
        raise ValueError(
            f"items must be of one storage, width and kind of scales and on one device, got {sorted(map(str, kinds))}"
        )
    if shards[0].device.type == "cuda" and not _built():
        raise RuntimeError(
            "the CUDA kernels are not in this installation, which was built without them: install with "
            "FASTRERANK_CUDA=ON where nvcc is, or pass queries and items on the CPU"
        )
    return list(shards)
