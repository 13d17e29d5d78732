"""Items packed for scans: their layout in memory."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["TILE", "PackedItems", "cur_pack"]

TILE = 16  # items of a tile
# By storage: bytes of a value, and the multiple to which the width is rounded up.
_VALUES = {"float32": (4, 16), "bfloat16": (2, 16), "int8": (1, 4)}
_LEAST_SCALE = float(np.finfo(np.float32).tiny)
_HUGE = 2.0**120  # float32 products with a longer item could overflow
_BLOCK = 4096  # items that are packed at a time, a multiple of TILE


class PackedItems:
    """N item vectors of width K in tiles of 16 items, as a scan reads them.

    `data` is uint8 (tiles, bytes of a tile), C-contiguous, and may be a memory map. A tile holds 16 items' values and
    then their norms, float32 (16,), rounded up:

    - "int8": values as value + 128, (ceil(K / 4), 16, 4): four neighbouring values of an item lie together. The norm
      is that of the int8 values, as bfloat16 in the upper half of its word. The lower half is the norm of the rounding
      error, in units of the scale, also rounded up.
    - "float32" and "bfloat16": (16, K rounded up to 16), an item's values lie together. The norm of an item that is
      longer than 2^120 is infinity.

    Padding is zero, also in the items that fill the last tile. `scale` holds the factors of int8 values: float32 (N,),
    one for each item, or (K, 1), one for each row of anchors. It is None for the other storages.

    `PackedItems(data, scale, storage=, width=, count=)` wraps such a buffer without a copy. Raises TypeError and
    ValueError naming the argument.

    Example:
        >>> items = cur_pack(np.eye(3, 20, dtype=np.float32), "int8")
        >>> again = PackedItems(items.data, items.scale, storage="int8", width=3, count=20)
        >>> again.N, again.K, again.tile, again.data is items.data
        (20, 3, 16, True)
    """

    __slots__ = ("K", "N", "data", "scale", "storage")

    def __init__(
        self,
        data: npt.NDArray[np.uint8],
        scale: npt.NDArray[np.float32] | None,
        *,
        storage: str,
        width: int,
        count: int,
    ) -> None:
        _check_storage(storage)
        for name, value, least in (("width", width, 1), ("count", count, 0)):
            if not isinstance(value, (int, np.integer)) or value < least:
                raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")
        if storage == "int8" and width > 1 << 16:
            raise ValueError(f"width must be at most 65536 for int8, whose sums are 32 bits wide, got {width}")
        shape = (-(-count // TILE), tile_bytes(storage, width))
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8:
            raise TypeError(f"data must be a uint8 NumPy array, got {getattr(data, 'dtype', type(data).__name__)}")
        if data.shape != shape or not data.flags.c_contiguous or data.ctypes.data % 4:
            raise ValueError(
                f"data must be C-contiguous {shape}, from a multiple of 4 bytes on, for {count} items of width {width} "
                f"in {storage}, got {data.shape}"
            )
        if storage != "int8":
            if scale is not None:
                raise ValueError(f"scale must be None for {storage}")
        else:
            if not isinstance(scale, np.ndarray) or scale.dtype != np.float32:
                raise TypeError(f"scale must be a float32 NumPy array for int8, got {type(scale).__name__}")
            if scale.shape not in ((count,), (width, 1)):
                raise ValueError(f"scale must be ({count},), of items, or ({width}, 1), of rows, got {scale.shape}")
            scale = np.require(scale, requirements=["C", "A"])
            if not ((scale > 0) & np.isfinite(scale)).all():
                raise ValueError("scale must be positive and finite")
        self.data, self.scale, self.storage = data, scale, storage
        self.K, self.N = int(width), int(count)

    @property
    def tile(self) -> int:
        """Items per tile."""
        return TILE

    @property
    def scales(self) -> str | None:
        """What a scale belongs to: "item", "anchor", or None."""
        if self.scale is None:
            return None
        return "item" if self.scale.ndim == 1 else "anchor"

    @property
    def nbytes(self) -> int:
        """Bytes of data and scale."""
        return int(self.data.nbytes) + (0 if self.scale is None else int(self.scale.nbytes))

    def __len__(self) -> int:
        return self.N

    def __repr__(self) -> str:
        return f"PackedItems({self.N} items of width {self.K}, {self.storage}, {self.nbytes / 1e6:.1f} MB)"

    def vectors(self, ids: npt.ArrayLike | None = None) -> npt.NDArray[np.float32]:
        """The stored values of the items `ids`, or of all: float32 (K, n), times their scales.

        Raises TypeError for ids that are not integers, IndexError for an id outside 0 .. N - 1.

        Example:
            >>> cur_pack(np.array([[0.5, 1.0]], np.float32), "bfloat16").vectors([1]).tolist()
            [[1.0]]
        """
        given = np.arange(self.N) if ids is None else np.asarray(ids)
        if given.size and given.dtype.kind not in "iu":
            raise TypeError(f"ids must be integers, got {given.dtype}")
        chosen = given.astype(np.int64).reshape(-1)
        if chosen.size and not (chosen.min() >= 0 and chosen.max() < self.N):
            raise IndexError(f"ids must be within 0 .. {self.N - 1}, got {chosen.min()} .. {chosen.max()}")
        out = self._unscaled(chosen)
        if self.scale is not None:
            out *= self.scale if self.scale.ndim == 2 else self.scale[chosen]
        return out

    def _unscaled(self, chosen: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        out = np.empty((self.K, chosen.size), np.float32)
        size, multiple = _VALUES[self.storage]
        wide = _rounded(self.K, multiple)
        for begin in range(0, chosen.size, _BLOCK):
            part = chosen[begin : begin + _BLOCK]
            tiles, lanes = np.divmod(part, TILE)
            if self.storage == "int8":
                values = self.data[:, : TILE * wide].reshape(-1, wide // 4, TILE, 4)[tiles, :, lanes]
                rows = values.reshape(-1, wide)[:, : self.K].astype(np.float32) - np.float32(128)
            elif self.storage == "bfloat16":
                halves = self.data[:, : TILE * wide * size].reshape(-1, TILE, wide * size)[tiles, lanes]
                rows = (halves.view(np.uint16).astype(np.uint32) << 16).view(np.float32)[:, : self.K]
            else:
                values = self.data[:, : TILE * wide * size].reshape(-1, TILE, wide * size)[tiles, lanes]
                rows = values.view(np.float32)[:, : self.K]
            out[:, begin : begin + part.size] = rows.T
        return out

    def to(self, device: Any) -> Any:
        """These items in the memory of a CUDA device, for `cur_topk` with queries there; needs torch.

        Raises ValueError for a device of another kind, ImportError if torch is not installed.
        """
        if importlib.util.find_spec("torch") is None:
            raise ImportError(f"items on device {str(device)!r} need torch: pip install 'fastrerank[torch]'")
        return importlib.import_module("fastrerank.ops._cur_topk.cuda").to_device(self, device)

    def append(self, vectors: npt.NDArray[np.float32]) -> PackedItems:
        """A new PackedItems with the items of `vectors`, float32 (K, n), after these.

        These items are copied and stay unchanged. Raises ValueError for a wrong shape, for NaN, and, with scales of
        anchor rows, for a value beyond its row's scale.

        Example:
            >>> cur_pack(np.eye(2, dtype=np.float32), "int8").append(np.ones((2, 3), np.float32)).N
            5
        """
        vectors = _checked(vectors, self.storage, self.K)
        scale = self.scale
        if scale is not None and scale.ndim == 2:
            over = (np.abs(vectors) > 127.5 * scale).any(axis=1).nonzero()[0]
            if over.size:
                raise ValueError(
                    f"vectors has values in row {over[0]} beyond its scale's {127.5 * scale[over[0], 0]:.6g}; "
                    "pack all items anew, or use scales of items"
                )
        start = self.N // TILE * TILE  # the last tile is packed again if it is not full
        count = self.N + vectors.shape[1]
        data = _aligned((-(-count // TILE), self.data.shape[1]))
        data[: start // TILE] = self.data[: start // TILE]
        fresh = vectors
        if start < self.N:
            fresh = np.zeros((self.K, _rounded(vectors.shape[1] + self.N - start, TILE)), np.float32)[
                :, : count - start
            ]
            fresh[:, self.N - start :] = vectors
        tail = data[start // TILE :]
        added = _pack(fresh, self.storage, scale if scale is not None and scale.ndim == 2 else None, tail)
        if start < self.N:
            kept = self.N - start
            _copy_lanes(self.data[-1], tail[0], kept, self.storage, self.K)
            if added is not None:
                added = added[kept:]
        if scale is not None and scale.ndim == 1:
            assert added is not None
            scale = np.concatenate([scale, added])
        return PackedItems(data, scale, storage=self.storage, width=self.K, count=count)


def cur_pack(vectors: npt.NDArray[np.float32], storage: str, *, scales: str | None = None) -> PackedItems:
    """Items for `cur_topk`: the columns of `vectors` in tiles, rounded to `storage`.

    Args:
        vectors: float32 (K, N), K anchor queries' scores of N items, or any items' vectors as columns.
        storage: "float32", "bfloat16" (nearest, ties to even) or "int8" (nearest multiple of a scale).
        scales: for int8, "item" (also None): an item's largest magnitude / 127; or "anchor": a row's largest magnitude
            / 127. None for other storages.

    Raises TypeError, ValueError naming the argument; NaN is refused, and so is infinity for int8.

    Example:
        >>> cur_pack(np.array([[1.0, -2.0], [0.5, 2.0]], np.float32), "int8").vectors().round(3).tolist()
        [[1.0, -2.0], [0.504, 2.0]]
    """
    _check_storage(storage)
    if scales not in (("item", "anchor", None) if storage == "int8" else (None,)):
        valid = '"item", "anchor" or None' if storage == "int8" else f"None for {storage}"
        raise ValueError(f"scales must be {valid}, got {scales!r}")
    vectors = _checked(vectors, storage, None)
    width, count = vectors.shape
    if width < 1:
        raise ValueError(f"vectors must have at least one row, got shape {vectors.shape}")
    scale = None
    if scales == "anchor":
        largest = np.abs(vectors).max(axis=1, keepdims=True, initial=0.0).astype(np.float64)
        scale = np.maximum(largest / 127, _LEAST_SCALE).astype(np.float32)
    data = _aligned((-(-count // TILE), tile_bytes(storage, width)))
    made = _pack(vectors, storage, scale, data)
    return PackedItems(data, made, storage=storage, width=width, count=count)


def tile_bytes(storage: str, width: int) -> int:
    """Bytes of a tile: 16 items' padded values, and 16 norms."""
    size, multiple = _VALUES[storage]
    return TILE * _rounded(width, multiple) * size + TILE * 4


