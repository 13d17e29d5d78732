"""The Python face of `rotary`, which the engine puts into Hugging Face models on GPUs."""

from __future__ import annotations

import torch

from fastrerank.ops._tensors import DTYPES, check_tensor, on_device, register_op, said

__all__ = ["rotary"]


def rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Like `x * cos + cat(-x[..., R / 2 :], x[..., : R / 2]) * sin` of q and k, in the first R columns of a head.

    The rotary embedding (RoFormer, arXiv 2104.09864) by halves. Products and sums are float32 and rounded once. The op
    reads and writes 2 T D (H + Hkv) values: 50 MB for 8,210 tokens of 12 + 12 heads of 64 in bfloat16. The result is
    new memory, so q and k may be views of a product that others read.

    Args:
        q: (1, H, T, D) float32, float16 or bfloat16, any strides, D contiguous. k: (1, Hkv, T, D) in q's dtype.
        cos, sin: (1, T, R) in any of these dtypes, any stride between tokens; R is even and at most D.

    Returns the rotated q and k, (1, H, T, D) and (1, Hkv, T, D) in their dtype; columns from R on are unchanged. Both
    are views of one (T, H + Hkv, D): a token's heads lie together, which suits `ops.attention`.

    Takes CUDA tensors, and CPU tensors under TRITON_INTERPRET=1. Raises ValueError naming the argument.

    Example:
        >>> q = torch.tensor([3.0, 4.0]).expand(1, 1, 1, 2)                        # doctest: +SKIP
        >>> cos, sin = torch.zeros(1, 1, 2), torch.ones(1, 1, 2)                   # doctest: +SKIP
        >>> rotary(q, q, cos, sin)[0].tolist()                                     # doctest: +SKIP
        [[[[-4.0, 3.0]]]]
    """
    run = torch.ops.fastrerank.rotary if torch.compiler.is_compiling() else _run
    both = run(q, k, cos, sin).transpose(0, 1)[None]
    heads = q.shape[1]
    return both[:, :heads], both[:, heads:]


def _run(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    from fastrerank.ops._rotary.triton import rotary as launch

    _check(q, k, cos, sin)
    _, heads, tokens, head_dim = q.shape
    out = torch.empty((tokens, heads + k.shape[1], head_dim), dtype=q.dtype, device=q.device)
    if tokens:
        with on_device(q, "q"):
            launch(q, k, cos, sin, out)
    return out


def _check(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    for name, tensor, dimensions in (("q", q, 4), ("k", k, 4), ("cos", cos, 3), ("sin", sin, 3)):
        check_tensor(name, tensor)
        if tensor.ndim != dimensions:
            raise ValueError(f"{name} must have {dimensions} dimensions, got {said(tensor)}")
    batch, heads, tokens, head_dim = q.shape
    rotated = cos.shape[-1]
    if batch != 1 or heads < 1 or q.dtype not in DTYPES:
        raise ValueError(f"q must be float32, float16 or bfloat16 (1, H, T, D), got {said(q)}")
    if k.shape != (1, k.shape[1], tokens, head_dim) or k.shape[1] < 1 or k.dtype != q.dtype:
        raise ValueError(f"k must be {q.dtype} (1, Hkv, {tokens}, {head_dim}), got {said(k)}")
    if cos.shape != (1, tokens, rotated) or sin.shape != cos.shape or rotated % 2 or not 2 <= rotated <= head_dim:
        raise ValueError(
            f"cos and sin must be (1, {tokens}, R) with an even R of at most {head_dim}, got {said(cos)}, {said(sin)}"
        )
    if cos.dtype not in DTYPES or sin.dtype not in DTYPES:
        raise ValueError(f"cos and sin must be float32, float16 or bfloat16, got {said(cos)}, {said(sin)}")
    for name, tensor in (("q", q), ("k", k), ("cos", cos), ("sin", sin)):
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name} must be contiguous in its last dimension, got strides {tensor.stride()}")
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on {q.device} like q, got {tensor.device}")


def _fake(q: torch.Tensor, k: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    return q.new_empty((q.shape[2], q.shape[1] + k.shape[1], q.shape[3]))


register_op("rotary(Tensor q, Tensor k, Tensor cos, Tensor sin) -> Tensor", _run, _fake)
