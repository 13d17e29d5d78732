from __future__ import annotations
import torch


def label_logits(
    hidden,
    weight,
    *,
    norm=None,
    norm_weight=None,
    norm_bias=None,
    eps=1e-6,
    bias=None,
    scale=1.0,
    softcap=0.0,
    return_order=False,
    backend=None,
):
    x = hidden.float()
    if norm == "rms":
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm_weight.float()
    elif norm == "layer":
        x = torch.nn.functional.layer_norm(
            x, x.shape[-1:], norm_weight.float(), None if norm_bias is None else norm_bias.float(), eps
        )
    y = (x[:, None] * weight.float()).sum(-1) * scale
    if bias is not None:
        y = y + bias
    if softcap:
        y = softcap * torch.tanh(y / softcap)
    return y
