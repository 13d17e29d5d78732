"""Exact top-k of products with packed items on a CUDA device: csrc/cuda/cur_topk.cu, or the scores of all items."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastrerank.ops._cur import TILE, PackedItems

__all__ = ["CudaItems", "cur_topk_cuda", "to_device"]

_MOST_K = 1024  # _wider of it is what the kernels take at most, csrc/cuda/kernels.h
# What the kernels say of a row, csrc/cuda/kernels.h; what lies between is left to the scores of all items.
_EXACT, _NOT_FINITE = 0, 3
_MOST_SHARED = 1 << 16  # bytes of a query in float64: beside a block's reservoir, what every GPU has room for
_BLOCKS_PER_MULTIPROCESSOR = 4
_CHUNK = 1 << 17  # items whose vectors are made float64 at a time
_HUGE = 2.0**120


@dataclass(frozen=True, repr=False)
class CudaItems:
    """Packed items in a device's memory, from `PackedItems.to`: `data` and `scale` are its arrays as tensors.

    `reach` is the largest norm of an item, its scale multiplied in: what bounds the error of a rough score.
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
        """The stored values of the items, float64 (n, K), scales of items multiplied in, those of anchors not."""
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
    queries: Any, items: Any, k: int, exclude: list[np.ndarray[Any, Any]], keep: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`ops.cur_topk` of checked arguments; `keep` columns, `exclude` the ids that each query leaves out."""
    most = k + max(map(len, exclude), default=0)
    shards = _numbered(items)
    if len(shards) == 1 and most == k:
        ids, scores = _best(queries, shards[0][1], 0, k)
        return (ids, scores) if keep == ids.shape[1] else (ids[:, :keep], scores[:, :keep])
    keys = torch.cat([_keys_of(*_best(queries, shard, first, most)[::-1]) for first, shard in shards], dim=1)
    for row, gone in enumerate(exclude):
        if len(gone):
            left_out = torch.isin(_ids_of(keys[row]), torch.from_numpy(gone).to(keys.device))
            keys[row] = torch.where(left_out, _NO_KEY, keys[row])
    best = keys.topk(keep, dim=1).values
    there = best != _NO_KEY
    return (
        torch.where(there, _ids_of(best), -1),
        torch.where(there, _scores_of(best), -torch.inf),
    )


def _numbered(items: Sequence[CudaItems]) -> list[tuple[int, CudaItems]]:
    firsts = np.cumsum([0, *(shard.N for shard in items)])
    return [(int(first), shard) for first, shard in zip(firsts, items, strict=False) if shard.N]


# A score and an id as one int64 that is larger for what comes first: no two are equal, so that sorting has one result.
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


def _best(queries: torch.Tensor, items: CudaItems, first: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids int64 and scores float32 (B, min(k, N)) of the best items of one shard, by score, then by id."""
    wanted = _wider(k)
    shared = 8 * items.stored_width
    if items.storage == "float32" or k > _MOST_K or shared > _MOST_SHARED or wanted >= items.N or items.reach > _HUGE:
        if not bool(queries.isfinite().all()):
            raise _not_finite(queries)
        keys = _by_scores(_exact(queries, items), items, first, k, 0)
        return _ids_of(keys), _scores_of(keys)
    ids, scores, status = _launch(queries.contiguous(), items, first, k, wanted)
    for row, found in enumerate(status.tolist()):  # waits for the device, once for all queries
        if found == _NOT_FINITE:
            raise _not_finite(queries)
        if found != _EXACT:  # a score that is NaN is named there
            keys = _by_scores(_exact(queries[row : row + 1], items), items, first, k, row)
            ids[row], scores[row] = _ids_of(keys[0]), _scores_of(keys[0])
    return ids, scores


def _wider(k: int) -> int:
    """How many items are looked at exactly for k: rounding the query moves some past others."""
    return 2 * k + 64


def _exact(queries: torch.Tensor, items: CudaItems) -> torch.Tensor:
    """float64 (B, K), scales of anchors multiplied in."""
    exact = queries.double()
    if items.scale is not None and items.scales == "anchor":
        exact = exact * items.scale.double().reshape(1, -1)
    return exact


