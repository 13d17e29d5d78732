"""K rows of an LM head at N positions in Triton: one program per position (and per 32 labels, where there are more).

A program reads its row of h values in blocks and computes the dot products with the labels' rows in the same pass: the
root of a norm is one factor of all products, computed on the way. Only a norm with a mean needs a pass before. Every
program reads the labels' rows, from the L2 cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastrerank.ops._attention.triton import tanh

__all__ = ["Tile", "kernel", "label_logits", "tile"]

NORMS = {None: 0, "rms": 1, "layer": 2}
MOST_LABELS = 32  # of a program


class Tile(NamedTuple):
    """Labels and columns per step, and warps."""

    labels: int
    columns: int
    warps: int


def tile(labels: int, width: int) -> Tile:
    """Return the tile for K labels of h columns: 4096 products a step, 16 a thread. Not yet chosen by measured time."""
    rows = min(MOST_LABELS, triton.next_power_of_2(labels))
    return Tile(rows, min(triton.next_power_of_2(width), 4096 // rows), 8)


@triton.jit(do_not_specialize=["K"], do_not_specialize_on_alignment=["OUT", "ORDER"])
def kernel(
    HIDDEN,
    WEIGHT,
    GAMMA,
    BETA,
    BIAS,
    OUT,
    ORDER,
    K,
    H,
    hidden_row,
    weight_row,
    eps,
    scale,
    softcap,
    NORM: tl.constexpr,
    WITH_GAMMA: tl.constexpr,
    WITH_BETA: tl.constexpr,
    WITH_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WITH_ORDER: tl.constexpr,
    BK: tl.constexpr,
    BH: tl.constexpr,
):
    """Row program 0, labels [BK * program 1, ...). WITH_ORDER needs all labels in one program."""
    row = tl.program_id(0).to(tl.int64)
    hidden = HIDDEN + row * hidden_row
    labels = tl.program_id(1) * BK + tl.arange(0, BK)
    real = labels < K
    weight = WEIGHT + labels.to(tl.int64)[:, None] * weight_row
    mean = 0.0
    if NORM == 2:
        total = tl.zeros((BH,), tl.float32)
        for begin in range(0, H, BH):
            columns = begin + tl.arange(0, BH)
            total += tl.load(hidden + columns, mask=columns < H, other=0.0).to(tl.float32)
        mean = tl.sum(total, 0) / H
    squares = tl.zeros((BH,), tl.float32)
    products = tl.zeros((BK, BH), tl.float32)
    shifts = tl.zeros((BK, BH if WITH_BETA else 1), tl.float32)
    for begin in range(0, H, BH):
        columns = begin + tl.arange(0, BH)
        inside = columns < H
        x = tl.load(hidden + columns, mask=inside, other=0.0).to(tl.float32)
        if NORM == 2:
            x = tl.where(inside, x - mean, 0.0)
        if NORM > 0:
            squares += x * x
        if WITH_GAMMA:
            x *= tl.load(GAMMA + columns, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(weight + columns[None, :], mask=real[:, None] & inside[None, :], other=0.0).to(tl.float32)
        products += w * x[None, :]
        if WITH_BETA:
            shifts += w * tl.load(BETA + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    logits = tl.sum(products, 1)
    if NORM > 0:
        logits *= 1.0 / tl.sqrt_rn(tl.sum(squares, 0) / H + eps)
    if WITH_BETA:
        logits += tl.sum(shifts, 1)
    logits *= scale
    if WITH_BIAS:
        logits += tl.load(BIAS + labels, mask=real, other=0.0).to(tl.float32)
    if SOFTCAP:
        logits = softcap * tanh(logits / softcap)
    tl.store(OUT + row * K + labels, logits, mask=real)
    if WITH_ORDER:
        key = tl.where(logits == logits, logits, float("-inf"))
        mine, other = key[:, None], key[None, :]
        first = (other > mine) | ((other == mine) & (labels[None, :] < labels[:, None]))
        place = tl.sum((first & real[None, :]).to(tl.int32), 1)
        tl.store(ORDER + row * K + place, labels, mask=real)


def label_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    norm: str | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    eps: float,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float,
    logits: torch.Tensor,
    order: torch.Tensor | None,
) -> None:
    """Launch the kernel on arguments that `fastrerank.ops.label_logits` has checked; fills `logits` and `order`."""
    rows, (labels, width) = hidden.shape[0], weight.shape
    chosen = tile(labels, width)
    vectors = [None if x is None else x.contiguous() for x in (norm_weight, norm_bias, bias)]
    counted = order is not None and labels <= chosen.labels
    kernel[(rows, triton.cdiv(labels, chosen.labels))](
        hidden,
        weight,
        *(hidden if x is None else x for x in vectors),
        logits,
        order if counted else logits,
        labels,
        width,
        hidden.stride(0),
        weight.stride(0),
        float(eps),
        float(scale),
        float(softcap),
        NORM=NORMS[norm],
        WITH_GAMMA=norm_weight is not None,
        WITH_BETA=norm_bias is not None,
        WITH_BIAS=bias is not None,
        SOFTCAP=softcap > 0,
        WITH_ORDER=counted,
        BK=chosen.labels,
        BH=chosen.columns,
        num_warps=chosen.warps,
    )
    if order is not None and not counted:
        keys = logits.masked_fill(logits.isnan(), float("-inf"))
        order.copy_(keys.sort(dim=1, descending=True, stable=True).indices)
