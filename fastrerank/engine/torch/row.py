"""A packed row while its model runs: the attention calls of a Hugging Face model, answered by `ops.attention`.

transformers hands q, k and v of every layer, rotary positions applied, to the attention function that is registered
under the model's `attn_implementation`. Ours looks up the row that this thread is running, so nothing depends on which
keyword arguments a family passes down. No mask function is registered under our name: transformers then builds no mask,
for attention that needs none.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AttentionInterface

from fastrerank.engine.batch import PackedBatch
from fastrerank.engine.readouts import Masses, Reading
from fastrerank.engine.torch.placement import upload
from fastrerank.ops import attention, attention_mass

__all__ = ["IMPLEMENTATION", "CannotPack", "Kept", "MassReader", "PassEnded", "Row", "answering", "running"]

IMPLEMENTATION = "fastrerank"
# Tensors that families pass to every attention function and that do not say which rows see which keys.
_HARMLESS = {"position_ids", "cache_position", "position_embeddings", "token_type_ids"}
# From so many rows without a prefix at a batch's beginning, a GPU computes them in a launch of their own. Their kernel
# is simpler. Above all, a tile that mixes rows with and without a prefix finds no block of keys that all rows see.
_ALONE = 1024

_running = threading.local()


class CannotPack(RuntimeError):
    """The model computes something that packed rows do not; says what. Loading then takes another way, or refuses."""


class PassEnded(Exception):
    """Ends a Hugging Face module's forward inside its attention call, where nothing that follows is wanted.

    A module of somebody else's has no other way to return early. A pruned layer catches it after the run that computes
    its keys and values; the model's forward catches it after the last layer whose attention is read.
    """


class Row:
    """A packed row's numbers on a device, and what its forward is asked for.

    Attributes:
        table: int32 (6 + 4 W + P, T) as `PackedBackbone.table` lays it out.
        windows: the W windows of the model's layers.
        alone: rows at the beginning of which none has a prefix.
        chosen: rows that the last layer computes; None for all.
        masses: reads attention masses on the way; None where they are not wanted.
        embeddings: (T, hidden) in place of the ids' word embeddings, or None.
        layer: the number of the attention call that was answered last.
        keys_only: whether the last layer's first run is on, which ends at its keys and values.
        kept: keys and values of the last layer after its first run, (T, Hkv, D) each.
    """

    def __init__(
        self,
        table: torch.Tensor,
        windows: tuple[int, ...],
        alone: int,
        *,
        chosen: torch.Tensor | None = None,
        masses: MassReader | None = None,
        embeddings: torch.Tensor | None = None,
    ) -> None:
        self.table, self.windows, self.alone = table, windows, alone
        self.chosen, self.masses, self.embeddings = chosen, masses, embeddings
        self.layer = -1
        self.keys_only = False
        self.kept: tuple[torch.Tensor, torch.Tensor] | None = None

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return int64 token ids (1, T), token types (1, T) and position ids (1, T), or (3, 1, T) of three rows."""
        ids, types = self.table[:2].long()[:, None]
        positions = self.table[6 + 4 * len(self.windows) :].long()[:, None]
        return ids, types, positions[0] if len(positions) == 1 else positions

    def answer(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        window: int | None,
        scale: float | None,
        softcap: float,
    ) -> torch.Tensor:
        """Return attention (1, rows, H, D) of query (1, H, rows, D), key and value (1, Hkv, T, D)."""
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        if self.kept is not None:  # the last layer's second run: its chosen rows
            k, v = self.kept
        else:
            self.layer += 1
            if self.masses is not None:
                k, v = self.masses.extended(self, k, v)
            if self.keys_only:
                self.kept = (k, v)
                raise PassEnded
        if self.masses is not None:
            return self.masses.answer(self, q, k, v, window, scale, softcap)
        rows = None if self.kept is None else self.chosen
        return self.attend(q, k, v, window, scale, softcap, rows=rows)[0][None]

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        window: int | None,
        scale: float | None,
        softcap: float,
        *,
        rows: torch.Tensor | None = None,
        return_lse: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return (out, lse) of `ops.attention`, for all rows or (q has these only) for `rows`; lse where asked for."""
        spans, count = self.intervals(window), self.table.shape[1]

        def some(
            q: torch.Tensor, spans: torch.Tensor, prefixed: bool, out: torch.Tensor | None = None
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            lo, hi, *prefix = spans if prefixed else spans[:2]
            plo, phi = prefix or (None, None)
            if return_lse:
                return attention(q, k, v, lo, hi, plo, phi, scale=scale, softcap=softcap, out=out, return_lse=True)
            return attention(q, k, v, lo, hi, plo, phi, scale=scale, softcap=softcap, out=out), None

        if rows is not None:
            return some(q, spans[:, rows], self.alone < count)
        if not (q.is_cuda and _ALONE <= self.alone < count):
            return some(q, spans, self.alone < count)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        parts = [
            some(q[part], spans[:, part], prefixed, out[part])
            for part, prefixed in ((slice(None, self.alone), False), (slice(self.alone, None), True))
        ]
        return out, torch.cat([lse for _, lse in parts if lse is not None]) if return_lse else None

    def intervals(self, window: int | None) -> torch.Tensor:
        """Return int32 (4, T): lo, hi, plo, phi of layers that see no further than `window` positions."""
        if window is None:
            return self.table[2:6]
        if window not in self.windows:
            raise CannotPack(f"a layer has a window of {window}, which no part of the model announces")
        begin = 6 + 4 * self.windows.index(window)
        return self.table[begin : begin + 4]


class Kept:
    """Keys and values of a context, layer by layer: (C, Hkv, D) tensors; of the last layer that is read the keys."""

    def __init__(self, ids: npt.NDArray[np.int64]) -> None:
        self.ids = ids
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors hold."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.keys, *self.values))


class MassReader:
    """Reads a `Masses` readout layer by layer while its row runs.

    Nothing of size (rows, keys) exists; a layer's keys and values are let go of when the next one begins.

    Args:
        readout: what to read.
        batch: the reading's packed row.
        device: where the row runs.

    Attributes:
        mass: the result so far, float32 (S,).
        last: the last layer that is read.
    """

    def __init__(self, readout: Masses, batch: PackedBatch, device: torch.device) -> None:
        self._readout, self._batch, self._device = readout, batch, device
        reading = readout.reading
        self._count = reading.tokens - reading.first
        self._weights = upload(reading.weights, device)
        self._spans: dict[int | None, tuple[torch.Tensor, ...]] = {}
        self.last = max(readout.heads)
        self.mass = torch.zeros(reading.end - reading.begin, dtype=torch.float32, device=device)

    def extended(self, row: Row, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's keys and values behind those that were kept before, and keep those that are asked for."""
        before, keep = self._readout.before, self._readout.keep
        if row.keys_only and row.layer != self.last:
            raise CannotPack(
                f"the model's last layer is its attention call {row.layer}, not {self.last}: a layer calls it "
                "more than once, or not at all"
            )
        if keep is not None:
            keep.keys.append(k[: len(keep.ids)].contiguous())
            if not row.keys_only:
                keep.values.append(v[: len(keep.ids)].contiguous())
        if row.layer == self.last and not self._count:
            raise PassEnded
        if before is None:
            return (k, k) if row.keys_only else (k, v)
        k = torch.cat([before.keys[row.layer], k])
        return (k, k) if row.keys_only else (k, torch.cat([before.values[row.layer], v]))

    def answer(
        self,
        row: Row,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        window: int | None,
        scale: float | None,
        softcap: float,
    ) -> torch.Tensor:
        """Return what `Row.answer` returns, after the masses of a layer that is read; ends the pass after the last."""
        assert row.chosen is not None
        rows = row.chosen[: self._count]
        if row.kept is not None:
            q = q[: self._count]
            _, lse = row.attend(q, k, k, window, scale, softcap, rows=rows, return_lse=True)
            self._take(row.layer, q, k, lse, window, scale, softcap)
            raise PassEnded
        if row.layer not in self._readout.heads or not self._count:
            return row.attend(q, k, v, window, scale, softcap)[0][None]
        out, lse = row.attend(q, k, v, window, scale, softcap, return_lse=True)
        assert lse is not None
        self._take(row.layer, q[rows], k, lse[rows], window, scale, softcap)
        if row.layer == self.last:
            raise PassEnded
        return out[None]

    def _take(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        lse: torch.Tensor | None,
        window: int | None,
        scale: float | None,
        softcap: float,
    ) -> None:
        """Add a layer's masses, or hand them out by head."""
        assert lse is not None
        reading, each = self._readout.reading, self._readout.each
        if window not in self._spans:
            self._spans[window] = tuple(upload(ends, self._device) for ends in _seen(self._batch, reading, window))
        keys, (first, last) = k[reading.begin : reading.end], self._spans[window]
        if each is not None:
            each(
                layer,
                attention_mass(q, keys, lse, first, last, self._weights, scale=scale, softcap=softcap, per_head=True),
            )
            return
        heads = self._readout.heads[layer]
        attention_mass(
            q, keys, lse, first, last, self._weights, head_weight=heads, scale=scale, softcap=softcap, out=self.mass
        )


