"""Backbones that cannot run packed: batches of similar lengths, padded on the right, with an attention mask."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fastrerank.engine.torch.backbone import Read
from fastrerank.engine.torch.upload import upload

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

    def inputs(
        self,
        ids: npt.NDArray[np.int32],
        types: npt.NDArray[np.int32] | None,
        offsets: npt.NDArray[np.int64],
        chosen: npt.NDArray[np.int64],
    ) -> tuple[dict[str, Any], torch.Tensor]:
        """Return the model's keyword arguments for the documents in `chosen`, and their lengths."""
        lengths = np.diff(offsets)[chosen]
        mask = np.arange(lengths.max()) < lengths[:, None]
        rows = offsets[chosen][:, None] + np.minimum(np.arange(lengths.max()), lengths[:, None] - 1)
        inputs = {"input_ids": np.where(mask, ids[rows], self._pad_id).astype(np.int64)}
        inputs["attention_mask"] = mask.astype(np.int64)
        if self._takes_types:
            taken = np.zeros_like(mask) if types is None else types[rows]
            inputs["token_type_ids"] = np.where(mask, taken, 0).astype(np.int64)
        tensors = {name: upload(value, self.device) for name, value in inputs.items()}
        return tensors | self._options, upload(lengths, self.device)

    def rows(
        self,
        ids: npt.NDArray[np.int32],
        types: npt.NDArray[np.int32] | None,
        offsets: npt.NDArray[np.int64],
        chosen: npt.NDArray[np.int64],
        read: Read,
    ) -> torch.Tensor:
        """Return what `read` reads of the documents in `chosen`: float32 (n, hidden), or (T, hidden) for "tokens"."""
        inputs, lengths = self.inputs(ids, types, offsets, chosen)
        states: torch.Tensor = self.backbone(**inputs)[0]
        if not isinstance(read, str):
            return states[torch.arange(len(states), device=self.device), upload(read[chosen], self.device)].float()
        mask = inputs["attention_mask"].bool()
        if read == "tokens":
            return states[mask].float()
        return torch.where(mask[..., None], states.float(), 0.0).sum(1) / lengths[:, None]


class PaddedModel(PaddedBackbone):
    """A whole task model whose head cannot be told from its body: its own logits, in the model's precision."""

    def rows(
        self,
        ids: npt.NDArray[np.int32],
        types: npt.NDArray[np.int32] | None,
        offsets: npt.NDArray[np.int64],
        chosen: npt.NDArray[np.int64],
        read: Read,  # noqa: ARG002
    ) -> torch.Tensor:
        """Return logits, float32 (n, labels)."""
        inputs, _ = self.inputs(ids, types, offsets, chosen)
        logits: torch.Tensor = self.backbone(**inputs).logits
        return logits.float()