def _launch(
    queries: torch.Tensor, items: CudaItems, first: int, k: int, wanted: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids int64 (B, k), scores float32 (B, k) and status int32 (B,) of the kernels, on the current stream."""
    kernels = importlib.import_module("fastrerank._cuda")
    device, rows = items.device, len(queries)
    blocks = _BLOCKS_PER_MULTIPROCESSOR * _multiprocessors(device)
    ids = torch.empty((rows, k), dtype=torch.int64, device=device)
    scores = torch.empty((rows, k), dtype=torch.float32, device=device)
    status = torch.empty(rows, dtype=torch.int32, device=device)
    if not rows:
        return ids, scores, status
    size = kernels.cur_topk_scratch(items.storage == "int8", items.stored_width, rows, wanted, blocks)
    scratch = torch.empty(size, dtype=torch.uint8, device=device)
    scale = 0 if items.scale is None else items.scale.data_ptr()
    with torch.cuda.device(device):
        kernels.cur_topk(
            items.storage == "int8", items.data.data_ptr(), items.data.shape[1], items.N,
            scale if items.scales == "item" else 0, scale if items.scales == "anchor" else 0, first, items.K,
            items.stored_width, items.reach, queries.data_ptr(), rows, k, wanted, blocks, scratch.data_ptr(),
            ids.data_ptr(), scores.data_ptr(), status.data_ptr(), torch.cuda.current_stream(device).cuda_stream,
        )  # fmt: skip
    return ids, scores, status


@functools.cache
def _built() -> bool:
    return importlib.util.find_spec("fastrerank._cuda") is not None


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def _scores(queries: torch.Tensor, items: CudaItems, ids: torch.Tensor) -> torch.Tensor:
    """float32 (B, n): sums in float64."""
    return (queries @ items.vectors(ids).T).float()


def _nan(scores: torch.Tensor, ids: torch.Tensor, first: int, row: int) -> ValueError:
    query, place = (int(x[0]) for x in scores.isnan().nonzero(as_tuple=True))
    return ValueError(
        f"queries and items give a score that is NaN: query {row + query}, item {first + int(ids[place])}"
    )


def _by_scores(queries: torch.Tensor, items: CudaItems, first: int, k: int, row: int) -> torch.Tensor:
    """Keys (B, min(k, N)) of the best items, from the scores of all."""
    best: torch.Tensor | None = None
    for begin in range(0, items.N, _CHUNK):
        ids = torch.arange(begin, min(begin + _CHUNK, items.N), device=items.device)
        scores = _scores(queries, items, ids)
        if bool(scores.isnan().any()):
            raise _nan(scores, ids, first, row)
        keys = _keys_of(scores, first + ids)
        keys = keys if best is None else torch.cat([best, keys], dim=1)
        best = keys.topk(min(k, keys.shape[1]), dim=1).values
    assert best is not None
    return best


def checked_queries(queries: torch.Tensor, items: Sequence[CudaItems]) -> torch.Tensor:
    """`queries` if they fit these items; whether they are finite is seen later. Raises TypeError, ValueError."""
    if queries.dtype != torch.float32:
        raise TypeError(f"queries must be float32, got {queries.dtype}")
    if queries.ndim != 2 or queries.shape[1] != items[0].K:
        raise ValueError(f"queries must be (B, {items[0].K}), the items' width, got shape {tuple(queries.shape)}")
    if queries.device != items[0].device:
        raise ValueError(f"queries must be on {items[0].device}, where the items are, got {queries.device}")
    return queries


def _not_finite(queries: torch.Tensor) -> ValueError:
    row, column = (int(x[0]) for x in (~queries.isfinite()).nonzero(as_tuple=True))
    return ValueError(f"queries must be finite, got {float(queries[row, column])} in query {row}, column {column}")


def checked_shards(items: Any) -> list[CudaItems]:
    """`items` as a list of CudaItems of one kind on one device. Raises TypeError, ValueError, RuntimeError."""
    shards = [items] if isinstance(items, CudaItems) else items
    if not isinstance(shards, Sequence) or not shards or not all(isinstance(s, CudaItems) for s in shards):
        got = type(shards[0] if isinstance(shards, Sequence) and shards else items).__name__
        raise TypeError(
            f"items must be on the queries' device, got {got}: PackedItems.to(device) brings them there, or pass "
            "queries as a NumPy array"
        )
    kinds = {(s.storage, s.K, s.scales, str(s.device)) for s in shards}
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
