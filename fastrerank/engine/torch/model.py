"""A transformers model on a device: placed, checked, and run in forwards that its memory has room for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import numpy.typing as npt
import torch

from fastrerank import ops
from fastrerank.engine.batch import Batch, split, split_equal, split_padded
from fastrerank.engine.memory import forward_budget, halved
from fastrerank.engine.prefixes import share
from fastrerank.engine.readouts import Masses, Readout, Rows, Tokens
from fastrerank.engine.torch.loading import cast_parameters
from fastrerank.engine.torch.placement import place_on, stretch, unstretched, upload
from fastrerank.engine.torch.probe import runner_of
from fastrerank.engine.usage import Cost

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Model", "Part", "Where", "place"]

Numbers = npt.NDArray[np.int64]


class Where(TypedDict, total=False):
    """Keywords that say where and how a model runs.

    dtype: "float32", "bfloat16" or "float16" for the backbone; "float32" unless it is given.
    device: "cpu", "cuda" or "cuda:N"; "cpu" unless it is given.
    num_threads: CPU threads of a call; None for torch's own setting.
    memory_limit: bytes, or a fraction of the device's memory, that the process may come to; None for 0.9.
    """

    dtype: str
    device: str
    num_threads: int | None
    memory_limit: float | None


@dataclass(frozen=True)
class Part:
    """What one forward gave: the numbers of the segments that were read, int64 (n,), their values, and its cost."""

    segments: Numbers
    values: torch.Tensor
    cost: Cost


def place(backbone: Any, *, packed: bool | None = None, whole: bool = False, **where: Unpack[Where]) -> tuple[Any, str]:
    """Cast a backbone, put it on its device, and return what runs it and why it is not packed ("" if it is).

    Args:
        backbone: a transformers model in evaluation mode; it is changed for good.
        packed, whole: as `probe.choose_runner` takes them.
        where: see `Where`.
    """
    threads = where.get("num_threads")
    ops.num_threads(threads)  # checks it
    dtype = where.get("dtype", "float32")
    cast_parameters(backbone, getattr(torch, dtype))
    backbone.to(torch.device(where.get("device", "cpu"))).eval()
    return runner_of(backbone, dtype, packed, whole=whole, num_threads=threads)


class Model:
    """A backbone that is placed: `run` reads a batch in as many forwards as its memory asks for.

    One object may be called from many threads.

    Args:
        runner: a `PackedBackbone`, a `PaddedBackbone`, or what has their `read`.
        on_cpu: tokens of one forward on a CPU without a memory limit.
        reason: why it is not packed.
        shares: whether what causal segments of a call begin with alike passes through the network once.
        noun: what a segment is called in errors.
        where: see `Where`.

    Attributes:
        budget: tokens of one forward; halved for good when a forward runs out of memory.
        max_length: tokens that the model's positions allow; None where its config names no limit.
        fixed_frequencies: whether rotary frequencies are the same whatever a row's longest text is.
    """

    def __init__(
        self,
        runner: Any,
        *,
        on_cpu: int,
        reason: str = "",
        shares: bool = False,
        noun: str = "document",
        **where: Unpack[Where],
    ) -> None:
        self.runner, self.reason, self.shares, self.noun = runner, reason, shares, noun
        self.device: torch.device = runner.device
        self._decoded = int(getattr(runner, "decoded_tokens", 0))  # by an encoder-decoder, for each segment
        self.packed: bool = runner.packed
        self.dtype = where.get("dtype", "float32")
        self.num_threads = where.get("num_threads")
        config = runner.backbone.config
        kind, limit = getattr(torch, self.dtype), where.get("memory_limit")
        self.budget = forward_budget(config, kind, self.device, limit, packed=self.packed, on_cpu=on_cpu)
        text = config.get_text_config()
        self.max_length: int | None = getattr(text, "max_position_embeddings", None)
        self.vocabulary = int(text.vocab_size)
        self._stretch = stretch(text)
        self.fixed_frequencies = self._stretch is None
        self._lock = threading.Lock()

    def run(
        self,
        batch: Batch,
        readout: Readout,
        then: Callable[[torch.Tensor], torch.Tensor] | None = None,
        *,
        on_host: bool = False,
    ) -> tuple[torch.Tensor, Cost]:
        """Return (values, cost): what the readout reads of the batch, in the segments' order.

        Args:
            batch: N segments, one at least.
            readout: see `fastrerank.engine.readouts`.
            then: applied to each forward's values, such as a head.
            on_host: whether the values come to the host, those of tokens after each forward; else they stay on the
                model's device.

        Raises ValueError naming a segment that is empty, longer than `max_length` or has ids outside the vocabulary;
        torch.OutOfMemoryError for one segment that does not fit into the device's memory.
        """
        self.check(batch)
        if not len(batch):
            raise ValueError("batch must hold at least one segment, got none")
        with torch.inference_mode(), place_on(self.num_threads, self.device):
            if isinstance(readout, Masses):
                return self._masses(batch, readout, on_host)
            numbers = np.arange(len(batch))
            parts = self._parts(batch, readout, numbers, then)
            if self.shares and _of_last_rows(batch, readout):
                parts = self._parts(*self._shared(batch), then)
            values, cost = self._joined(batch, readout, parts, on_host)
            return (values.cpu() if on_host else values), cost

    def _joined(
        self, batch: Batch, readout: Readout, parts: Iterator[Part], on_host: bool
    ) -> tuple[torch.Tensor, Cost]:
        """The values of all parts, each at its segment's place; float32 places that no part fills stay NaN."""
        tokens, cost = isinstance(readout, Tokens), Cost()
        count = int((readout.at >= 0).sum()) if isinstance(readout, Rows) else len(batch)
        place = np.cumsum(readout.at >= 0) - 1 if isinstance(readout, Rows) else np.arange(len(batch))
        result: torch.Tensor | None = None
        for part in parts:
            cost += part.cost
            values = part.values.cpu() if on_host and tokens else part.values
            rows = _rows_of(batch, part.segments) if tokens else place[part.segments]
            if result is None:
                total = len(batch.ids) if tokens else count
                if len(values) == total and (np.diff(rows) > 0).all():
                    result = values
                    continue
                result = values.new_full((total, *values.shape[1:]), float("nan"))
            result[upload(rows, values.device)] = values
        assert result is not None
        return result, cost

    def _masses(self, batch: Batch, readout: Masses, on_host: bool) -> tuple[torch.Tensor, Cost]:
        """A reading is one row: where it does not fit, nothing can be divided."""
        values = self._read(batch, readout, None)
        if values is None:
            raise self._does_not_fit(len(batch.ids))
        skipped = 0 if readout.before is None else len(readout.before.ids)
        reading = readout.reading
        cost = Cost(1, reading.tokens - skipped, max(0, len(reading.shared) - skipped))
        return (values.cpu() if on_host else values), cost

    def _parts(
        self,
        batch: Batch,
        readout: Readout,
        numbers: Numbers,
        then: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> Iterator[Part]:
        """What each forward gives. `numbers`: which segment of the caller's each one is, -1 for a common beginning."""
        waiting = self._split(batch, np.arange(len(batch)), np.ones(len(batch), np.bool_))[::-1]
        while waiting:
            chosen, answers = waiting.pop()
            part = batch.take(chosen)
            read = answers & (numbers[chosen] >= 0)
            some = readout
            if isinstance(readout, Rows):
                read &= readout.at[chosen] >= 0
                some = Rows(np.where(read, readout.at[chosen], -1))
            roots = np.zeros(0, np.int64) if part.prefix is None else np.unique(part.prefix[part.prefix >= 0])
            values = self._read(part, some, then)
            if values is not None:
                tokens = self._size(part) + len(part) * self._decoded
                cost = Cost(1, tokens, int(part.lengths[roots].sum()))
                yield Part(numbers[chosen][read], values, cost)
                continue
            if len(chosen) - len(roots) <= 1:
                raise self._does_not_fit(self._size(part))
            self.budget = halved(self.budget, self._size(part), self.device)
            again = [(chosen, answers), *waiting[::-1]]
            waiting = [piece for one in again for piece in self._split(batch, *one)][::-1]

    def _read(
        self, batch: Batch, readout: Readout, then: Callable[[torch.Tensor], torch.Tensor] | None
    ) -> torch.Tensor | None:
        """One forward; None where memory ran out, outside the handler, whose traceback keeps tensors alive."""
        try:
            with unstretched(self.runner.backbone, self._stretch, self._lock):
                values: torch.Tensor = self.runner.read(batch, readout)
                return values if then is None else then(values)
        except torch.OutOfMemoryError:
            return None

    def _does_not_fit(self, tokens: int) -> Exception:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return torch.OutOfMemoryError(f"one {self.noun} of {tokens} tokens does not fit in the memory of {self.device}")

    def _shared(self, batch: Batch) -> tuple[Batch, Rows, Numbers]:
        """The batch with common beginnings as prefixes, the readout of last rows, and the caller's segments' numbers.

        A segment that stretches the rotary frequencies shares nothing.
        """
        near = np.ones(len(batch), np.bool_) if self._stretch is None else batch.lengths <= self._stretch
        shared, numbers = share(batch, near)
        return shared, Rows(np.where(numbers >= 0, shared.lengths - 1, -1)), numbers

    def _split(
        self, batch: Batch, chosen: Numbers, answers: npt.NDArray[np.bool_]
    ) -> list[tuple[Numbers, npt.NDArray[np.bool_]]]:
        """Divide the segments `chosen` into forwards, each with the flags of those whose values it answers for."""
        some = batch.take(chosen)
        lengths, prefix, near = some.lengths, some.prefix, np.arange(len(chosen))
        parts: list[tuple[Numbers, npt.NDArray[np.bool_]]] = []
        if self._stretch is not None:  # where rotary frequencies stretch with a row's longest text, it has its own row
            roots = np.full(len(chosen), -1) if prefix is None else prefix
            far = lengths + np.where(roots < 0, 0, lengths[roots]) > self._stretch
            for i in np.flatnonzero(far):
                alone = [i] if roots[i] < 0 else [roots[i], i]
                parts.append((np.array(alone), np.arange(len(alone)) == len(alone) - 1))
            near = np.flatnonzero(~far)
            prefix = None if prefix is None else np.where(roots[near] < 0, -1, (np.cumsum(~far) - 1)[roots[near]])
        if self.packed:
            divided = split(lengths[near], prefix, self.budget)
        else:
            divide = split_padded if self.runner.pads else split_equal
            divided = [(one, np.ones(len(one), np.bool_)) for one in divide(lengths[near], self.budget)]
        parts += [(near[one], flags) for one, flags in divided]
        return [(chosen[one], answers[one] & flags) for one, flags in parts]

    def _size(self, batch: Batch) -> int:
        return len(batch.ids) if self.packed else int(batch.lengths.max()) * len(batch)

    def check(self, batch: Batch) -> None:
        """Raise ValueError naming a segment that `run` would refuse."""
        ids, offsets, types, noun = batch.ids, batch.offsets, batch.types, self.noun
        if offsets.ndim != 1 or not len(offsets) or offsets[0] != 0 or offsets[-1] != len(ids):
            raise ValueError(f"offsets must go from 0 to the number of ids, {len(ids)}, got {offsets}")
        lengths = batch.lengths
        if (lengths < 0).any():
            raise ValueError(f"offsets must not decrease, got {offsets}")
        if (lengths == 0).any():
            raise ValueError(f"{noun} {int(np.argmin(lengths))} has no tokens")
        if types is not None and len(types) != len(ids):
            raise ValueError(f"types must have as many entries as ids: {len(ids)}, got {len(types)}")
        if not len(ids):
            return
        total = lengths if batch.prefix is None else lengths + np.where(batch.prefix < 0, 0, lengths[batch.prefix])
        if self.max_length is not None and total.max() > self.max_length:
            longest = int(np.argmax(total > self.max_length))
            raise ValueError(f"{noun} {longest} has {total[longest]} tokens, the model takes {self.max_length}")
        if batch.embeddings is None and (int(ids.min()) < 0 or int(ids.max()) >= self.vocabulary):
            at = int(np.argmax((ids < 0) | (ids >= self.vocabulary)))
            number = int(np.searchsorted(offsets, at, side="right")) - 1
            raise ValueError(f"{noun} {number}: token id {ids[at]} is outside the vocabulary of {self.vocabulary}")


def _of_last_rows(batch: Batch, readout: Readout) -> bool:
    """Whether the last row is read of plain token ids, so that a common beginning is read by nobody."""
    plain = batch.prefix is None and batch.embeddings is None and batch.position_ids is None
    return plain and isinstance(readout, Rows) and bool((readout.at == batch.lengths - 1).all())


def _rows_of(batch: Batch, segments: Numbers) -> Numbers:
    """The rows of segments in the batch, one segment after the other."""
    lengths = batch.lengths[segments]
    ends = np.cumsum(lengths)
    rows: Numbers = np.arange(ends[-1]) + np.repeat(batch.offsets[:-1][segments] - (ends - lengths), lengths)
    return rows