def _rounded(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _aligned(shape: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Zeros whose first byte starts a cache line: vector loads then touch one line each."""
    size = shape[0] * shape[1]
    buffer = np.zeros(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].reshape(shape)


def _check_storage(storage: str) -> None:
    if storage not in _VALUES:
        raise ValueError(f"storage must be one of {', '.join(_VALUES)}, got {storage!r}")


def _checked(vectors: Any, storage: str, width: int | None) -> npt.NDArray[np.float32]:
    if not isinstance(vectors, np.ndarray) or vectors.dtype != np.float32:
        raise TypeError(
            f"vectors must be a float32 NumPy array, got {getattr(vectors, 'dtype', type(vectors).__name__)}"
        )
    if vectors.ndim != 2 or (width is not None and vectors.shape[0] != width):
        raise ValueError(f"vectors must be ({width or 'K'}, N), got shape {vectors.shape}")
    for begin in range(0, vectors.shape[1], _BLOCK):
        block = vectors[:, begin : begin + _BLOCK]
        bad = ~np.isfinite(block) if storage == "int8" else np.isnan(block)
        if bad.any():
            row, column = np.argwhere(bad)[0]
            valid = "finite" if storage == "int8" else "not NaN"
            raise ValueError(
                f"vectors must be {valid} for {storage}, got {block[row, column]} of item {begin + column} in row {row}"
            )
    return vectors


def _pack(
    vectors: npt.NDArray[np.float32], storage: str, scale: npt.NDArray[np.float32] | None, data: npt.NDArray[np.uint8]
) -> npt.NDArray[np.float32] | None:
    """Fill the tiles `data` with columns; returns the scales, for int8 without `scale` one per item."""
    width, count = vectors.shape
    size, multiple = _VALUES[storage]
    wide = _rounded(width, multiple)
    made = np.empty(count, np.float32) if storage == "int8" and scale is None else None
    for begin in range(0, count, _BLOCK):
        block = vectors[:, begin : begin + _BLOCK]
        n, tiles = block.shape[1], -(-block.shape[1] // TILE)
        out = data[begin // TILE : begin // TILE + tiles]
        if storage == "int8":
            if made is None:
                factor = scale
            else:
                largest = np.abs(block).max(axis=0).astype(np.float64)
                made[begin : begin + n] = np.maximum(largest / 127, _LEAST_SCALE)
                factor = made[begin : begin + n]
            assert factor is not None
            values, gone = np.zeros((2, wide, tiles * TILE), np.float64)
            np.divide(block, factor.astype(np.float64), out=gone[:width, :n])
            np.clip(np.rint(gone), -127, 127, out=values)
            gone -= values
            norms, residuals = (_above(np.sqrt(np.square(x).sum(axis=0))) for x in (values, gone))
            above = (_upper_half(norms) << 16 | _upper_half(residuals)).view(np.float32)
            stored = (values + 128).astype(np.uint8).reshape(wide // 4, 4, tiles, TILE).transpose(2, 0, 3, 1)
        else:
            rows = np.zeros((tiles * TILE, wide), np.float32)
            rows[:n, :width] = block.T
            if storage == "bfloat16":
                bits = rows.view(np.uint32)
                halves = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
                rows = (halves.astype(np.uint32) << 16).view(np.float32)
            with np.errstate(over="ignore"):
                above = _above(np.sqrt(np.square(rows, dtype=np.float64).sum(axis=1)))
            above[above > _HUGE] = np.inf
            stored = (halves if storage == "bfloat16" else rows).reshape(tiles, TILE, wide)
        out[:, : TILE * wide * size] = np.ascontiguousarray(stored).reshape(tiles, -1).view(np.uint8)
        out[:, TILE * wide * size :] = above.reshape(tiles, TILE).view(np.uint8)
    return scale if made is None else made


def _above(norms: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Upper bounds in float32, which cover the rounding errors of `norms`."""
    above: npt.NDArray[np.float32] = np.nextafter((norms * (1 + 2.0**-40)).astype(np.float32), np.float32(np.inf))
    above[norms == 0] = 0
    return above


def _upper_half(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint32]:
    """Bits of the smallest bfloat16 that is at least the value, for values of at least 0."""
    upper: npt.NDArray[np.uint32] = (values.view(np.uint32) + np.uint32(0xFFFF)) >> np.uint32(16)
    return upper


def _copy_lanes(old: npt.NDArray[np.uint8], new: npt.NDArray[np.uint8], lanes: int, storage: str, width: int) -> None:
    """Copy the first items of one tile, as stored, to another."""
    size, multiple = _VALUES[storage]
    wide = _rounded(width, multiple)
    shape = (wide // 4, TILE, 4) if storage == "int8" else (1, TILE, wide * size)
    for buffer_shape, part in ((shape, slice(0, TILE * wide * size)), ((1, TILE, 4), slice(TILE * wide * size, None))):
        new[part].reshape(buffer_shape)[:, :lanes] = old[part].reshape(buffer_shape)[:, :lanes]


def as_shards(items: Any, name: str) -> list[PackedItems]:
    """`items` as a list of PackedItems of one storage and width. Raises TypeError, ValueError."""
    if isinstance(items, PackedItems):
        return [items]
    shards = items
    if not isinstance(shards, Sequence) or not shards or not all(isinstance(s, PackedItems) for s in shards):
        raise TypeError(f"{name} must be PackedItems or a non-empty sequence of them, got {type(items).__name__}")
    kinds = {(s.storage, s.K, s.scales) for s in shards}
    if len(kinds) > 1:
        raise ValueError(f"{name} must be of one storage, width and kind of scales, got {sorted(map(str, kinds))}")
    first = shards[0].scale
    if shards[0].scales == "anchor" and any(
        s.scale is not first and not np.array_equal(s.scale, first) for s in shards
    ):
        raise ValueError(
            f"{name} must share their scales of rows: append to items of the first's, see PackedItems.append"
        )
    return list(shards)
