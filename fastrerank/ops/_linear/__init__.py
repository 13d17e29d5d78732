"""The Python face of packed linear layers, which the engine puts into Hugging Face models on CPUs."""

from __future__ import annotations

from typing import Any

import torch

import fastrerank._cpu as _cpu
from fastrerank.ops._tensors import said
from fastrerank.runtime import cpu

__all__ = ["Linear", "feed_forward"]


class Linear:
    """x W^T + b on weights packed for this CPU: sums are float32, results are rounded once.

    Args:
        weight: contiguous float32 or bfloat16 (N, K) on the CPU. bias: (N,), or None for zeros.

    Raises ValueError for weights that are NaN or infinite.

    Example:
        >>> out = torch.empty(2, 1)
        >>> Linear(torch.tensor([[2.0, 3.0]]), None).run(torch.eye(2), out)
        >>> out.tolist()
        [[2.0], [3.0]]
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        half = weight.dtype == torch.bfloat16
        stored: Any = weight.view(torch.uint16).numpy() if half else weight.numpy()
        added = None if bias is None else bias.float().numpy()
        self.dtype, (self.outputs, self.inputs) = weight.dtype, weight.shape
        self._packed = _cpu.Linear(stored, added, "bfloat16" if half else "float32", cpu.isa())

    def run(self, rows: torch.Tensor, out: torch.Tensor) -> None:
        """Write x W^T + b of `rows` (T, K) to `out` (T, N). Both have the weight's dtype and contiguous rows."""
        _check(rows, out, self, self)
        self._packed.run(
            rows.data_ptr(), rows.stride(0), len(rows), out.data_ptr(), out.stride(0), torch.get_num_threads()
        )


def feed_forward(
    first: Linear, factor: Linear | None, down: Linear, activation: str, rows: torch.Tensor, out: torch.Tensor
) -> None:
    """Write down(act(first(x)) * factor(x)) to `out`, without a factor down(act(first(x))).

    Shapes and dtypes are those of `Linear.run`; activation: "silu", "gelu", "gelu_tanh" or "relu". Intermediate rows
    are float32 and stay in the cache.
    """
    _check(rows, out, first, down)
    first._packed.run_feed_forward(
        down._packed,
        None if factor is None else factor._packed,
        activation,
        rows.data_ptr(),
        rows.stride(0),
        len(rows),
        out.data_ptr(),
        out.stride(0),
        torch.get_num_threads(),
    )


def _check(rows: torch.Tensor, out: torch.Tensor, first: Linear, last: Linear) -> None:
    for name, given, width in (("rows", rows, first.inputs), ("out", out, last.outputs)):
        shape = (len(rows), width)
        if given.dtype != first.dtype or given.shape != shape or (width > 1 and given.stride(1) != 1):
            raise ValueError(f"{name} must be {first.dtype} {shape} of contiguous rows, got {said(given)}")
