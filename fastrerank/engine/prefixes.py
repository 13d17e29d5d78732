"""Common prefixes of token sequences, found so that the fewest tokens pass through the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from fastrerank.engine.batch import Batch, Segment

__all__ = ["Group", "share", "share_prefixes", "to_segments"]

# A shorter common beginning is not worth an interval of its own in every row's attention.
LEAST = 8

Ids = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Group:
    """Sequences that begin with the same `length` tokens; each has at least one token more. `length` 0: one alone."""

    members: tuple[int, ...]
    length: int


def share_prefixes(sequences: Sequence[Ids], least: int = LEAST) -> list[Group]:
    """Return groups that hold every sequence once and save many tokens; a group's prefix is computed once.

    One level: a prefix has no prefix itself. Prefixes under `least` tokens are not used. Groups and members ascend.
    From the innermost common beginnings outwards, one is kept where it saves more than a wider group's would.
    Raises ValueError for an empty sequence.

    Example:
        >>> ids = [np.array([1, 2, 3]), np.array([9]), np.array([1, 2, 4, 5])]
        >>> share_prefixes(ids, least=2)
        [Group(members=(0, 2), length=2), Group(members=(1,), length=0)]
    """
    for i, ids in enumerate(sequences):
        if not len(ids):
            raise ValueError(f"sequence {i} has no tokens")
    keys = [np.asarray(ids).astype(">u4") for ids in sequences]
    order = sorted(range(len(keys)), key=lambda i: keys[i].tobytes())
    common = [_common(keys[a], keys[b]) for a, b in pairwise(order)]
    groups, alone = [], set(range(len(keys)))
    for positions, length in _best(common, least):
        members = tuple(sorted(order[position] for position in positions))
        groups.append(Group(members, length))
        alone.difference_update(members)
    groups += [Group((i,), 0) for i in alone]
    return sorted(groups, key=lambda group: group.members)


def to_segments(sequences: Sequence[Ids], groups: Sequence[Group]) -> tuple[list[Segment], npt.NDArray[np.int64]]:
    """Return causal segments for packing, and which sequence each one ends; -1 for prefixes.

    Example:
        >>> ids = [np.array([1, 2, 3]), np.array([1, 2, 4])]
        >>> to_segments(ids, [Group((0, 1), 2)])[1].tolist()
        [-1, 0, 1]
    """
    segments: list[Segment] = []
    ends: list[int] = []
    for group in groups:
        first = len(segments)
        prefix = None
        if group.length:
            prefix = first
            segments.append(Segment(np.asarray(sequences[group.members[0]])[: group.length], causal=True))
            ends.append(-1)
        for i in group.members:
            segments.append(Segment(np.asarray(sequences[i])[group.length :], prefix=prefix, causal=True))
            ends.append(i)
    return segments, np.array(ends, np.int64)


def share(batch: Batch, may: npt.NDArray[np.bool_]) -> tuple[Batch, npt.NDArray[np.int64]]:
    """Return a causal batch whose common beginnings are prefixes, and which segment of `batch` each of its ends.

    Args:
        batch: N segments without prefixes.
        may: bool (N,), whether a segment may share.

    Returns (batch, numbers): numbers is int64, -1 for prefixes.

    Example:
        >>> shared, numbers = share(Batch.of_ids([np.arange(9), np.arange(10)]), np.array([True, True]))
        >>> shared.lengths.tolist(), numbers.tolist()
        ([8, 1, 2], [-1, 0, 1])
    """
    texts = np.split(batch.ids, batch.offsets[1:-1]) if len(batch) else []
    sharing = np.flatnonzero(may)
    groups = [
        Group(tuple(int(sharing[i]) for i in group.members), group.length)
        for group in share_prefixes([texts[i] for i in sharing])
    ]
    groups += [Group((int(i),), 0) for i in np.flatnonzero(~may)]
    segments, ends = to_segments(texts, groups)
    return Batch.of(segments), ends


def _common(a: npt.NDArray[np.uint32], b: npt.NDArray[np.uint32]) -> int:
    """Length of the common beginning, less where it would be all of one of them."""
    most = min(len(a), len(b))
    different = a[:most] != b[:most]
    first = int(different.argmax()) if different.any() else most
    return min(first, most - 1)


@dataclass
class _Interval:
    """Neighbours in sorted order from `left` on that have at least `length` tokens in common."""

    length: int
    left: int
    inner: list[_Interval] = field(default_factory=list)
    saved: int = 0
    groups: list[tuple[list[int], int]] = field(default_factory=list)
    loose: list[int] = field(default_factory=list)  # members of no group, which an outer interval may take
    size: int = 0

    def close(self, right: int, least: int) -> None:
        """Settle the interval that ends at `right`: an inner one keeps its groups where that saves more."""
        self.size = right - self.left + 1
        taken: list[int] = []
        position = self.left
        for interval in self.inner:
            taken += range(position, interval.left)
            position = interval.left + interval.size
            kept = interval.saved + len(interval.loose) * self.length
            if kept > interval.size * self.length:
                self.saved += interval.saved
                self.groups += interval.groups
                taken += interval.loose
            else:
                taken += range(interval.left, position)
        taken += range(position, right + 1)
        if self.length >= least and len(taken) > 1:
            self.saved += (len(taken) - 1) * self.length
            self.groups.append((taken, self.length))
        else:
            self.loose = taken
        self.inner = []


def _best(common: Sequence[int], least: int) -> list[tuple[list[int], int]]:
    """(positions, length) of the groups chosen; common[j] is how many tokens j and j + 1 share in sorted order."""
    stack = [_Interval(0, 0)]
    for i, length in enumerate([*common, 0], start=1):
        left, closed = i - 1, None
        while length < stack[-1].length:
            closed = stack.pop()
            closed.close(i - 1, least)
            left = closed.left
            if length <= stack[-1].length:
                stack[-1].inner.append(closed)
                closed = None
        if length > stack[-1].length:
            stack.append(_Interval(length, left, [closed] if closed else []))
    stack[0].close(len(common), least)
    return stack[0].groups
