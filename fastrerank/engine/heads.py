"""What follows the encoder: which rows are read, and the small float32 layers on top of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fastrerank.checkpoints.checkpoint import Module
from fastrerank.checkpoints.config_values import flag, shown, whole
from fastrerank.checkpoints.tensors import Tensors
from fastrerank.engine.expected_weights import Slot, check_slots, head_slots, values
from fastrerank.engine.families import Dense, Family

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
    """Read rows `readout` ("first", "last", "mean" of each document, or all "tokens") and apply `steps`.

    `names` are the tensors of the transformer's own file that the steps were read from: those of a classifier's head.
    """

    readout: Readout
    steps: tuple[DenseStep | NormStep | NormalizeStep, ...] = ()
    names: frozenset[str] = frozenset()


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


def classification_head(path: Path, family: Family, tensors: Tensors, prefix: str) -> tuple[Head | None, str]:
    """Return the trained sequence classification head of a task checkpoint; None and the first name that is missing.

    `prefix` is what the body's weights carry in this file; the steps that the family keeps in its body carry it too.
    Raises ValueError naming a tensor of another shape than config.json says, or one that it rules out.
    """
    slots = head_slots(family, prefix)
    for slot in slots:
        if slot.stored and slot.find(tensors) is None:
            return None, slot.name
    names = check_slots(path, slots, tensors)
    stored = {slot.name: slot.find(tensors) for slot in slots}
    steps: list[DenseStep | NormStep | NormalizeStep] = []
    for part in family.head:
        name = (prefix if part.name in family.head_in_base else "") + part.name
        weight = tensors[stored[f"{name}.weight"] or ""]
        bias_name = stored[f"{name}.bias"]
        bias = None if bias_name is None else tensors[bias_name].float32()
        if isinstance(part, Dense):
            steps.append(DenseStep(values(weight), bias, part.activation))
        else:
            steps.append(NormStep(weight.float32(), bias, part.eps))
    return Head("mean" if family.pooling == "mean" else "first", tuple(steps), frozenset(names)), ""


def module_head(modules: Sequence[Module], *, tokens: bool = False) -> Head:
    """Return the head that sentence-transformers modules after the Transformer describe.

    Pooling (cls, mean, last token), Dense, LayerNorm, Normalize. With `tokens`, Pooling is left out and the steps apply
    to every token. Without a Pooling module, tokens are averaged, as sentence-transformers does.
    Raises ValueError for a module or a setting that is not supported.
    """
    readout: Readout = "tokens" if tokens else "mean"
    steps: list[DenseStep | NormStep | NormalizeStep] = []
    pooled = tokens or all(module.type != "Pooling" for module in modules)
    for module in modules:
        if module.type in ("Transformer", "Dropout"):
            continue
        pooled = pooled or module.type == "Pooling"
        if not pooled:
            raise ValueError(
                f"{module.path}: module {module.type} stands before Pooling, where it works on tokens; a head is "
                "computed on what is pooled, and its vectors would be others"
            )
        if module.type == "Pooling":
            if not tokens:
                readout = _pooling(module)
        elif module.type == "Dense":
            steps.append(_dense(module))
        elif module.type == "LayerNorm":
            steps.append(_layer_norm(module))
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
        stated = {key: module.config[key] for key in _LEGACY_POOLING if key in module.config}
        for key, value in stated.items():
            if not isinstance(value, bool):
                raise ValueError(f"{module.path}: {key} must be true or false, got {shown(value)}")
        mode = [_LEGACY_POOLING[key] for key, value in stated.items() if value] if stated else "mean"
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
    sizes = [
        None if module.config.get(key) is None else whole(module.config, key) for key in ("out_features", "in_features")
    ]
    has_bias = flag(module.config, "bias", True)
    slots = (Slot("linear.weight", tuple(sizes)), Slot("linear.bias", (sizes[0],), has_bias))
    with module.tensors() as tensors:
        _check_module(module, slots, tensors)
        weight = tensors["linear.weight"]
        bias = tensors["linear.bias"].float32() if has_bias else None
        if bias is not None and len(bias) != weight.shape[0]:
            raise ValueError(f"{module.path}: linear.bias has shape {bias.shape}, expected ({weight.shape[0]},)")
        step = DenseStep(values(weight), bias, _ACTIVATIONS[activation])
        tensors.check()
    return step


def _layer_norm(module: Module) -> NormStep:
    width = None if module.config.get("dimension") is None else whole(module.config, "dimension")
    slots = (Slot("norm.weight", (width,)), Slot("norm.bias", (width,)))
    with module.tensors() as tensors:
        _check_module(module, slots, tensors)
        gamma, beta = tensors["norm.weight"].float32(), tensors["norm.bias"].float32()
        tensors.check()
    if gamma.shape != beta.shape:
        raise ValueError(f"{module.path}: norm.bias has shape {beta.shape}, expected {gamma.shape}")
    return NormStep(gamma, beta, 1e-5)


def _check_module(module: Module, slots: tuple[Slot, ...], tensors: Tensors) -> None:
    """Raise ValueError unless a module's file holds these tensors and no others, naming the first that is wrong."""
    read = check_slots(module.path, slots, tensors)
    for name in tensors:
        if name not in read:
            raise ValueError(
                f"{module.path}: the weights hold {shown(name)}, which a {module.type} module does not read"
            )
