"""Norms of rows: which formula a module follows, and the same in one pass on a CPU."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

from fastrerank.ops._norm_rows import norm_rows_cpu

__all__ = ["FinalNorm", "fuse_norm", "read_norm"]


@dataclass(frozen=True)
class FinalNorm:
    """A decoder's last norm as `ops.label_logits` takes it; `module`, in float32, where it is of another kind."""

    kind: str | None
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    eps: float = 0.0
    module: torch.nn.Module | None = None


def read_norm(module: torch.nn.Module, width: int) -> FinalNorm:
    """Tell which formula a norm follows by what it makes of random rows."""
    single = copy.deepcopy(module).float().requires_grad_(False)
    weight = getattr(single, "weight", None)
    bias = getattr(single, "bias", None)
    eps = next((float(getattr(single, name)) for name in ("variance_epsilon", "eps") if hasattr(single, name)), None)
    if weight is not None and weight.shape == (width,) and eps is not None:
        x = torch.randn((4, width), generator=torch.Generator().manual_seed(0)).to(weight.device)
        expected = single(x)
        rms = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        shift = 0.0 if bias is None else bias
        layer = torch.nn.functional.layer_norm(x, (width,), None, None, eps)
        for kind, normed, factor in (("rms", rms, weight), ("rms", rms, 1 + weight), ("layer", layer, weight)):
            if torch.allclose(normed * factor + shift, expected, rtol=1e-5, atol=1e-5):
                return FinalNorm(kind, factor.clone(), bias, eps)
    return FinalNorm(None, module=single)


def fuse_norm(module: torch.nn.Module) -> bool:
    """Make a norm's forward one pass of float32 over each row, rounded once; whether the module is such a norm.

    For float32 and bfloat16 on the CPU. torch's takes six passes, half of them in memory.
    """
    weight = getattr(module, "weight", None)
    if "norm" not in type(module).__name__.lower() or not isinstance(weight, torch.Tensor) or weight.ndim != 1:
        return False
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return False
    norm = read_norm(module, len(weight))
    if norm.kind is None:
        return False
    module.forward = _RowNorm(norm)
    return True


class _RowNorm:
    """The norm of the last dimension of float32 or bfloat16 tensors on the CPU."""

    def __init__(self, norm: FinalNorm) -> None:
        assert norm.kind is not None
        assert norm.weight is not None
        self.kind, self.eps = norm.kind, norm.eps
        self.weight = norm.weight.float().contiguous()
        self.bias = None if norm.bias is None else norm.bias.float().contiguous()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        width = len(self.weight)
        rows = x.reshape(-1, width)
        if rows.stride(-1) != 1:
            rows = rows.contiguous()
        out = torch.empty(rows.shape, dtype=x.dtype)
        if len(rows):
            norm_rows_cpu(rows, self.kind, self.weight, self.bias, self.eps, out)
        return out.view(x.shape)
