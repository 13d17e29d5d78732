"""Activations on final scores, in float32 NumPy; callables of torch are called with tensors."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["ACTIVATIONS", "Activation", "identity", "relu", "resolve", "saved", "sigmoid", "softmax", "tanh"]

Array = npt.NDArray[np.float32]
Activation = Callable[[Array], Array]


def identity(x: Array) -> Array:
    """Return x."""
    return x


def sigmoid(x: Array) -> Array:
    """Return 1 / (1 + exp(-x)), exact at both ends."""
    e = np.exp(-np.abs(x))
    result: Array = np.where(x >= 0, 1 / (1 + e), e / (1 + e)).astype(np.float32)
    return result


def tanh(x: Array) -> Array:
    """Return the hyperbolic tangent."""
    return np.asarray(np.tanh(x), np.float32)


def relu(x: Array) -> Array:
    """Return max(x, 0)."""
    return np.asarray(np.maximum(x, 0), np.float32)


def softmax(x: Array) -> Array:
    """Return exp(x) / sum(exp(x)) over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    result: Array = np.asarray(e / e.sum(axis=-1, keepdims=True), np.float32)
    return result


def _log_softmax(x: Array) -> Array:
    shifted = x - x.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)), np.float32)


def _log_sigmoid(x: Array) -> Array:
    return np.asarray(np.minimum(x, 0) - np.log1p(np.exp(-np.abs(x))), np.float32)


def _softplus(x: Array) -> Array:
    return np.asarray(np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))), np.float32)


def _gelu(x: Array) -> Array:
    # In float64: the two terms of 1 + erf(x) cancel for negative x.
    half = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in x.ravel().tolist()])
    return np.asarray(x * half.reshape(x.shape), np.float32)


def _hard_sigmoid(x: Array) -> Array:
    return np.asarray(np.clip(x + np.float32(3), 0, 6) / np.float32(6), np.float32)


def _elu(x: Array) -> Array:
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0))).astype(np.float32)


_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946

# Keyed by the names of torch's classes in lower case. The classes from "softmax" on have settings; these are their
# defaults.
ACTIVATIONS: dict[str, Activation] = {
    "identity": identity,
    "sigmoid": sigmoid,
    "tanh": tanh,
    "relu": relu,
    "relu6": lambda x: np.clip(x, np.float32(0), np.float32(6)),
    "logsigmoid": _log_sigmoid,
    "silu": lambda x: np.asarray(x * sigmoid(x), np.float32),
    "mish": lambda x: np.asarray(x * np.tanh(_softplus(x)), np.float32),
    "hardsigmoid": _hard_sigmoid,
    "hardswish": lambda x: np.asarray(x * np.clip(x + np.float32(3), 0, 6) / np.float32(6), np.float32),
    "softsign": lambda x: np.asarray(x / (1 + np.abs(x)), np.float32),
    "tanhshrink": lambda x: np.asarray(x - np.tanh(x), np.float32),
    "selu": lambda x: (_SELU_SCALE * np.where(x > 0, x, _SELU_ALPHA * np.expm1(np.minimum(x, 0)))).astype(np.float32),
    "softmax": softmax,
    "softmin": lambda x: softmax(-x),
    "logsoftmax": _log_softmax,
    "softplus": _softplus,
    "gelu": _gelu,
    "elu": _elu,
    "celu": _elu,
    "hardtanh": lambda x: np.clip(x, np.float32(-1), np.float32(1)),
    "leakyrelu": lambda x: np.where(x > 0, x, np.float32(0.01) * x).astype(np.float32),
    "hardshrink": lambda x: np.where(np.abs(x) > 0.5, x, np.float32(0)).astype(np.float32),
    "softshrink": lambda x: (np.sign(x) * np.maximum(np.abs(x) - np.float32(0.5), 0)).astype(np.float32),
}
# Classes of torch without settings: all their objects are the same function.
_WITHOUT_SETTINGS = tuple(ACTIVATIONS)[: tuple(ACTIVATIONS).index("softmax")]


def resolve(activation: Any, name: str = "activation_fn") -> Activation:
    """Return a function on float32 arrays for a name of `ACTIVATIONS`, a callable on arrays, or a torch module.

    torch's modules without settings (Identity, Sigmoid, Tanh, ReLU, SiLU, ...) become functions of this module; any
    other torch callable is called with a tensor. Raises ValueError for an unknown name, TypeError for what is not
    callable.
    """
    if isinstance(activation, str):
        known = activation.rpartition(".")[2].lower() if activation.startswith("torch.nn.") else activation
        if known not in ACTIVATIONS:
            raise ValueError(f"{name} must be a callable or one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        return ACTIVATIONS[known]
    if not callable(activation):
        raise TypeError(f"{name} must be a callable or a name, got {type(activation).__name__}")
    module = getattr(activation, "__module__", None) or type(activation).__module__
    known = type(activation).__name__.lower()
    if module.startswith("torch.nn.modules") and known in _WITHOUT_SETTINGS:
        return ACTIVATIONS[known]
    if module.startswith("torch") or _is_torch_module(activation):
        return _through_torch(activation)
    function: Activation = activation
    return function


def saved(name: str, where: str) -> Activation:
    """Return the activation that a checkpoint saved: a name of a torch class in small letters, or a dotted path.

    Args:
        name: what `Checkpoint.activation` returned. A path with dots is imported and the class made, as only a trusted
            checkpoint has one; it is called with tensors, as sentence-transformers calls it.
        where: the checkpoint, for messages.

    Raises ValueError for what is no activation of torch, ImportError where a path or torch cannot be imported.
    """
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]
    made = _imported(name, where) if "." in name else _of_torch(name, where)
    if not callable(made):
        raise ValueError(f"the activation {name!r} saved in {where} is not callable: it is a {type(made).__name__}")
    return _through_torch(made)


def _of_torch(name: str, where: str) -> Any:
    try:
        from torch.nn.modules import activation as module
    except ImportError:
        raise ImportError(
            f"the activation {name!r} saved in {where} needs torch: pip install 'fastrerank[torch]', or pass "
            "activation_fn"
        ) from None
    found = next((kind for title, kind in vars(module).items() if title.lower() == name and title in module.__all__), 0)
    try:
        return found()  # type: ignore[operator]  # what cannot be called, and what needs arguments, is refused alike
    except TypeError:
        raise ValueError(
            f"the activation {name!r} saved in {where} is not one that torch makes without arguments; pass "
            f"activation_fn, such as one of {', '.join(ACTIVATIONS)}"
        ) from None


def _imported(path: str, where: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"the activation {path!r} saved in {where} cannot be imported ({error}): install the package that has it, "
            "or pass activation_fn"
        ) from error


def _is_torch_module(value: Any) -> bool:
    return any(base.__module__.startswith("torch.nn") for base in type(value).__mro__)


def _through_torch(activation: Callable[[Any], Any]) -> Activation:
    def apply(x: Array) -> Array:
        import torch

        with torch.inference_mode():
            result: Array = activation(torch.from_numpy(np.array(x))).float().numpy()
        return result

    return apply
