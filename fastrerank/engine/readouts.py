"""What is read of a forward: hidden rows, means, tokens, or the attention that rows pay to keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastrerank.engine.batch import Batch, Segment

__all__ = ["Masses", "Mean", "Reading", "Readout", "Rows", "Tokens"]

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Rows:
    """One row of the last hidden states of each segment that is read, float32 (n, hidden).

    Attributes:
        at: int64 (N,), the row's place in its segment; -1 where nothing is read of a segment.
    """

    at: Ids

    @classmethod
    def last(cls, batch: Batch) -> Rows:
        """Return the readout of each segment's last row."""
        return cls(batch.lengths - 1)

    def of(self, chosen: npt.NDArray[np.integer], answers: npt.NDArray[np.bool_]) -> Rows:
        """Return the readout of some of the segments; nothing is read of those that do not answer."""
        return Rows(np.where(answers, self.at[chosen], -1))


@dataclass(frozen=True)
class Mean:
    """The mean of each segment's last hidden states, float32 (N, hidden)."""


@dataclass(frozen=True)
class Tokens:
    """The last hidden states of every token, float32 (T, hidden)."""


@dataclass(frozen=True, eq=False)
class Reading:
    """A prompt with branches whose rows' attention to some of its keys is read.

    A prompt is a context C and an instruction I, followed by one or two branches: the query Q, and a content-free query
    A in its place. They lie in one row of tokens: C and I, then Q, then A, which stand at the same positions and do not
    see each other. The mass of a key is the sum over heads and read rows of the attention that the rows pay it, each
    row with a weight of its own. With the weights of `Reading.of` it is the mean over the rows of the prompt with Q
    less that of the prompt with A.

    Attributes:
        shared: int64 (n,), context and instruction.
        branches: what follows in each branch, not empty; no branches where the instruction is read alone.
        first: the first row of `shared` that is read, at most n; the rows of branches are read all.
        begin, end: the keys whose mass is wanted, begin <= end <= first.
        weights: float32 (n - first + lengths of the branches,), of each row that is read.
    """

    shared: Ids
    branches: tuple[Ids, ...]
    first: int
    begin: int
    end: int
    weights: npt.NDArray[np.float32]

    @classmethod
    def of(
        cls,
        context: npt.NDArray[np.integer],
        tail: npt.NDArray[np.integer],
        other: npt.NDArray[np.integer] | None,
        begin: int,
        end: int,
    ) -> Reading:
        """Read the mean over the rows of `tail` behind `context`, less that over the rows of `other`, if there is one.

        What the tails begin with alike is computed once.
        """
        alike = len(tail) if other is None else _common(tail, other)
        shared = np.concatenate([context, tail[:alike]]).astype(np.int64)
        rows, branches = [np.full(alike, 1.0 / len(tail))], []
        for part, sign in ((tail, 1.0), *(() if other is None else ((other, -1.0),))):
            if sign < 0:
                rows[0] -= 1.0 / len(part)
            if len(part) > alike:
                branches.append(part[alike:].astype(np.int64))
                rows.append(np.full(len(part) - alike, sign / len(part)))
        weights = np.concatenate(rows).astype(np.float32)
        return cls(shared, tuple(branches), len(context), begin, end, weights)

    @classmethod
    def alone(cls, ids: npt.NDArray[np.integer]) -> Reading:
        """Return a context of which nothing is read, as its keys and values are kept."""
        return cls(ids.astype(np.int64), (), len(ids), 0, 0, np.zeros(0, np.float32))

    @property
    def longest(self) -> int:
        """Positions of the longest branch with what stands before it."""
        return len(self.shared) + max(map(len, self.branches), default=0)

    @property
    def tokens(self) -> int:
        """Tokens that pass through the network."""
        return len(self.shared) + sum(map(len, self.branches))

    @property
    def batch(self) -> Batch:
        """The segments: `shared`, then the branches, which have it as prefix."""
        return Batch.of(
            [Segment(self.shared, causal=True), *(Segment(b, prefix=0, causal=True) for b in self.branches)]
        )


@dataclass(frozen=True, eq=False)
class Masses:
    """The attention masses of a reading's keys, float32 (S,), S = end - begin.

    Attributes:
        reading: the rows and keys that are read.
        heads: of each layer that is read, a float32 (H,) tensor of its heads' weights, or None for all heads. No layer
            above the last one runs.
        before: keys and values of the context's tokens, which then do not pass through the network again.
        keep: takes up keys and values of its tokens, which `reading.shared` begins with.
        each: is handed the layer and its heads' masses, float32 (H, S), one layer after the other; the readout is then
            zeros.
    """

    reading: Reading
    heads: Mapping[int, Any]
    before: Any = None
    keep: Any = None
    each: Callable[[int, Any], None] | None = None


Readout = Rows | Mean | Tokens | Masses


def _common(a: npt.NDArray[np.integer], b: npt.NDArray[np.integer]) -> int:
    most = min(len(a), len(b))
    different = a[:most] != b[:most]
    return int(different.argmax()) if different.any() else most
