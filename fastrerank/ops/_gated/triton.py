"""Gated activations in Triton: act(first half of a row) times its second half, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastrerank.ops._attention.triton import tanh

__all__ = ["ACTIVATIONS", "block_of", "gated", "kernel"]

ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}


def block_of(inner: int) -> int:
    """Return how many columns a program takes, 8 a thread: the one of a few sizes that leaves the fewest idle."""
    return min((1024, 512, 256), key=lambda block: -(-inner // block) * block)


@triton.jit
def kernel(X, OUT, inner, x_row, ACT: tl.constexpr, BLOCK: tl.constexpr):
    """Row program 0, columns [BLOCK * program 1, ...)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    kept = columns < inner
    a = tl.load(X + row * x_row + columns, mask=kept, other=0.0).to(tl.float32)
    b = tl.load(X + row * x_row + inner + columns, mask=kept, other=0.0).to(tl.float32)
    if ACT == 0:
        a = a / (1.0 + tl.exp(-a))
    elif ACT == 1:
        a = 0.5 * a * (1.0 + tl.erf(a * 0.7071067811865476))
    elif ACT == 2:
        a = 0.5 * a * (1.0 + tanh(0.7978845608028654 * (a + 0.044715 * a * a * a)))
    else:
        a = tl.where(a < 0, 0.0, a)  # NaN stays NaN
    tl.store(OUT + row * inner + columns, a * b, mask=kept)


def gated(x: torch.Tensor, activation: str, out: torch.Tensor) -> None:
    """Launch the kernel on arguments that `fastrerank.ops.gated` describes; x is (T, 2 W), out (T, W)."""
    rows, inner = out.shape
    block = block_of(inner)
    kernel[(rows, -(-inner // block))](
        x, out, inner, x.stride(0), ACT=ACTIVATIONS[activation], BLOCK=block, num_warps=block // 256
    )
