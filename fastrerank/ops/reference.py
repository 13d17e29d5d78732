"""The ops in naive NumPy: the specification that the kernels are tested against. Works in the inputs' precision."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "attention",
    "attention_mass",
    "cur_topk",
    "gated",
    "label_logits",
    "max_sim",
    "norm_rows",
    "rotary",
]


def attention(
    q: npt.NDArray[Any],
    k: npt.NDArray[Any],
    v: npt.NDArray[Any],
    lo: npt.NDArray[Any],
    hi: npt.NDArray[Any],
    plo: npt.NDArray[Any] | None = None,
    phi: npt.NDArray[Any] | None = None,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Softmax attention in which row i sees the keys [lo[i], hi[i]) and [plo[i], phi[i]), which do not overlap.

    Args:
        q: (T, H, D). k, v: (S, Hkv, D), Hkv divides H and query head h reads key head h // (H / Hkv).
        lo, hi, plo, phi: integers (T,). scale: factor of the scores, None for D**-0.5.
        softcap: scores become softcap * tanh(score / softcap) where it is above 0.

    Returns (T, H, D), zeros in rows without keys, and the log-sum-exp (T, H), -infinity in rows without keys; both in
    q's dtype.

    Example:
        >>> attention(np.zeros((1, 1, 8)), np.ones((2, 1, 8)), np.ones((2, 1, 8)), np.array([0]), np.array([2]))[1]
        array([[0.69314718]])
    """
    rows, heads, head_dim = q.shape
    group = heads // k.shape[1]
    out, lse = np.zeros_like(q), np.full((rows, heads), -np.inf, q.dtype)
    for i in range(rows):
        keys = np.arange(lo[i], hi[i])
        if plo is not None and phi is not None:
            keys = np.concatenate([np.arange(plo[i], phi[i]), keys])
        if not keys.size:
            continue
        for h in range(heads):
            s = k[keys, h // group] @ q[i, h] * q.dtype.type(head_dim**-0.5 if scale is None else scale)
            if softcap > 0:
                s = softcap * np.tanh(s / softcap)
            p = np.exp(s - s.max())
            out[i, h] = p @ v[keys, h // group] / p.sum()
            lse[i, h] = s.max() + np.log(p.sum())
    return out, lse


def attention_mass(
    q: npt.NDArray[Any],
    k: npt.NDArray[Any],
    lse: npt.NDArray[Any],
    lo: npt.NDArray[Any],
    hi: npt.NDArray[Any],
    row_weight: npt.NDArray[Any],
    *,
    head_weight: npt.NDArray[Any] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    per_head: bool = False,
    out: npt.NDArray[Any] | None = None,
) -> npt.NDArray[Any]:
    """The softmax weights of R rows at each of S keys, summed over rows and heads, each with a weight.

    Args:
        q: (R, H, D). k: (S, Hkv, D), Hkv divides H and query head h reads key head h // (H / Hkv).
        lse: (R, H) log-sum-exp of the rows' scores. Rows of -infinity add nothing.
        lo, hi: integers (R,): row r is read at the keys [lo[r], hi[r]).
        row_weight: (R,). head_weight: (H,), None for ones; heads of weight 0 are left out.
        scale: factor of the scores, None for D**-0.5.
        softcap: scores become softcap * tanh(score / softcap) where it is above 0.
        per_head: one sum for each head. out: added to the result, None for zeros; it is not changed.

    Returns (S,), or (H, S) with per_head, in q's dtype.

    Example:
        >>> one = np.ones((1, 1, 8))
        >>> attention_mass(one, np.zeros((2, 1, 8)), np.log([[2.0]]), np.array([0]), np.array([2]), np.array([3.0]))
        array([1.5, 1.5])
    """
    rows, heads, head_dim = q.shape
    group = heads // k.shape[1]
    sums = np.zeros((heads, k.shape[0]), q.dtype)
    for h in range(heads):
        if head_weight is not None and head_weight[h] == 0:
            continue
        for r in range(rows):
            if lse[r, h] == -np.inf:
                continue
            s = k[lo[r] : hi[r], h // group] @ q[r, h] * q.dtype.type(head_dim**-0.5 if scale is None else scale)
            if softcap > 0:
                s = softcap * np.tanh(s / softcap)
            sums[h, lo[r] : hi[r]] += row_weight[r] * np.exp(s - lse[r, h])
    if not per_head:
        total = np.zeros(k.shape[0], q.dtype)
        for h in range(heads):
            total += sums[h] if head_weight is None else head_weight[h] * sums[h]
        sums = total
    return sums if out is None else out + sums


def cur_topk(
    queries: npt.NDArray[Any], vectors: npt.NDArray[Any], k: int, exclude: list[list[int]] | None = None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """The k largest values in each row of `queries @ vectors`: by value descending, then by column ascending.

    Args:
        queries: (B, K). vectors: (K, N), an index's stored values. exclude: for each query the columns left out.

    Returns int64 (B, k') columns and their values, summed in the inputs' precision and rounded to float32, with
    k' = min(k, the most columns that a query may have). Rows that have fewer end with column -1 and -infinity. Raises
    ValueError for a value that is NaN.

    Example:
        >>> cur_topk(np.ones((1, 1)), np.array([[1.0, 5.0, 3.0, 5.0]]), 3)[0].tolist()
        [[1, 3, 2]]
    """
    with np.errstate(invalid="ignore"):
        products = (queries @ vectors).astype(np.float32)
    if np.isnan(products).any():
        raise ValueError("queries @ vectors has a NaN")
    left_out = exclude or [[] for _ in queries]
    rows = []
    for line, out in zip(products, left_out, strict=True):
        order = np.argsort(-line, kind="stable")
        rows.append(order[~np.isin(order, out)][:k])
    ids = np.full((len(rows), max(map(len, rows), default=min(k, products.shape[1]))), -1, np.int64)
    scores = np.full(ids.shape, -np.inf, np.float32)
    for i, order in enumerate(rows):
        ids[i, : len(order)], scores[i, : len(order)] = order, products[i, order]
    return ids, scores


def gated(x: npt.NDArray[Any], activation: str) -> npt.NDArray[Any]:
    """The activation of a row's first half times its second half.

    Args:
        x: (..., 2 W). activation: "silu", "gelu" (by the error function), "gelu_tanh" or "relu".

    Returns (..., W) in x's dtype.

    Example:
        >>> gated(np.array([[2.0, -1.0, 3.0, 4.0]]), "relu")
        array([[6., 0.]])
    """
    a, b = np.split(x, 2, axis=-1)
    if activation == "silu":
        a = a / (1 + np.exp(-a))
    elif activation == "gelu":
        a = 0.5 * a * (1 + np.vectorize(math.erf, otypes=[a.dtype])(a / math.sqrt(2)))
    elif activation == "gelu_tanh":
        a = 0.5 * a * (1 + np.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))
    else:
        a = np.maximum(a, 0)
    product: npt.NDArray[Any] = a * b
    return product


def label_logits(
    hidden: npt.NDArray[Any],
    weight: npt.NDArray[Any],
    *,
    norm: str | None = None,
    norm_weight: npt.NDArray[Any] | None = None,
    norm_bias: npt.NDArray[Any] | None = None,
    eps: float = 1e-6,
    bias: npt.NDArray[Any] | None = None,
    scale: float = 1.0,
    softcap: float = 0.0,
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32]]:
    """K rows of an LM head on the normed hidden states of N positions.

    Args:
        hidden: (N, h). weight: (K, h).
        norm_weight, norm_bias: (h,), None for ones and zeros. bias: (K,), None for zeros.
        norm: "rms" divides a row by the root of its mean square plus eps, "layer" also takes the mean off first.
        scale: factor of the products. softcap: logits become softcap * tanh(logit / softcap) where it is above 0.

    Returns (N, K) in hidden's dtype, and int32 (N, K) of label positions by logit descending: ties by position, NaN as
    -infinity.

    Example:
        >>> label_logits(np.array([[3.0, 4.0]]), np.eye(2), norm="rms", eps=0.0)
        (array([[0.84852814, 1.13137085]]), array([[1, 0]], dtype=int32))
    """
    x = hidden
    if norm == "layer":
        x = x - x.mean(axis=1, keepdims=True)
    if norm is not None:
        x = x / np.sqrt((x * x).mean(axis=1, keepdims=True) + hidden.dtype.type(eps))
    if norm_weight is not None:
        x = x * norm_weight
    if norm_bias is not None:
        x = x + norm_bias
    logits = x @ weight.T * hidden.dtype.type(scale)
    if bias is not None:
        logits = logits + bias
    if softcap > 0:
        logits = softcap * np.tanh(logits / softcap)
    order = np.argsort(-np.where(np.isnan(logits), -np.inf, logits), axis=1, kind="stable")
    return logits, order.astype(np.int32)


def max_sim(query: npt.NDArray[Any], tokens: npt.NDArray[Any], offsets: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """Mean over the query's tokens of the largest dot product with one of the document's tokens.

    Args:
        query: (Q, D). tokens: (T, D). offsets: int64 (N+1,), document d's tokens are tokens[offsets[d]:offsets[d+1]].

    Returns (N,) in the inputs' dtype, float64 for integers.

    Example:
        >>> max_sim(np.eye(2, 4), np.eye(4), np.array([0, 1, 4])).tolist()
        [0.5, 0.5]
    """
    best = [(query @ tokens[begin:end].T).max(axis=1) for begin, end in pairwise(offsets)]
    dtype = np.result_type(query, tokens)
    return np.array([similarities.mean() for similarities in best], dtype if dtype.kind == "f" else np.float64)


def norm_rows(
    x: npt.NDArray[Any],
    norm: str,
    weight: npt.NDArray[Any],
    bias: npt.NDArray[Any] | None,
    eps: float,
    residual: npt.NDArray[Any] | None = None,
) -> npt.NDArray[Any]:
    """Norm of x + residual over the last dimension.

    Args:
        x: (..., W). norm: "rms" divides a row by the root of its mean square plus eps, "layer" also takes the mean off
            first. weight: (W,). bias: (W,) or None. residual: like x, or None.

    Returns an array like x.

    Example:
        >>> norm_rows(np.array([[3.0, 4.0]]), "rms", np.ones(2), None, 0.0)
        array([[0.84852814, 1.13137085]])
    """
    y: npt.NDArray[Any] = x if residual is None else x + residual
    if norm == "layer":
        y = y - y.mean(axis=-1, keepdims=True)
    y = y / np.sqrt((y * y).mean(axis=-1, keepdims=True) + x.dtype.type(eps)) * weight
    return y if bias is None else y + bias


def rotary(
    q: npt.NDArray[Any], k: npt.NDArray[Any], cos: npt.NDArray[Any], sin: npt.NDArray[Any]
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Queries and keys rotated by their positions, in the first R columns of a head: column c with column c + R / 2.

    Args:
        q: (1, H, T, D). k: (1, Hkv, T, D). cos, sin: (1, T, R), R even and at most D.

    Returns arrays like q and k.

    Example:
        >>> rotary(np.array([[[[3.0, 4.0]]]]), np.ones((1, 1, 1, 2)), np.zeros((1, 1, 2)), np.ones((1, 1, 2)))[0]
        array([[[[-4.,  3.]]]])
    """
    turned = []
    for x in (q, k):
        out, half = x.copy(), cos.shape[-1] // 2
        for c in range(half):
            out[..., c] = x[..., c] * cos[..., c] - x[..., half + c] * sin[..., c]
            out[..., half + c] = x[..., half + c] * cos[..., half + c] + x[..., c] * sin[..., half + c]
        turned.append(out)
    return turned[0], turned[1]
