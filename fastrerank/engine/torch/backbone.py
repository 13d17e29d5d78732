"""Any Hugging Face backbone on one packed row: its attention calls are answered by `fastrerank.ops.attention`.

transformers hands q, k and v of every layer, rotary positions applied, to the attention function that is registered
under the model's `attn_implementation`. Ours looks up the batch that this thread is running, so nothing depends on
which keyword arguments a family passes down. No mask function is registered under our name: transformers then builds no
mask, for attention that needs none.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AttentionInterface

from fastrerank.engine.batch import PackedBatch, Segment, pack, pack_documents
from fastrerank.engine.torch.cuda_graphs import BUCKETS, CudaGraphs, bucket_of
from fastrerank.engine.torch.upload import upload
from fastrerank.ops import attention

__all__ = [
    "IMPLEMENTATION",
    "CannotPack",
    "PackedBackbone",
    "Read",
    "Row",
    "answering",
    "causality",
    "running",
    "why_not_packed",
]

IMPLEMENTATION = "fastrerank"
_LAYER_TYPES = {"full_attention", "sliding_attention"}
# Tensors that families pass to every attention function and that say nothing about who sees whom.
_HARMLESS = {"position_ids", "cache_position", "position_embeddings", "token_type_ids"}

# What is read of each document: all "tokens", their "mean", or the token at a place, int64 (N,), of every document.
Read = str | npt.NDArray[np.int64]

_running = threading.local()


class CannotPack(RuntimeError):
    """The model computes something that packed rows do not; says what. Loading then takes another way, or refuses."""


# Rows without a prefix, at a batch's beginning, that get a launch of their own on a GPU. Their kernel is simpler; above
# all, a tile of rows of which some see a prefix and some a long context before it finds no block of keys that all see.
_ALONE = 1024


class Row:
    """A packed row's numbers on a device: int32 (7 + 4 W, T) as `PackedBackbone.table` lays them out.

    `alone`: rows at the beginning of which none has a prefix.
    """

    def __init__(self, table: torch.Tensor, windows: tuple[int, ...], alone: int) -> None:
        self.table = table
        self.windows = windows
        self.alone = alone

    def inputs(self) -> torch.Tensor:
        """Return int64 (3, 1, T): token ids, token types, position ids."""
        return self.table[:3].long()[:, None]

    def answer(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        window: int | None,
        scale: float | None,
        softcap: float,
    ) -> torch.Tensor:
        """Return attention (1, T, H, D) of query (1, H, T, D), key and value (1, Hkv, T, D)."""
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return self.attend(q, k, v, window, scale, softcap)[0][None]

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
            return self.table[3:7]
        if window not in self.windows:
            raise CannotPack(f"a layer has a window of {window}, which no part of the model announces")
        begin = 7 + 4 * self.windows.index(window)
        return self.table[begin : begin + 4]


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


def why_not_packed(backbone: Any) -> str | None:
    """Return why the model cannot run packed, read off its class and configuration; None if nothing speaks against it.

    Example:
        >>> why_not_packed(transformers.DebertaV2Model(config))  # doctest: +SKIP
        'DebertaV2Model computes its attention itself, not through an attention backend of transformers'
    """
    name, config = type(backbone).__name__, backbone.config
    if not getattr(backbone, "_supports_attention_backend", False):
        return f"{name} computes its attention itself, not through an attention backend of transformers"
    if getattr(config, "is_encoder_decoder", False):
        return f"{name} is an encoder and a decoder"
    if "position_ids" not in inspect.signature(backbone.forward).parameters:
        return f"{name} takes no position_ids"
    kinds = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if kinds or getattr(config, "attention_chunk_size", None):
        return (
            f"{name} has layers of other kinds than full and sliding attention: {', '.join(sorted(kinds)) or 'chunks'}"
        )
    if len(causality(backbone)) != 1:
        return f"{name} does not say whether its attention is causal"
    return None


def causality(backbone: torch.nn.Module) -> set[bool]:
    """Return what the model's layers say of their attention: {True} of a decoder, {False} of an encoder."""
    return {bool(module.is_causal) for module in backbone.modules() if hasattr(module, "is_causal")}


