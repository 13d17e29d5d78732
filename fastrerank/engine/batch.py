"""The packed batch: segments one after the other in one row, and four vectors that say which keys each row sees."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "PackedBatch",
    "Segment",
    "check_ids",
    "pack",
    "pack_documents",
    "shares",
    "split",
    "split_equal",
    "split_lengths",
    "split_padded",
]

Ids = npt.NDArray[np.int64]
Vector = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Segment:
    """Tokens that see each other and, where there is one, a prefix.

    Attributes:
        ids: (n,) token ids, n >= 1.
        type_ids: (n,) token types; None for zeros.
        prefix: index, in the list that this segment is in, of the segment whose tokens this one also sees. A prefix has
            no prefix of its own.
        causal: whether a token sees only itself and what stands before it; a prefix is seen whole.
    """

    ids: npt.NDArray[np.integer]
    type_ids: npt.NDArray[np.integer] | None = None
    prefix: int | None = None
    causal: bool = False


@dataclass(frozen=True)
class PackedBatch:
    """T rows in one sequence; row i sees keys [lo_i, hi_i) and [plo_i, phi_i).

    Attributes:
        ids, types: int64 (T,) token ids and token types.
        positions: int64 (T,) from 0 in each segment, or from its prefix's length.
        lo, hi, plo, phi: int32 (T,); an empty interval has equal ends, and a row with two empty ones is padding.
        starts, ends: int64 (N,); segment n's tokens are rows starts[n]:ends[n].
    """

    ids: Ids
    types: Ids
    positions: Ids
    lo: Vector
    hi: Vector
    plo: Vector
    phi: Vector
    starts: Ids
    ends: Ids

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def alone(self) -> int:
        """Rows at the beginning of which none has a prefix.

        Example:
            >>> pack([Segment(np.arange(2)), Segment(np.arange(3), prefix=0)]).alone
            2
        """
        prefixed = self.phi > self.plo
        return int(prefixed.argmax()) if prefixed.any() else len(self)

    def windowed(self, size: int) -> tuple[Vector, Vector, Vector, Vector]:
        """Return (lo, hi, plo, phi) of rows that see only keys at positions nearer than `size`: |i - j| < size.

        This is the number that transformers hands its attention functions: Mistral's and Gemma's `sliding_window`, and
        local_attention // 2 + 1 for ModernBERT, whose window counts both ends. Raises ValueError below 1.

        Example:
            >>> pack([Segment(np.arange(4))]).windowed(2)[:2]
            (array([0, 0, 1, 2], dtype=int32), array([2, 3, 4, 4], dtype=int32))
        """
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        rows = np.arange(len(self), dtype=np.int64)
        seen = self.hi > self.lo
        lo = np.where(seen, np.maximum(self.lo, rows - size + 1), self.lo)
        hi = np.where(seen, np.minimum(self.hi, rows + size), self.hi)
        # Prefixes start at position 0, so the key at position p is row plo + p.
        plo = np.minimum(self.phi, np.maximum(self.plo, self.plo + self.positions - size + 1))
        return lo.astype(np.int32), hi.astype(np.int32), plo.astype(np.int32), self.phi

    def padded_to(self, rows: int, pad_id: int = 0) -> PackedBatch:
        """Return the batch with rows appended that see nothing, `rows` in all; ValueError if there are more already."""
        missing = rows - len(self)
        if missing < 0:
            raise ValueError(f"rows must be at least the batch's {len(self)}, got {rows}")

        def longer(vector: npt.NDArray[Any], value: int = 0) -> npt.NDArray[Any]:
            out = np.full(rows, value, vector.dtype)
            out[: len(vector)] = vector
            return out

        names = ("types", "positions", "lo", "hi", "plo", "phi")
        return replace(self, ids=longer(self.ids, pad_id), **{name: longer(getattr(self, name)) for name in names})


def check_ids(ids: npt.NDArray[np.integer] | Sequence[int], vocabulary: int, where: str = "") -> None:
    """Raise ValueError if a token id of `ids` (T,) is not in 0 .. vocabulary - 1; the message begins with `where`.

    Example:
        >>> check_ids(np.array([0, 7]), 8)
    """
    if not len(ids):
        return
    for wrong in (int(np.min(ids)), int(np.max(ids))):
        if not 0 <= wrong < vocabulary:
            raise ValueError(f"{where}token id {wrong} is outside the vocabulary of {vocabulary}")


def pack(segments: Sequence[Segment]) -> PackedBatch:
    """Lay segments one after the other, in order.

    Raises ValueError naming the segment for an empty one, a prefix that is out of range, its own, or has a prefix
    itself, and type ids of another length.

    Example:
        >>> batch = pack([Segment(np.array([7, 8])), Segment(np.array([9, 9]), prefix=0, causal=True)])
        >>> batch.positions.tolist(), batch.hi.tolist(), batch.phi.tolist()
        ([0, 1, 2, 3], [2, 2, 3, 4], [0, 0, 2, 2])
    """
    _check(segments)
    lengths = np.array([len(segment.ids) for segment in segments], np.int64)
    ends = np.cumsum(lengths)
    prefix = np.array([-1 if segment.prefix is None else segment.prefix for segment in segments], np.int64)
    causal = np.array([segment.causal for segment in segments], np.bool_)
    ids = [np.asarray(segment.ids, np.int64) for segment in segments]
    types = [
        np.zeros(len(segment.ids), np.int64) if segment.type_ids is None else segment.type_ids.astype(np.int64)
        for segment in segments
    ]
    none = [np.zeros(0, np.int64)]
    return _assemble(np.concatenate(none + ids), np.concatenate(none + types), lengths, ends, prefix, causal)


def pack_documents(
    ids: npt.NDArray[np.integer],
    types: npt.NDArray[np.integer] | None,
    offsets: npt.NDArray[np.integer],
    chosen: npt.NDArray[np.integer],
    causal: bool,
) -> PackedBatch:
    """Return `pack` of the documents ids[offsets[d]:offsets[d+1]] for d in `chosen`, without prefixes."""
    lengths = np.diff(offsets)[chosen].astype(np.int64)
    ends = np.cumsum(lengths)
    rows = np.arange(lengths.sum()) + np.repeat(np.asarray(offsets)[chosen] - (ends - lengths), lengths)
    taken = np.zeros(len(rows), np.int64) if types is None else types[rows].astype(np.int64)
    none, kind = np.full(len(lengths), -1, np.int64), np.full(len(lengths), causal)
    return _assemble(ids[rows].astype(np.int64), taken, lengths, ends, none, kind)


def _assemble(
    ids: Ids, types: Ids, lengths: Ids, ends: Ids, prefix: npt.NDArray[np.int64], causal: npt.NDArray[np.bool_]
) -> PackedBatch:
    starts = ends - lengths
    rows = np.arange(len(ids))
    base = np.where(prefix >= 0, lengths[prefix], 0) if len(lengths) else lengths
    lo, hi = np.repeat(starts, lengths), np.repeat(ends, lengths)
    plo = np.repeat(np.where(base > 0, starts[prefix], 0) if len(lengths) else starts, lengths)
    return PackedBatch(
        ids=ids,
        types=types,
        positions=rows - lo + np.repeat(base, lengths),
        lo=lo.astype(np.int32),
        hi=np.where(np.repeat(causal, lengths), rows + 1, hi).astype(np.int32),
        plo=plo.astype(np.int32),
        phi=(plo + np.repeat(base, lengths)).astype(np.int32),
        starts=starts,
        ends=ends,
    )


def _check(segments: Sequence[Segment]) -> None:
    for i, segment in enumerate(segments):
        if len(segment.ids) == 0:
            raise ValueError(f"segment {i} has no tokens")
        if segment.type_ids is not None and len(segment.type_ids) != len(segment.ids):
            raise ValueError(f"segment {i} has {len(segment.ids)} tokens and {len(segment.type_ids)} type ids")
        if segment.prefix is not None:
            if not 0 <= segment.prefix < len(segments) or segment.prefix == i:
                raise ValueError(f"segment {i}: prefix must be the index of another segment, got {segment.prefix}")
            if segments[segment.prefix].prefix is not None:
                raise ValueError(f"segment {i}: its prefix {segment.prefix} has a prefix itself")


def split_lengths(lengths: npt.NDArray[np.integer], budget: int) -> list[npt.NDArray[np.int64]]:
    """Split items into batches of at most `budget` tokens, one item at least; batches are even, positions ascend.

    The longest item goes first, each to the batch that holds the least and has room. Raises ValueError for budget < 1.

    Example:
        >>> [batch.tolist() for batch in split_lengths(np.array([4, 1, 5, 2]), 6)]
        [[1, 2], [0, 3]]
    """
    if budget < 1:
        raise ValueError(f"budget must be at least 1 token, got {budget}")
    if not len(lengths):
        return []
    if lengths.sum() <= budget:
        return [np.arange(len(lengths))]
    count = -(-int(lengths.sum()) // budget)
    batches: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, number) for number in range(count)]
    for item in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = int(lengths[item])
        load, number = loads[0]
        if load and load + length > budget:
            number, load = len(batches), 0
            batches.append([item])
            heapq.heappush(loads, (length, number))
        else:
            batches[number].append(item)
            heapq.heapreplace(loads, (load + length, number))
    return [np.sort(np.array(batch, np.int64)) for batch in batches if batch]


def shares(lengths: npt.NDArray[np.integer], count: int) -> list[npt.NDArray[np.int64]]:
    """Share items out to `count` workers, evenly by tokens; positions ascend in each share, and a share may be empty.

    Example:
        >>> [share.tolist() for share in shares(np.array([4, 1, 5, 2]), 2)]
        [[1, 2], [0, 3]]
    """
    parts: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, number) for number in range(count)]
    for item in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        load, number = loads[0]
        parts[number].append(item)
        heapq.heapreplace(loads, (load + int(lengths[item]), number))
    return [np.sort(np.array(part, np.int64)) for part in parts]


def split_padded(lengths: npt.NDArray[np.integer], budget: int) -> list[npt.NDArray[np.int64]]:
    """Split items into batches of similar lengths, longest first, of at most `budget` tokens with their padding.

    A batch holds one item at least. Raises ValueError for budget < 1.

    Example:
        >>> [batch.tolist() for batch in split_padded(np.array([4, 1, 5, 2]), 10)]
        [[2, 0], [3, 1]]
    """
    if budget < 1:
        raise ValueError(f"budget must be at least 1 token, got {budget}")
    order = np.argsort(-np.asarray(lengths), kind="stable")
    batches = []
    while len(order):
        count = max(1, budget // int(lengths[order[0]]))
        batches.append(order[:count])
        order = order[count:]
    return batches


def split_equal(lengths: npt.NDArray[np.integer], budget: int) -> list[npt.NDArray[np.int64]]:
    """Split items into batches of one length each, longest first, of at most `budget` tokens or one item.

    Example:
        >>> [batch.tolist() for batch in split_equal(np.array([4, 1, 4, 4]), 10)]
        [[0, 2], [3], [1]]
    """
    sizes = np.asarray(lengths)
    groups = [np.flatnonzero(sizes == size) for size in np.unique(sizes)[::-1]]
    return [group[part] for group in groups for part in split_padded(sizes[group], budget)]


def split(segments: Sequence[Segment], budget: int) -> list[tuple[list[Segment], npt.NDArray[np.int64]]]:
    """Split segments into batches of at most `budget` tokens; a prefix travels with its dependants.

    A group of a prefix and its dependants stays together where it fits; else its dependants are spread over several
    batches, each with the prefix. A single segment longer than the budget is a batch of its own, with its prefix.

    Returns (segments, index) per batch: index[n] is where the batch's segment n stands in the whole list, or -1 for a
    prefix that another batch holds too and answers for.

    Example:
        >>> parts = [Segment(np.arange(4)), Segment(np.arange(3), prefix=0), Segment(np.arange(3), prefix=0)]
        >>> [index.tolist() for _, index in split(parts, 8)]
        [[0, 1], [-1, 2]]
    """
    _check(segments)
    if budget < 1:
        raise ValueError(f"budget must be at least 1 token, got {budget}")
    dependants: dict[int, list[int]] = {i: [] for i, segment in enumerate(segments) if segment.prefix is None}
    for i, segment in enumerate(segments):
        if segment.prefix is not None:
            dependants[segment.prefix].append(i)
    units: list[list[int]] = []  # a segment and dependants of it
    repeated: set[int] = set()  # units whose first segment another unit answers for
    for root, members in dependants.items():
        lengths = np.array([len(segments[i].ids) for i in members], np.int64)
        room = budget - len(segments[root].ids)
        fits = not members or lengths.sum() <= room
        pieces = [np.arange(len(members))] if fits else split_lengths(lengths, max(1, room))
        for number, piece in enumerate(pieces):
            if number:
                repeated.add(len(units))
            units.append([root, *(members[i] for i in piece)])
    sizes = np.array([sum(len(segments[i].ids) for i in unit) for unit in units], np.int64)
    batches = []
    for chosen in split_lengths(sizes, budget):
        taken: list[Segment] = []
        index: list[int] = []
        for number in chosen.tolist():
            root, *members = units[number]
            first = len(taken)
            taken += [segments[root], *(replace(segments[i], prefix=first) for i in members)]
            index += [-1 if number in repeated else root, *members]
        batches.append((taken, np.array(index, np.int64)))
    return batches
