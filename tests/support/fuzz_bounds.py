"""Bounds of rounding errors of ops against float64, for `tests/support/fuzzed_ops.py`.

A float32 sum of n products has an error of at most about n U times the sum of the products' magnitudes. U is the unit
roundoff of float32. Inputs are exact in the type in which they are passed. Arguments are float64 arrays.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any
U = 2.0**-24
UNITS = {"float64": U, "float32": U, "bfloat16": 2.0**-8, "float16": 2.0**-11}


def dots(x: Array, w: Array) -> Array:
    """Bound the error of x @ w in float32. Integers and float64 inputs are rounded to float32 first."""
    return (x.shape[-1] + 4) * U * (np.abs(x) @ np.abs(w))


def max_sim(query: Array, tokens: Array) -> float:
    """Bound the error of MaxSim scores, over all documents."""
    return float(2 * len(query) * U * np.abs(query @ tokens.T).max(initial=0) + dots(query, tokens.T).max(initial=0))


def linear(x: Array, w: Array, bias: Array | None, dtype: str) -> Array:
    """Bound the error of x @ w.T + bias with operands stored in `dtype`."""
    size = np.abs(x) @ np.abs(w).T + (0 if bias is None else np.abs(bias))
    bound = 2 * (x.shape[1] + 8) * U * size  # on AMX a float32 product is a sum of bfloat16 terms
    if dtype == "bfloat16":
        return bound + 2.01 * UNITS["bfloat16"] * size
    if dtype == "int8":  # activations have 127 steps or more from min to max, 0 included
        step = (np.maximum(x.max(1, initial=0), 0) - np.minimum(x.min(1, initial=0), 0))[:, None] / 127
        half = np.abs(w).max(1, initial=0)[None] / 254 * 1.01
        return bound + step * np.abs(w).sum(1) + half * np.abs(x).sum(1, keepdims=True) + x.shape[1] * step * half
    return bound


def normed(x: Array, norm: str | None, gamma: Array, eps: float) -> tuple[Array, Array]:
    """Return the normed rows times gamma, and the bound of their error in float32."""
    if norm is None:
        return x, np.zeros_like(x)
    centred = x - x.mean(1, keepdims=True) if norm == "layer" else x
    inverse = 1 / np.sqrt((centred**2).mean(1, keepdims=True) + eps)
    y = centred * inverse
    largest = np.abs(x).max(1, initial=0, keepdims=True) if norm == "layer" else np.abs(centred)
    # The error of the mean is absolute, relative to the largest value. The error of the root is relative.
    return y * gamma, (x.shape[1] + 8) * U * (largest * inverse * (1 + np.abs(y)) + np.abs(y)) * np.abs(gamma)


def scores(q: Array, k: Array, scale: float | None) -> tuple[float, float]:
    """Return the largest attention score and the bound of its error in float32."""
    width = q.shape[-1]
    scale = width**-0.5 if scale is None else scale
    heads = q.shape[1] // max(k.shape[1], 1)
    if not (q.size and k.size and heads):
        return 0.0, 0.0
    size = scale * np.einsum("rhd,shd->rhs", np.abs(q), np.repeat(np.abs(k), heads, 1)).max(initial=0)
    return float(size), float((width + 8) * U * size)


def attention(q: Array, k: Array, v: Array, scale: float | None, dtype: str) -> float:
    """Bound the error of attention's output. Weights and outputs are rounded to `dtype`."""
    _, error = scores(q, k, scale)
    return float(
        np.abs(v).max(initial=0) * (2 * np.expm1(min(2 * error, 50)) + (len(k) + 8) * U + 4 * UNITS.get(dtype, U))
    )


def attention_mass(magnitude: Array, q: Array, k: Array, lse: Array, scale: float | None) -> Array:
    """Bound the error of attention masses. `magnitude` is their value for absolute weights."""
    size, error = scores(q, k, scale)
    relative = np.expm1(min(2 * error + 8 * U * (size + np.abs(lse).max(initial=0)), 50))
    return magnitude * (relative + (len(q) * q.shape[1] + 16) * U)