class PackedBackbone:
    """A transformers model without its head, on packed rows.

    Args:
        backbone: a model for which `why_not_packed` is None, in evaluation mode on its device. Its attention
            implementation is switched to ours.
    """

    packed = True

    def __init__(self, backbone: Any) -> None:
        self.backbone = backbone
        self.device: torch.device = next(backbone.parameters()).device
        (self.causal,) = causality(backbone)
        parameters = inspect.signature(backbone.forward).parameters
        self._takes_types = "token_type_ids" in parameters and bool(getattr(backbone.config, "type_vocab_size", 0))
        self._options = {"use_cache": False} if "use_cache" in parameters else {}
        self._padding_idx = _counted_positions(backbone)
        self.windows = _windows(backbone)
        self.graphs: CudaGraphs | None = None
        backbone.set_attn_implementation(IMPLEMENTATION)

    def use_graphs(self) -> None:
        """From now on capture and replay CUDA graphs for small batches."""
        self.graphs = CudaGraphs(self._run, self.device)

    def warmup(self) -> None:
        """Capture all CUDA graphs now, where there are any, and not at the first batch of each size."""
        for bucket in BUCKETS if self.graphs else ():
            with self._states(pack([Segment(np.zeros(1, np.int64))]).padded_to(bucket)):
                pass

    def position_ids(self, batch: PackedBatch) -> npt.NDArray[np.int64]:
        """Return the family's position ids, int64 (T,).

        RoBERTa and its kin count from padding_idx + 1 over tokens that are not padding; a padding token in a text takes
        position padding_idx and is not counted.
        """
        if self._padding_idx is None:
            return batch.positions
        counted = batch.ids != self._padding_idx
        count = np.cumsum(counted)
        before = np.concatenate([[0], count])[batch.lo]
        return np.where(counted, count - before, 0) + self._padding_idx

    def table(self, batch: PackedBatch) -> npt.NDArray[np.int32]:
        """Return int32 (7 + 4 W, T): ids, types, position ids, lo, hi, plo, phi, and these four for each window."""
        vectors: list[npt.NDArray[Any]] = [
            batch.ids,
            batch.types,
            self.position_ids(batch),
            batch.lo,
            batch.hi,
            batch.plo,
            batch.phi,
        ]
        for window in self.windows:
            vectors += batch.windowed(window)
        return np.stack(vectors).astype(np.int32)

    def hidden(self, batch: PackedBatch) -> torch.Tensor:
        """Return the last hidden states (T, hidden) of a packed batch."""
        return self._run(upload(self.table(batch), self.device), batch.alone)

    def _run(self, table: torch.Tensor, alone: int | None = None) -> torch.Tensor:
        return self.forward(Row(table, self.windows, table.shape[1] if alone is None else alone))

    def forward(self, row: Row) -> torch.Tensor:
        """Return what the backbone makes of a row's tokens, (rows, hidden)."""
        ids, types, positions = row.inputs()
        inputs: dict[str, Any] = {"input_ids": ids, "position_ids": positions, **self._options}
        if self._takes_types:
            inputs["token_type_ids"] = types
        with answering(row):
            states: torch.Tensor = self.backbone(**inputs)[0]
        return states[0]

    @contextmanager
    def _states(self, batch: PackedBatch) -> Iterator[torch.Tensor]:
        """Hidden states that are valid inside the context: a graph's output is overwritten by its next replay."""
        bucket = bucket_of(len(batch)) if self.graphs else None
        if self.graphs is None or bucket is None or self.graphs.failed:
            yield self.hidden(batch)
            return
        padded = batch.padded_to(bucket, 0 if self._padding_idx is None else self._padding_idx)
        with self.graphs.replay(self.table(padded)) as states:
            yield states[: len(batch)]

    def rows(
        self,
        ids: npt.NDArray[np.int32],
        types: npt.NDArray[np.int32] | None,
        offsets: npt.NDArray[np.int64],
        chosen: npt.NDArray[np.int64],
        read: Read,
    ) -> torch.Tensor:
        """Return what `read` reads of the documents in `chosen`: float32 (n, hidden), or (T, hidden) for "tokens"."""
        batch = pack_documents(ids, types, offsets, chosen, self.causal)
        with self._states(batch) as states:
            if not isinstance(read, str):
                return states[upload(batch.starts + read[chosen], self.device)].float()
            if read == "tokens":
                return states.to(torch.float32, copy=True)
            lengths = upload(batch.ends - batch.starts, self.device)
            # unsafe: lengths are not checked, which would wait for the device
            return torch.segment_reduce(states.float(), "mean", lengths=lengths, unsafe=True)


def _windows(backbone: torch.nn.Module) -> tuple[int, ...]:
    """Every sliding window that a layer may ask for: |i - j| < window."""
    sizes = [getattr(module, "sliding_window", None) for module in backbone.modules()]
    sizes.append(getattr(backbone.config, "sliding_window", None))
    return tuple(sorted({size for size in sizes if isinstance(size, int) and size > 0}))


def _counted_positions(backbone: torch.nn.Module) -> int | None:
    """Return padding_idx of embeddings that make position ids by counting tokens that are not padding, else None."""
    for module in backbone.modules():
        if hasattr(module, "create_position_ids_from_input_ids"):
            padding: Any = module.padding_idx
            return int(padding)
    return None
