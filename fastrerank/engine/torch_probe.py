"""Whether a backbone runs packed: what its class says, and a proof on a few tokens when it is loaded."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fastrerank.engine.packing import pack_documents
from fastrerank.engine.padded import PaddedBackbone
from fastrerank.engine.torch_backbone import PackedBackbone, why_not_packed

__all__ = ["choose_runner"]

# Relative difference between packed and single documents that passes when a model is loaded: far above rounding (1e-6,
# 2e-2), far below what a wrong position or a glance at a neighbour does.
_AGREES = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.1}


def choose_runner(backbone: Any, dtype: str, packed: bool | None) -> tuple[Any, str]:
    """Return a `PackedBackbone` or a `PaddedBackbone`, and why it is the latter ("" if it is not).

    A model whose class speaks for packing is proved on three short documents of random tokens, packed against single:
    a family may combine tokens in ways that no flag tells of.
    """
    if packed is False:
        return PaddedBackbone(backbone), "engine='padded' was asked for"
    reason = why_not_packed(backbone)
    if reason is not None:
        return PaddedBackbone(backbone), reason
    documents = _probe_documents(backbone)
    before = backbone.config._attn_implementation
    with torch.inference_mode():
        expected = [_alone(backbone, ids) for ids in documents]
        runner = PackedBackbone(backbone)
        offsets = np.cumsum([0, *map(len, documents)])
        batch = pack_documents(np.concatenate(documents), None, offsets, np.arange(len(documents)), runner.causal)
        try:
            states = runner.hidden(batch).double()
            error = _relative_error(states, torch.cat(expected).double())
            reason = f"packed hidden states differ from single documents' by {error:.2g}"
        except NotImplementedError as refusal:
            error, reason = float("inf"), str(refusal)
    if error <= _AGREES[dtype]:
        return runner, ""
    backbone.set_attn_implementation(before)
    return PaddedBackbone(backbone), reason


def _probe_documents(backbone: Any) -> list[npt.NDArray[np.int32]]:
    """Three documents of random tokens; one is longer than the model's window, where that is small."""
    config = backbone.config.get_text_config()
    pad = getattr(config, "pad_token_id", None)
    usable = np.array([i for i in range(min(config.vocab_size, 1000)) if i != pad], np.int32)
    window = getattr(config, "sliding_window", None) or 0
    longest = window + 9 if window <= 128 else 20
    limit = min(longest, (getattr(config, "max_position_embeddings", None) or longest) - (pad or 0) - 2)
    return [np.random.default_rng(n).choice(usable, n) for n in (3, max(1, limit), 2)]


def _alone(backbone: Any, ids: npt.NDArray[np.int32]) -> torch.Tensor:
    tensor = torch.from_numpy(ids[None]).long().to(next(backbone.parameters()).device)
    states: torch.Tensor = backbone(input_ids=tensor, attention_mask=torch.ones_like(tensor))[0]
    return states[0]


def _relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference over that of the expected; where both overflow alike, of the rest."""
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(ours)):
        return float("inf")
    ours, expected = ours[finite], expected[finite]
    return float((ours - expected).norm() / expected.norm().clamp(min=1e-30)) if len(ours) else 0.0
