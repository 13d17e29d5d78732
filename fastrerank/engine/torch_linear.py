"""A model's linear layers on packed CPU kernels: torch's own products reach a third of what some CPUs can."""

from __future__ import annotations

from typing import Any

import torch

import fastrerank._cpu as _cpu
from fastrerank import ops
from fastrerank.engine.torch_loading import release

__all__ = ["PackedLinear", "pack_linears", "packs"]


def packs(dtype: torch.dtype) -> bool:
    """Whether linear layers of this precision can be packed: float32, or bfloat16 where the CPU level multiplies it."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and ops.isa() == "avx512_bf16")


class PackedLinear(torch.nn.Module):
    """Equals `torch.nn.Linear` without gradients, on weights packed for this CPU. A row's bits depend on it alone.

    Args:
        linear: float32 or bfloat16 layer on the CPU. Sums are float32; bfloat16 results are rounded once.

    Raises ValueError for weights that are NaN or infinite.

    Example:
        >>> linear = torch.nn.Linear(3, 2)
        >>> x = torch.ones(4, 3)
        >>> with torch.no_grad():
        ...     bool(torch.allclose(PackedLinear(linear)(x), linear(x), atol=1e-6))
        True
    """

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.dtype = linear.weight.dtype
        weight = linear.weight.detach().contiguous()
        half = self.dtype == torch.bfloat16
        bias = None if linear.bias is None else linear.bias.detach().float().numpy()
        stored: Any = weight.view(torch.uint16).numpy() if half else weight.numpy()
        self._packed = _cpu.Linear(stored, bias, "bfloat16" if half else "float32", ops.isa())
        # Models ask a layer's weight for its dtype and device.
        self.weight = torch.nn.Parameter(torch.empty(0, dtype=self.dtype), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T + b: (..., in_features) -> (..., out_features)."""
        if x.dtype != self.dtype or x.shape[-1] != self.in_features:
            raise ValueError(f"x must be {self.dtype} (..., {self.in_features}), got {x.dtype} {tuple(x.shape)}")
        rows = x.reshape(-1, self.in_features)
        if rows.stride(-1) != 1:
            rows = rows.contiguous()
        out = torch.empty((len(rows), self.out_features), dtype=self.dtype)
        if len(rows):
            self._run(rows, out)
        return out.view(*x.shape[:-1], self.out_features)

    # Pointers go to C++: a compiled model calls this between its graphs.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _run(self, rows: torch.Tensor, out: torch.Tensor) -> None:
        self._packed.run(
            rows.data_ptr(), rows.stride(0), len(rows), out.data_ptr(), self.out_features, torch.get_num_threads()
        )


def pack_linears(model: torch.nn.Module) -> list[tuple[torch.nn.Module, str, torch.nn.Linear]]:
    """Replace the model's linear layers that can be packed; returns what was replaced, as (parent, name, layer).

    `setattr(parent, name, layer)` puts a layer back.
    """
    replaced = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()  # named_children leaves out a layer's second name
        if type(child) is torch.nn.Linear and packs(child.weight.dtype)
    ]
    packed: dict[int, PackedLinear] = {}
    for parent, name, child in replaced:
        if id(child) not in packed:
            packed[id(child)] = PackedLinear(child)
            release(child.weight)
        setattr(parent, name, packed[id(child)])
    return replaced
