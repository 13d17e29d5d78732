"""The Python face of `gated`, which the engine puts into Hugging Face models on GPUs."""

from __future__ import annotations

import torch

from fastrerank.ops._tensors import DTYPES, check_tensor, on_device, register_op, said

__all__ = ["gated"]

_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


def gated(x: torch.Tensor, activation: str) -> torch.Tensor:
    """Like `act(x[..., :W]) * x[..., W:]`, in float32 and rounded once.

    Gated linear units (arXiv 2002.05202) on one product of both halves. Each result value moves three values: 151 MB
    for 8,192 rows of 3072 in bfloat16.

    Args:
        x: (..., 2 W) float32, float16 or bfloat16; copied unless its rows are contiguous and evenly spaced.
        activation: "silu", "gelu" (by the error function), "gelu_tanh" or "relu".

    Returns (..., W) in x's dtype. Takes CUDA tensors, and CPU tensors under TRITON_INTERPRET=1. Raises ValueError
    naming the argument.

    Example:
        >>> gated(torch.tensor([[2.0, -1.0, 3.0, 4.0]]), "relu")          # doctest: +SKIP
        tensor([[6., 0.]])
    """
    run = torch.ops.fastrerank.gated if torch.compiler.is_compiling() else _run
    result: torch.Tensor = run(x, activation)
    return result


def _run(x: torch.Tensor, activation: str) -> torch.Tensor:
    from fastrerank.ops._gated.triton import gated as launch

    check_tensor("x", x)
    if x.dtype not in DTYPES or x.ndim < 1 or x.shape[-1] % 2 or not x.shape[-1]:
        raise ValueError(f"x must be float32, float16 or bfloat16 (..., 2 W), got {said(x)}")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)}, got {activation!r}")
    out = torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=x.dtype, device=x.device)
    if out.numel():
        rows = x.reshape(-1, x.shape[-1])
        with on_device(x, "x"):
            launch(rows if rows.stride(-1) == 1 else rows.contiguous(), activation, out.view(-1, out.shape[-1]))
    return out


def _fake(x: torch.Tensor, _: str) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


register_op("gated(Tensor x, str activation) -> Tensor", _run, _fake)
