"""The packed batch: segments one after the other in one row, and four vectors that say which keys each row sees."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "Batch",
    "PackedBatch",
    "Segment",
    "distinct",
    "pack",
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


@dataclass(frozen=True, eq=False)
class Batch:
    """N segments of T tokens in all, one after the other: what `Model.run` takes.

    Attributes:
        ids: integer (T,) token ids. They stand for nothing but themselves where `embeddings` are given.
        offsets: int64 (N + 1,); segment n is rows offsets[n]:offsets[n + 1], one at least.
        types: integer (T,) token types; None for zeros.
        prefix: int64 (N,), the segment whose tokens segment n also sees, -1 for none; None where no segment has one.
        causal: bool (N,), whether a segment is causal; None: as the model's own attention is.
        embeddings: tensor (T, hidden) in place of the model's word embeddings of `ids`, on the model's device.
        position_ids: int64 (T,), or (3, T) for models that place images; None: counted as the model counts them.
    """

    ids: npt.NDArray[np.integer]
    offsets: Ids
    types: npt.NDArray[np.integer] | None = None
    prefix: Ids | None = None
    causal: npt.NDArray[np.bool_] | None = None
    embeddings: Any = None
    position_ids: Ids | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Ids:
        """Tokens of each segment, int64 (N,)."""
        return np.diff(self.offsets)

    @classmethod
    def of(cls, segments: Sequence[Segment]) -> Batch:
        """Return segments as a batch.

        Raises ValueError naming the segment for an empty one, a prefix that is out of range, its own, or has a prefix
        itself, and type ids of another length.
        """
        for i, one in enumerate(segments):
            if one.type_ids is not None and len(one.type_ids) != len(one.ids):
                raise ValueError(f"segment {i} has {len(one.ids)} tokens and {len(one.type_ids)} type ids")
        lengths = np.array([len(one.ids) for one in segments], np.int64)
        prefix = np.array([-1 if one.prefix is None else one.prefix for one in segments], np.int64)
        negative = [i for i, one in enumerate(segments) if one.prefix is not None and one.prefix < 0]
        _check_prefixes(lengths, prefix, negative)
        types = None
        if any(one.type_ids is not None for one in segments):
            types = _joined([np.zeros(len(one.ids)) if one.type_ids is None else one.type_ids for one in segments])
        return cls(
            _joined([one.ids for one in segments]),
            np.concatenate([[0], np.cumsum(lengths)]),
            types,
            prefix if (prefix >= 0).any() else None,
            np.array([one.causal for one in segments], np.bool_),
        )

    @classmethod
    def of_ids(cls, sequences: Sequence[npt.NDArray[np.integer]], *, causal: bool | None = None) -> Batch:
        """Return one segment for each sequence of ids, without prefixes.

        Example:
            >>> Batch.of_ids([np.array([7, 8]), np.array([9])]).offsets.tolist()
            [0, 2, 3]
        """
        offsets = np.cumsum([0, *map(len, sequences)], dtype=np.int64)
        kinds = None if causal is None else np.full(len(sequences), causal)
        return cls(_joined(sequences), offsets, causal=kinds)

    def take(self, chosen: npt.NDArray[np.integer]) -> Batch:
        """Return the segments `chosen`, int (n,), in this order; prefixes of theirs must be among them."""
        if len(chosen) == len(self) and (np.asarray(chosen) == np.arange(len(self))).all():
            return self
        lengths = self.lengths[chosen]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        rows = np.arange(offsets[-1]) + np.repeat(self.offsets[:-1][chosen] - offsets[:-1], lengths)
        prefix = None
        if self.prefix is not None:
            place = np.full(len(self) + 1, -1, np.int64)  # the last entry means no prefix
            place[chosen] = np.arange(len(chosen))
            prefix = place[self.prefix[chosen]]
        return Batch(
            self.ids[rows],
            offsets,
            None if self.types is None else self.types[rows],
            prefix,
            None if self.causal is None else self.causal[chosen],
            None if self.embeddings is None else self.embeddings[rows],
            None if self.position_ids is None else self.position_ids[..., rows],
        )

    def pack(self, causal: bool = False) -> PackedBatch:
        """Return the row of all segments, in order; `causal` where the batch does not say it of its segments."""
        lengths, starts, ends = self.lengths, self.offsets[:-1], self.offsets[1:]
        rows = np.arange(len(self.ids))
        lo, hi = np.repeat(starts, lengths), np.repeat(ends, lengths)
        kinds = np.full(len(rows), causal) if self.causal is None else np.repeat(self.causal, lengths)
        plo = base = np.zeros(len(rows), np.int64)
        if self.prefix is not None:
            has = self.prefix >= 0
            base = np.repeat(np.where(has, lengths[self.prefix], 0), lengths)
            plo = np.repeat(np.where(has, starts[self.prefix], 0), lengths)
        return PackedBatch(
            ids=self.ids.astype(np.int64),
            types=np.zeros(len(rows), np.int64) if self.types is None else self.types.astype(np.int64),
            positions=rows - lo + base,
            lo=lo.astype(np.int32),
            hi=np.where(kinds, rows + 1, hi).astype(np.int32),
            plo=plo.astype(np.int32),
            phi=(plo + base).astype(np.int32),
            starts=starts,
            ends=ends,
            embeddings=self.embeddings,
            position_ids=self.position_ids,
        )


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """T rows in one sequence; row i sees keys [lo_i, hi_i) and [plo_i, phi_i).

    Attributes:
        ids, types: int64 (T,) token ids and token types.
        positions: int64 (T,) from 0 in each segment, or from its prefix's length.
        lo, hi, plo, phi: int32 (T,); an empty interval has equal ends, and a row with two empty ones is padding.
        starts, ends: int64 (N,); segment n's tokens are rows starts[n]:ends[n].
        embeddings, position_ids: as in `Batch`.
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
    embeddings: Any = None
    position_ids: Ids | None = None

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
            out = np.full((*vector.shape[:-1], rows), value, vector.dtype)
            out[..., : vector.shape[-1]] = vector
            return out

        names = ["types", "positions", "lo", "hi", "plo", "phi"] + ["position_ids"] * (self.position_ids is not None)
        vectors: dict[str, Any] = {name: longer(getattr(self, name)) for name in names}
        if self.embeddings is not None:
            vectors["embeddings"] = self.embeddings.new_zeros((rows, self.embeddings.shape[1]))
            vectors["embeddings"][: len(self)] = self.embeddings
        return replace(self, ids=longer(self.ids, pad_id), **vectors)


