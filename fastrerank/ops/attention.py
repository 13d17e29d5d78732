"""Attention over packed rows. A plain torch stand-in with the op's interface, to be replaced wholesale."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["attention"]


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor,
    plo: torch.Tensor | None = None, phi: torch.Tensor | None = None, *, scale: float | None = None,
    softcap: float = 0.0, out: torch.Tensor | None = None, return_lse: bool = False, backend: str | None = None,
) -> Any:  # fmt: skip
    """Row i of q (T, H, D) attends to keys [lo_i, hi_i) and [plo_i, phi_i) of k, v (T, Hkv, D); empty rows give 0."""
    del backend
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    keys = torch.arange(len(k), device=q.device)[None]
    mask = (keys >= lo[:, None]) & (keys < hi[:, None])
    if plo is not None and phi is not None:
        mask |= (keys >= plo[:, None]) & (keys < phi[:, None])
    groups = q.shape[1] // k.shape[1]
    keys_, values = (x.repeat_interleave(groups, 1).transpose(0, 1).float() for x in (k, v))
    scores = q.transpose(0, 1).float() @ keys_.transpose(1, 2) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, float("-inf"))
    lse = scores.logsumexp(-1)
    weights = torch.where(mask, torch.exp(scores - lse[..., None]), 0.0)
    result = (weights @ values).transpose(0, 1).to(q.dtype)
    result = result if out is None else out.copy_(result)
    return (result, lse) if return_lse else result
