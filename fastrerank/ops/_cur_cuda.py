"""Exact top-k of products with packed items on a CUDA device: a rough scan, and exact scores of what it may leave."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fastrerank.ops._cur import TILE, PackedItems

__all__ = ["CudaItems", "cur_topk_cuda", "to_device"]

_MOST_K = 1024  # _wider of it is what the kernel takes at most, csrc/cuda/kernels.h
_MOST_SHARED = 1 << 16  # bytes of a query: beside a block's reservoir, what every GPU has room for
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
    keys = torch.cat([_keys(queries, shard, first, most) for first, shard in _numbered(items)], dim=1)
    for row, ids in enumerate(exclude):
        if len(ids):
            gone = torch.isin(_ids_of(keys[row]), torch.from_numpy(ids).to(keys.device))
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


def _keys(queries: torch.Tensor, items: CudaItems, first: int, k: int) -> torch.Tensor:
    """Keys (B, min(k, N)) of the best items of one shard, descending."""
    exact = queries.double()
    if items.scale is not None and items.scales == "anchor":
        exact = exact * items.scale.double().reshape(1, -1)
    wanted = _wider(k)
    shared = items.stored_width * (1 if items.storage == "int8" else 4)
    if items.storage == "float32" or k > _MOST_K or shared > _MOST_SHARED or wanted >= items.N or items.reach > _HUGE:
        return _by_scores(exact, items, first, k, 0)
    rounded, units, errors = _rounded(exact.cpu().numpy(), items)
    given = torch.from_numpy(rounded).to(items.device)
    rows = []
    for row, (unit, error) in enumerate(zip(units, errors, strict=True)):
        ids, products = _launch(given[row], items, wanted)
        query, ids = exact[row : row + 1], ids.long()
        scores = _scores(query, items, ids)
        keys = _keys_of(scores[0], first + ids).sort(descending=True).values
        # One wait for the device: the scan has run until then.
        last, kth, wrong = torch.stack([products[-1], _scores_of(keys[k - 1]), scores.isnan().any().float()]).tolist()
        if wrong:
            raise _nan(scores, ids, first, row)
        # Every other item's score is at most the last product's and the error; half a step of float32 rounding is
        # covered.
        least = last * unit + error
        least += abs(least) * 2.0**-22 + 2.0**-146
        rows.append(keys[:k] if kth > least else _by_scores(query, items, first, k, row)[0])
    return torch.stack(rows)


def _wider(k: int) -> int:
    """How many items are looked at exactly for k: rounding the query moves some past others."""
    return 2 * k + 64


def _rounded(
    queries: npt.NDArray[np.float64], items: CudaItems
) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Queries (B, stored width) as the kernel reads them, and units: an item's score is within `errors` (B,) of
    `units` (B,) times its product."""
    largest = np.abs(queries).max(axis=1, initial=0.0)
    largest[largest == 0] = 1
    if items.storage == "int8":
        units = largest / 127
        inside = queries / units[:, None]
        values = np.rint(inside)
        # |q . v - unit * q8 . v| <= |q - unit * q8| |v|, and float32 products of sums and scales.
        error = np.linalg.norm(inside - values, axis=1) + 8 * 2.0**-24 * np.linalg.norm(values, axis=1)
    else:
        units = 2.0 ** np.floor(np.log2(largest))  # |q| is brought near 1, so that nothing overflows
        values = queries / units[:, None]
        error = (items.K + 16) * 2.0**-24 * np.linalg.norm(values, axis=1)
    given = np.zeros((len(queries), items.stored_width), np.int8 if items.storage == "int8" else np.float32)
    given[:, : items.K] = values
    tiny = items.K * 2.0**-123  # what is below the smallest normal number
    return given, units, units * (error * items.reach + tiny) * 1.0001


def _launch(query: torch.Tensor, items: CudaItems, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel's ids (k,) int32 and products (k,) float32, on the current stream."""
    kernels = importlib.import_module("fastrerank._cuda")
    device = items.device
    blocks = _BLOCKS_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
    scratch = torch.empty(blocks * k, dtype=torch.int64, device=device)
    ids = torch.empty(k, dtype=torch.int32, device=device)
    products = torch.empty(k, dtype=torch.float32, device=device)
    scale = items.scale.data_ptr() if items.scale is not None and items.scales == "item" else 0
    with torch.cuda.device(device):
        kernels.cur_scan(
            items.storage == "int8", items.data.data_ptr(), items.data.shape[1], items.N, scale, 0,
            items.stored_width, query.data_ptr(), k, scratch.data_ptr(), blocks, ids.data_ptr(), products.data_ptr(),
            torch.cuda.current_stream(device).cuda_stream,
        )  # fmt: skip
    return ids, products


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
    """`queries` as they must be for these items. Raises TypeError, ValueError."""
    if queries.dtype != torch.float32:
        raise TypeError(f"queries must be float32, got {queries.dtype}")
    if queries.ndim != 2 or queries.shape[1] != items[0].K:
        raise ValueError(f"queries must be (B, {items[0].K}), the items' width, got shape {tuple(queries.shape)}")
    if queries.device != items[0].device:
        raise ValueError(f"queries must be on {items[0].device}, where the items are, got {queries.device}")
    if not bool(queries.isfinite().all()):
        row, column = (int(x[0]) for x in (~queries.isfinite()).nonzero(as_tuple=True))
        raise ValueError(f"queries must be finite, got {float(queries[row, column])} in query {row}, column {column}")
    return queries


@functools.cache
def _built() -> bool:
    # ops.cuda_info asks the driver about every device, which takes longer than a scan.
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