def distinct(sequences: Sequence[npt.NDArray[np.integer]]) -> tuple[Batch, Ids]:
    """Return the different sequences of token ids as a batch, and the number in it of each sequence, int64 (N,).

    Example:
        >>> batch, numbers = distinct([np.array([7]), np.array([8, 9]), np.array([7])])
        >>> len(batch), numbers.tolist()
        (2, [0, 1, 0])
    """
    numbers: dict[bytes, int] = {}
    keys = [np.asarray(ids).astype(np.int64).tobytes() for ids in sequences]
    place = [numbers.setdefault(key, len(numbers)) for key in keys]
    return Batch.of_ids([np.frombuffer(key, np.int64) for key in numbers]), np.array(place, np.int64)


def pack(segments: Sequence[Segment]) -> PackedBatch:
    """Lay segments one after the other, in order; raises as `Batch.of`.

    Example:
        >>> batch = pack([Segment(np.array([7, 8])), Segment(np.array([9, 9]), prefix=0, causal=True)])
        >>> batch.positions.tolist(), batch.hi.tolist(), batch.phi.tolist()
        ([0, 1, 2, 3], [2, 2, 3, 4], [0, 0, 2, 2])
    """
    return Batch.of(segments).pack()


def _joined(parts: Sequence[npt.NDArray[Any]]) -> Ids:
    return np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64)


def _check_prefixes(lengths: Ids, prefix: Ids, negative: Sequence[int] = ()) -> None:
    """Raise ValueError naming a segment that is empty, or whose prefix is wrong; those of `negative` are wrong too."""
    for i in np.flatnonzero(lengths == 0):
        raise ValueError(f"segment {i} has no tokens")
    for i in (*negative, *np.flatnonzero(prefix >= 0)):
        if prefix[i] < 0 or prefix[i] >= len(prefix) or prefix[i] == i:
            raise ValueError(f"segment {i}: prefix must be the index of another segment, got {prefix[i]}")
        if prefix[prefix[i]] >= 0:
            raise ValueError(f"segment {i}: its prefix {prefix[i]} has a prefix itself")


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


def split(lengths: npt.NDArray[np.integer], prefix: Ids | None, budget: int) -> list[tuple[Ids, npt.NDArray[np.bool_]]]:
    """Split segments into batches of at most `budget` tokens; a prefix travels with its dependants.

    A group of a prefix and its dependants stays together where it fits; else its dependants are spread over several
    batches, each with the prefix. A single segment longer than the budget is a batch of its own, with its prefix.

    Args:
        lengths, prefix: as in `Batch`.

    Returns (chosen, answers) per batch: the segments' numbers, int64 (n,), and bool (n,), False for a prefix that
    another batch holds too and answers for.

    Example:
        >>> [chosen.tolist() for chosen, _ in split(np.array([4, 3, 3]), np.array([-1, 0, 0]), 8)]
        [[0, 1], [0, 2]]
    """
    sizes = np.asarray(lengths, np.int64)
    if prefix is None:
        return [(chosen, np.ones(len(chosen), np.bool_)) for chosen in split_lengths(sizes, budget)]
    if budget < 1:
        raise ValueError(f"budget must be at least 1 token, got {budget}")
    _check_prefixes(sizes, prefix)
    dependants: dict[int, list[int]] = {int(root): [] for root in np.flatnonzero(prefix < 0)}
    for i in np.flatnonzero(prefix >= 0).tolist():
        dependants[int(prefix[i])].append(i)
    units: list[list[int]] = []  # a segment and dependants of it
    repeated: set[int] = set()  # units whose first segment another unit answers for
    for root, members in dependants.items():
        room = budget - int(sizes[root])
        fits = not members or sizes[members].sum() <= room
        pieces = [np.arange(len(members))] if fits else split_lengths(sizes[members], max(1, room))
        for number, piece in enumerate(pieces):
            if number:
                repeated.add(len(units))
            units.append([root, *(members[i] for i in piece)])
    batches = []
    for numbers in split_lengths(np.array([sizes[unit].sum() for unit in units], np.int64), budget):
        chosen = [i for number in numbers.tolist() for i in units[number]]
        answers = [
            place > 0 or number not in repeated for number in numbers.tolist() for place in range(len(units[number]))
        ]
        batches.append((np.array(chosen, np.int64), np.array(answers, np.bool_)))
    return batches
