"""Backbones that cannot run packed: batches of similar lengths, padded on the right, with an attention mask."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch

from fastrerank.engine.batch import Batch
from fastrerank.engine.readouts import Mean, Readout, Rows, Tokens
from fastrerank.engine.torch.placement import upload

__all__ = ["PaddedBackbone", "PaddedModel"]


class PaddedBackbone:
    """A transformers model without its head, on padded batches: equals the model on each document alone.

    `pads` is False for a model whose results padding changes: then its batches must hold documents of one length.
    """

    packed = False
    pads = True

    def __init__(self, backbone: Any) -> None:
        self.backbone = backbone
        self.device: torch.device = next(backbone.parameters()).device
        parameters = inspect.signature(backbone.forward).parameters
        config = backbone.config.get_text_config()
        self._takes_types = "token_type_ids" in parameters and bool(getattr(config, "type_vocab_size", 0))
        self._options = {"use_cache": False} if "use_cache" in parameters else {}
        pad = getattr(config, "pad_token_id", None)
        self._pad_id = pad if isinstance(pad, int) and pad >= 0 else 0

    def inputs(self, batch: Batch) -> tuple[dict[str, Any], torch.Tensor]:
        """Return the model's keyword arguments for a batch's segments, padded to the longest, and their lengths.

        Raises ValueError for what a padded batch cannot express: prefixes, embeddings, positions.
        """
        if batch.prefix is not None or batch.embeddings is not None or batch.position_ids is not None:
            raise ValueError(
                f"{type(self.backbone).__name__} runs in padded batches, which take token ids without prefixes, "
                "embeddings and positions"
            )
        lengths = batch.lengths
        mask = np.arange(lengths.max()) < lengths[:, None]
        rows = batch.offsets[:-1, None] + np.minimum(np.arange(lengths.max()), lengths[:, None] - 1)
        inputs = {"input_ids": np.where(mask, batch.ids[rows], self._pad_id).astype(np.int64)}
        inputs["attention_mask"] = mask.astype(np.int64)
        if self._takes_types:
            taken = np.zeros_like(mask) if batch.types is None else batch.types[rows]
            inputs["token_type_ids"] = np.where(mask, taken, 0).astype(np.int64)
        tensors = {name: upload(value, self.device) for name, value in inputs.items()}
        return tensors | self._options, upload(lengths, self.device)

    def read(self, batch: Batch, readout: Readout) -> torch.Tensor:
        """Return what a readout reads of a batch, in one forward, float32; ValueError for attention masses."""
        inputs, lengths = self.inputs(batch)
        states: torch.Tensor = self.backbone(**inputs)[0]
        if isinstance(readout, Rows):
            read = np.flatnonzero(readout.at >= 0)
            return states[upload(read, self.device), upload(readout.at[read], self.device)].float()
        mask = inputs["attention_mask"].bool()
        if isinstance(readout, Tokens):
            return states[mask].float()
        if isinstance(readout, Mean):
            return torch.where(mask[..., None], states.float(), 0.0).sum(1) / lengths[:, None]
        raise ValueError(f"attention masses are read of packed rows; {type(self.backbone).__name__} runs padded")


class PaddedModel(PaddedBackbone):
    """A whole task model whose head cannot be told from its body: its own logits, in the model's precision."""

    def read(self, batch: Batch, readout: Readout) -> torch.Tensor:  # noqa: ARG002
        """Return logits, float32 (N, labels), whatever the readout."""
        inputs, _ = self.inputs(batch)
        logits: torch.Tensor = self.backbone(**inputs).logits
        return logits.float()