def _seen(batch: PackedBatch, reading: Reading, window: int | None) -> tuple[npt.NDArray[np.int32], ...]:
    """The keys in [begin, end) that each read row sees, counted from `begin`: int32 (R,) and (R,)."""
    spans = (batch.lo, batch.hi, batch.plo, batch.phi) if window is None else batch.windowed(window)
    lo, hi, plo, phi = (ends[reading.first : reading.tokens] for ends in spans)
    inside = np.arange(reading.first, reading.tokens) < len(reading.shared)
    first, last = np.where(inside, lo, plo), np.where(inside, hi, phi)
    size = reading.end - reading.begin
    first = np.clip(first - reading.begin, 0, size)
    return first.astype(np.int32), np.maximum(first, np.clip(last - reading.begin, 0, size)).astype(np.int32)


def running() -> Row | None:
    """Return the packed row that this thread's model is running, None outside of one."""
    row: Row | None = getattr(_running, "row", None)
    return row


@contextmanager
def answering(row: Row) -> Iterator[None]:
    outer = running()
    _running.row = row
    try:
        yield
    finally:
        _running.row = outer


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,  # noqa: ARG001
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a layer: query (1, H, T, D), key and value (1, Hkv, T, D) -> (1, T, H, D)."""
    row = running()
    if row is None:
        raise RuntimeError(f"attention {IMPLEMENTATION!r} runs inside fastrerank only, on packed rows")
    unknown = [name for name, other in others.items() if torch.is_tensor(other) and name not in _HARMLESS]
    if attention_mask is not None or unknown or query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise CannotPack(
            f"{type(module).__name__} asks for attention that packed rows do not compute "
            f"(mask: {attention_mask is not None}, query {tuple(query.shape)}, key {tuple(key.shape)}, {unknown})"
        )
    return row.answer(query, key, value, sliding_window, scaling, softcap or 0.0), None


AttentionInterface.register(IMPLEMENTATION, _attend)
