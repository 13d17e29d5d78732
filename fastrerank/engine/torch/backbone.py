"""Any Hugging Face backbone on one packed row, and what is read of it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fastrerank.engine.batch import Batch, PackedBatch
from fastrerank.engine.readouts import Masses, Readout, Rows, Tokens
from fastrerank.engine.torch.cuda_graphs import BUCKETS, CudaGraphs, bucket_of
from fastrerank.engine.torch.placement import upload
from fastrerank.engine.torch.row import IMPLEMENTATION, CannotPack, MassReader, PassEnded, Row, answering

__all__ = ["WHOLE", "PackedBackbone", "causality", "why_not_packed"]

# On a CPU the number of rows is a multiple of this. torch computes the last elements of a tensor, which do not fill
# two vectors, by other functions (exp, sin, cos) whose last bits differ. With whole vectors a row's bits depend on it
# alone.
WHOLE = 64
_LAYER_TYPES = {"full_attention", "sliding_attention"}


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
            with self._states(Batch.of_ids([np.zeros(1, np.int64)]).pack().padded_to(bucket)):
                pass

    def position_ids(self, batch: PackedBatch) -> npt.NDArray[np.int64]:
        """Return the batch's position ids, int64 (T,) or (3, T); where it has none, the family's own, int64 (T,).

        RoBERTa and its kin count from padding_idx + 1 over tokens that are not padding; a padding token in a text takes
        position padding_idx and is not counted.
        """
        if batch.position_ids is not None:
            return batch.position_ids
        if self._padding_idx is None:
            return batch.positions
        counted = batch.ids != self._padding_idx
        count = np.cumsum(counted)
        before = np.concatenate([[0], count])[batch.lo]
        return np.where(counted, count - before, 0) + self._padding_idx

    def table(self, batch: PackedBatch) -> npt.NDArray[np.int32]:
        """Return int32 (6 + 4 W + P, T): ids, types, lo, hi, plo, phi, these four for each window, P position ids."""
        vectors: list[npt.NDArray[Any]] = [batch.ids, batch.types, batch.lo, batch.hi, batch.plo, batch.phi]
        for window in self.windows:
            vectors += batch.windowed(window)
        return np.concatenate([np.stack(vectors), np.atleast_2d(self.position_ids(batch))]).astype(np.int32)

    def hidden(self, batch: PackedBatch) -> torch.Tensor:
        """Return the last hidden states (T, hidden) of a packed batch."""
        return self._run(upload(self.table(batch), self.device), batch.alone, batch.embeddings)

    def _run(
        self, table: torch.Tensor, alone: int | None = None, embeddings: torch.Tensor | None = None
    ) -> torch.Tensor:
        alone = table.shape[1] if alone is None else alone
        return self.forward(Row(table, self.windows, alone, embeddings=embeddings))

    def forward(self, row: Row) -> torch.Tensor:
        """Return what the backbone makes of a row's tokens, (rows, hidden)."""
        ids, types, positions = row.inputs()
        inputs: dict[str, Any] = {"position_ids": positions, **self._options}
        if row.embeddings is None:
            inputs["input_ids"] = ids
        else:
            inputs["inputs_embeds"] = row.embeddings[None]
        if self._takes_types:
            inputs["token_type_ids"] = types
        with answering(row):
            states: torch.Tensor = self.backbone(**inputs)[0]
        return states[0]

    @contextmanager
    def _states(self, batch: PackedBatch) -> Iterator[torch.Tensor]:
        """Hidden states that are valid inside the context: a graph's output is overwritten by its next replay."""
        bucket = bucket_of(len(batch)) if self.graphs else None
        plain = batch.embeddings is None and batch.position_ids is None
        if self.graphs is None or bucket is None or self.graphs.failed or not plain:
            yield self.hidden(batch)
            return
        padded = batch.padded_to(bucket, 0 if self._padding_idx is None else self._padding_idx)
        with self.graphs.replay(self.table(padded)) as states:
            yield states[: len(batch)]

    def read(self, batch: Batch, readout: Readout) -> torch.Tensor:
        """Return what a readout reads of a batch, in one forward; see `fastrerank.engine.readouts`."""
        if isinstance(readout, Masses):
            return self._masses(batch, readout)
        packed = batch.pack(self.causal)
        with self._states(packed) as states:
            if isinstance(readout, Rows):
                read = readout.at >= 0
                return states[upload((packed.starts + readout.at)[read], self.device)].float()
            if isinstance(readout, Tokens):
                return states.to(torch.float32, copy=True)
            lengths = upload(packed.ends - packed.starts, self.device)
            # unsafe: lengths are not checked, which would wait for the device
            return torch.segment_reduce(states.float(), "mean", lengths=lengths, unsafe=True)

    def _masses(self, batch: Batch, readout: Masses) -> torch.Tensor:
        """The masses of a reading, float32 (S,), no layer above the last one that is read being run."""
        reading, skipped = readout.reading, 0 if readout.before is None else len(readout.before.ids)
        packed, total = batch.pack(self.causal), reading.tokens
        rows = np.arange(reading.first, total) - skipped
        if self.device.type == "cpu":
            packed = packed.padded_to(skipped + _whole(total - skipped))
            rows = np.resize(rows, _whole(len(rows)))
        reader = MassReader(readout, packed, self.device)
        row = Row(
            upload(np.ascontiguousarray(self.table(packed)[:, skipped:]), self.device),
            self.windows,
            max(0, packed.alone - skipped),
            chosen=upload(rows, self.device),
            masses=reader,
        )
        try:
            self.forward(row)
        except PassEnded:
            return reader.mass
        raise CannotPack(f"the model ended after {row.layer + 1} attention calls, before layer {reader.last}")


def _whole(rows: int) -> int:
    return -(-rows // WHOLE) * WHOLE


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
