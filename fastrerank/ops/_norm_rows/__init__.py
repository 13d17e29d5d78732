"""The Python face of `norm_rows`, which the engine puts into Hugging Face models: on GPUs, and on CPUs."""

from __future__ import annotations

import torch

import fastrerank._cpu as _cpu
from fastrerank.ops._tensors import DTYPES, check_tensor, on_device, register_op, said
from fastrerank.runtime import cpu

__all__ = ["norm_rows", "norm_rows_cpu"]

_WIDEST = 16384


def norm_rows(
    x: torch.Tensor,
    norm: str,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Like `torch.nn.functional.rms_norm` or `layer_norm` of x + residual over the last dimension, in float32.

    Neither the sum with `residual` nor the normed values are rounded to 16 bits in between. The op reads x and
    `residual` and writes x's size: 34 MB without a residual for 8,310 rows of 1024 in bfloat16.

    Args:
        x: (..., W) float32, float16 or bfloat16, W at most 16384. With up to 4 dimensions, of which the first is 1,
            rows may lie anywhere if each is contiguous; other tensors are copied unless their rows are evenly spaced.
        norm: "rms": x * rsqrt(mean(x^2) + eps) * weight; "layer": the same on x - mean(x). `bias` is added, if any.
        weight, bias: contiguous (W,) in any of these dtypes. Gemma's norms multiply by 1 + w: pass that.
        residual: None, or a tensor of x's shape and dtype that is added first.

    Returns a contiguous tensor of x's shape and dtype. Takes CUDA tensors, and CPU tensors under TRITON_INTERPRET=1.
    Raises ValueError naming the argument.

    Example:
        >>> norm_rows(torch.tensor([[3.0, 4.0]]), "rms", torch.ones(2), None, 0.0)     # doctest: +SKIP
        tensor([[0.8485, 1.1314]])
    """
    run = torch.ops.fastrerank.norm_rows if torch.compiler.is_compiling() else _run
    result: torch.Tensor = run(x, norm, weight, bias, eps, residual)
    return result


def _run(
    x: torch.Tensor,
    norm: str,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    from fastrerank.ops._norm_rows.triton import norm_rows as launch

    _check(x, norm, weight, bias, residual)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        with on_device(x, "x"):
            launch(_rows(x), norm == "layer", weight, bias, eps, None if residual is None else _rows(residual), out)
    return out


def norm_rows_cpu(
    x: torch.Tensor, norm: str, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, out: torch.Tensor
) -> None:
    """Write the norms of rows on the CPU to `out`: one pass of float32 over each row, rounded once.

    Args:
        x: float32 or bfloat16 (T, W) whose rows are contiguous. norm: "rms" or "layer".
        weight, bias: contiguous float32 (W,); no bias: None. out: contiguous, in x's shape and dtype.

    Raises ValueError naming the argument.
    """
    if x.dtype not in (torch.float32, torch.bfloat16) or x.ndim != 2 or (x.shape[1] > 1 and x.stride(1) != 1):
        raise ValueError(f"x must be float32 or bfloat16 (T, W) of contiguous rows, got {said(x)}")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is None:
            continue
        if vector.dtype != torch.float32 or vector.shape != x.shape[1:] or not vector.is_contiguous():
            raise ValueError(f"{name} must be contiguous float32 ({x.shape[1]},), got {said(vector)}")
    if out.dtype != x.dtype or out.shape != x.shape or not out.is_contiguous():
        raise ValueError(f"out must be contiguous {said(x)} like x, got {said(out)}")
    _cpu.norm_rows(
        x.data_ptr(),
        "bfloat16" if x.dtype == torch.bfloat16 else "float32",
        x.stride(0),
        len(x),
        x.shape[1],
        norm,
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        eps,
        out.data_ptr(),
        out.stride(0),
        torch.get_num_threads(),
        cpu.isa(),
    )


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x as (A, B, W), without a copy where possible; both tensors of an op get the same A and B."""
    rows = x.flatten(0, -3) if x.ndim == 4 else x.reshape(-1, 1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _check(
    x: torch.Tensor, norm: str, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None
) -> None:
    check_tensor("x", x)
    if x.dtype not in DTYPES or x.ndim < 1 or not 1 <= x.shape[-1] <= _WIDEST:
        raise ValueError(f"x must be float32, float16 or bfloat16 (..., W) with W of 1 to {_WIDEST}, got {said(x)}")
    if norm not in ("rms", "layer"):
        raise ValueError(f'norm must be "rms" or "layer", got {norm!r}')
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is None:
            continue
        check_tensor(name, vector)
        if vector.shape != x.shape[-1:] or vector.dtype not in DTYPES or not vector.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous float32, float16 or bfloat16 of shape ({x.shape[-1]},), got {said(vector)}"
            )
        if vector.device != x.device:
            raise ValueError(f"{name} must be on {x.device} like x, got {vector.device}")
    if residual is not None:
        check_tensor("residual", residual)
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device):
        raise ValueError(f"residual must be {said(x)} on {x.device} like x, got {said(residual)} on {residual.device}")


def _fake(x: torch.Tensor, *_: object) -> torch.Tensor:
    return x.new_empty(x.shape)


register_op(
    "norm_rows(Tensor x, str norm, Tensor weight, Tensor? bias, float eps, Tensor? residual) -> Tensor", _run, _fake
)
