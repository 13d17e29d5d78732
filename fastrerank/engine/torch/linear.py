"""A model's linear layers on packed CPU kernels: torch's own products reach a third of what some CPUs can."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch

from fastrerank import ops
from fastrerank.engine.torch.loading import release
from fastrerank.ops._linear import Linear, feed_forward

__all__ = ["PackedLinear", "activation_of", "fuse_feed_forwards", "fuse_gated", "pack_linears", "packs"]

# Activations of feed-forward layers, found by trying.
_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.nn.functional.relu,
}
# Where a feed-forward layer down(act(up(x))) keeps its parts: BERT and its many relatives; ALBERT; DistilBERT.
_FEED_FORWARDS = (
    ("intermediate.dense", "intermediate.intermediate_act_fn", "output.dense"),
    ("ffn", "activation", "ffn_output"),
    ("lin1", "activation", "lin2"),
)


def packs(dtype: torch.dtype) -> bool:
    """Whether linear layers of this precision can be packed: float32, or bfloat16 where the CPU level multiplies it."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and ops.isa() in ops.BFLOAT16_LEVELS)


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
        bias = None if linear.bias is None else linear.bias.detach()
        self._packed = Linear(linear.weight.detach().contiguous(), bias)
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
        self._packed.run(rows, out)


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


def fuse_gated(layer: torch.nn.Module) -> bool:
    """Make a gated feed-forward layer, down(act(gate(x)) * up(x)), one call on packed products; whether it is one.

    Its parts must be `PackedLinear` under the names gate_proj, up_proj and down_proj, and the activation one of the
    kernels'; a random input proves the formula. Intermediate rows are float32 and stay in the cache.
    """
    parts = [getattr(layer, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    act = getattr(layer, "act_fn", None)
    if act is None or not all(isinstance(part, PackedLinear) for part in parts):
        return False
    gate, up, down = cast("list[PackedLinear]", parts)
    whole = layer.forward
    sample = _sample(gate)
    with torch.inference_mode():
        activation = activation_of(act)
        if activation is None:
            return False
        fused = _FeedForward(gate, up, down, activation)
        expected = whole(sample)
        if not torch.is_tensor(expected) or not _close(fused(sample), expected):
            return False
    layer.forward = fused
    return True


def fuse_feed_forwards(model: torch.nn.Module) -> Callable[[], None]:
    """Make feed-forward layers down(act(up(x))) without a gate one call on packed products; returns what undoes it.

    Their two products must be `PackedLinear` under names of BERT's, ALBERT's or DistilBERT's, and the activation one of
    the kernels'; random rows prove the formula. `up` and the activation hand their input on, `down` computes all three:
    the modules around them (dropout, residual, norm) stay as they are.
    """
    undo: list[Callable[[], None]] = []
    for layer in model.modules():
        for names in _FEED_FORWARDS:
            up, act, down = (_find(layer, name) for name in names)
            if not isinstance(up, PackedLinear) or not isinstance(down, PackedLinear) or not callable(act):
                continue
            sample = _sample(up)
            with torch.inference_mode():
                activation = activation_of(act)
                if activation is None or up.out_features != down.in_features or up.dtype != down.dtype:
                    continue
                fused = _FeedForward(up, None, down, activation)
                if not _close(fused(sample), down(act(up(sample)))):
                    continue
            owner, _, attribute = names[1].rpartition(".")
            holder = _find(layer, owner) if owner else layer
            undo.append(functools.partial(setattr, holder, attribute, act))
            setattr(holder, attribute, torch.nn.Identity() if isinstance(act, torch.nn.Module) else _unchanged)
            up.forward, down.forward = _unchanged, fused  # type: ignore[method-assign]
            undo += [functools.partial(delattr, part, "forward") for part in (up, down)]

    def put_back() -> None:
        for step in undo:
            step()

    return put_back


def _find(module: Any, path: str) -> Any:
    """Return module.path, or None."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def _unchanged(x: torch.Tensor) -> torch.Tensor:
    return x


def _sample(layer: PackedLinear) -> torch.Tensor:
    return torch.randn(1, 3, layer.in_features, generator=torch.Generator().manual_seed(0)).to(layer.dtype)


def activation_of(act: Callable[[torch.Tensor], torch.Tensor]) -> str | None:
    """Return the kernels' name of what `act` computes, None where they have none."""
    tried = torch.linspace(-4, 4, 64)
    return next((n for n, known in _ACTIVATIONS.items() if torch.allclose(known(tried), act(tried), atol=1e-6)), None)


def _close(ours: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((ours.double() - expected.double()).norm() <= 0.05 * expected.double().norm())


class _FeedForward:
    """down(act(first(x)) * factor(x)) of packed layers; down(act(first(x))) without a factor."""

    def __init__(self, first: PackedLinear, factor: PackedLinear | None, down: PackedLinear, activation: str) -> None:
        self.first, self.factor, self.down, self.activation = first, factor, down, activation

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        first, down = self.first, self.down
        rows = x.reshape(-1, first.in_features)
        if rows.stride(-1) != 1:
            rows = rows.contiguous()
        out = torch.empty((len(rows), down.out_features), dtype=x.dtype)
        if len(rows):
            factor = None if self.factor is None else self.factor._packed
            feed_forward(first._packed, factor, down._packed, self.activation, rows, out)
        return out.view(*x.shape[:-1], down.out_features)
