"""What follows the encoder: which rows are read, and the small float32 layers on top of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fastrerank.checkpoint import Module
from fastrerank.engine.families import Dense, Family
from fastrerank.tensors import Tensors

__all__ = ["DenseStep", "Head", "NormStep", "NormalizeStep", "classification_head", "module_head"]

Readout = Literal["first", "last", "mean", "tokens"]
Vector = npt.NDArray[np.float32]


@dataclass(frozen=True)
class DenseStep:
    """activation(weight x + bias): weight (n, k) as stored, bias float32 (n,) or None."""

    weight: npt.NDArray[Any]
    bias: Vector | None
    activation: str


@dataclass(frozen=True)
class NormStep:
    """Layer norm with gamma, beta float32 (n,); beta may be None."""

    gamma: Vector
    beta: Vector | None
    eps: float


@dataclass(frozen=True)
class NormalizeStep:
    """Division by the Euclidean norm."""


@dataclass(frozen=True)
class Head:
    """Read rows `readout` ("first", "last", "mean" of each document, or all "tokens") and apply `steps`."""

    readout: Readout
    steps: tuple[DenseStep | NormStep | NormalizeStep, ...] = ()


# sentence-transformers stores activations as dotted class names of torch.
_ACTIVATIONS = {
    "identity": "identity",
    "tanh": "tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "sigmoid": "sigmoid",
}
_POOLING: dict[str, Readout] = {"cls": "first", "mean": "mean", "lasttoken": "last"}
_LEGACY_POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


def optional(tensors: Tensors, name: str) -> Vector | None:
    """Return tensor `name` as float32, or None if the checkpoint has none."""
    return tensors[name].float32() if name in tensors else None


def classification_head(family: Family, tensors: Tensors, prefix: str) -> Head | None:
    """Return the trained sequence classification head of a task checkpoint; None if a part of it is missing.

    `prefix` is what the body's weights carry in this file; the steps that the family keeps in its body carry it too.
    """
    steps: list[DenseStep | NormStep | NormalizeStep] = []
    for part in family.head:
        name = (prefix if part.name in family.head_in_base else "") + part.name
        if f"{name}.weight" not in tensors:
            return None
        bias = optional(tensors, f"{name}.bias")
        if isinstance(part, Dense):
            steps.append(DenseStep(tensors[f"{name}.weight"].raw, bias, part.activation))
        else:
            steps.append(NormStep(tensors[f"{name}.weight"].float32(), bias, part.eps))
    return Head("mean" if family.pooling == "mean" else "first", tuple(steps))


def module_head(modules: Sequence[Module], *, tokens: bool = False) -> Head:
    """Return the head that sentence-transformers modules after the Transformer describe.

    Pooling (cls, mean, last token), Dense, LayerNorm, Normalize. With `tokens`, Pooling is left out and the steps apply
    to every token. Without a Pooling module, tokens are averaged, as sentence-transformers does.
    Raises ValueError for a module or a setting that is not supported.
    """
    readout: Readout = "tokens" if tokens else "mean"
    steps: list[DenseStep | NormStep | NormalizeStep] = []
    for module in modules:
        if module.type in ("Transformer", "Dropout"):
            continue
        if module.type == "Pooling":
            if not tokens:
                readout = _pooling(module)
        elif module.type == "Dense":
            steps.append(_dense(module))
        elif module.type == "LayerNorm":
            tensors = module.tensors()
            steps.append(NormStep(tensors["norm.weight"].float32(), optional(tensors, "norm.bias"), 1e-5))
        elif module.type == "Normalize":
            steps.append(NormalizeStep())
        else:
            raise ValueError(
                f"{module.path}: module {module.type} is not supported by the native encoder; it runs Transformer, "
                "Pooling, Dense, LayerNorm and Normalize"
            )
    return Head(readout, tuple(steps))


def _pooling(module: Module) -> Readout:
    mode = module.config.get("pooling_mode")
    if mode is None:
        active = [name for key, name in _LEGACY_POOLING.items() if module.config.get(key)]
        mode = active or "mean"
    if isinstance(mode, list) and len(mode) == 1:
        mode = mode[0]
    if not isinstance(mode, str) or mode not in _POOLING:
        raise ValueError(f"{module.path}: pooling mode {mode!r} is not supported; use one of {', '.join(_POOLING)}")
    return _POOLING[mode]


def _dense(module: Module) -> DenseStep:
    if module.config.get("use_residual"):
        raise ValueError(f"{module.path}: a Dense module with a residual connection is not supported")
    stored = str(module.config.get("activation_function") or "torch.nn.modules.linear.Identity")
    activation = stored.rpartition(".")[2].lower()
    if activation not in _ACTIVATIONS:
        raise ValueError(f"{module.path}: activation {stored!r} is not supported; use one of {', '.join(_ACTIVATIONS)}")
    tensors = module.tensors()
    return DenseStep(tensors["linear.weight"].raw, optional(tensors, "linear.bias"), _ACTIVATIONS[activation])
