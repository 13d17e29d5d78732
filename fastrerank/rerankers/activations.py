"""Activations on final scores, in float32 NumPy; callables of torch are called with tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["ACTIVATIONS", "Activation", "identity", "relu", "resolve", "sigmoid", "softmax", "tanh"]

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


ACTIVATIONS: dict[str, Activation] = {"identity": identity, "sigmoid": sigmoid, "tanh": tanh, "relu": relu}


def resolve(activation: Any, name: str = "activation_fn") -> Activation:
    """Return a function on float32 arrays for a name of `ACTIVATIONS`, a callable on arrays, or a torch module.

    torch's Identity, Sigmoid, Tanh and ReLU become the functions above; any other torch callable is called with a
    tensor. Raises ValueError for an unknown name and TypeError for what is not callable.
    """
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            raise ValueError(f"{name} must be a callable or one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        return ACTIVATIONS[activation]
    if not callable(activation):
        raise TypeError(f"{name} must be a callable or a name, got {type(activation).__name__}")
    module = getattr(activation, "__module__", None) or type(activation).__module__
    known = type(activation).__name__.lower()
    if module.startswith("torch.nn.modules") and known in ACTIVATIONS:
        return ACTIVATIONS[known]
    if module.startswith("torch") or _is_torch_module(activation):
        return _through_torch(activation)
    function: Activation = activation
    return function


def _is_torch_module(value: Any) -> bool:
    return any(base.__module__.startswith("torch.nn") for base in type(value).__mro__)


def _through_torch(activation: Callable[[Any], Any]) -> Activation:
    def apply(x: Array) -> Array:
        import torch

        with torch.inference_mode():
            result: Array = activation(torch.from_numpy(np.array(x))).float().numpy()
        return result

    return apply
