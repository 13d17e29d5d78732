"""Rotary embedding of queries and keys in Triton: one program per tile of tokens and a few heads, float32 inside."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

__all__ = ["WARPS", "heads_of", "kernel", "rotary", "tokens_of"]

# Heads of a program, which share its cosines and sines. Not yet chosen by measured time.
HEADS = 4
WARPS = 4
VALUES = 1024  # of one half of a head's columns that a program takes in one step: 8 a thread, 16 bytes of bfloat16


def tokens_of(rotated: int) -> int:
    """Return how many tokens a program takes where `rotated` columns of a head are rotated."""
    return max(1, VALUES // int(triton.next_power_of_2(rotated // 2)))


def heads_of(heads: int, kv_heads: int) -> int:
    """Return how many heads a program takes: it divides both numbers, so that every program is full."""
    return math.gcd(HEADS, heads, kv_heads)


@triton.jit
def _turn(
    X,
    OUT,
    x_row,
    x_head,
    out_row,
    rows,
    inside,
    first,
    cos,
    sin,
    cos_,
    sin_,
    D: tl.constexpr,
    R: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Heads [first, first + HEADS) of X at `rows`; OUT is (T, heads, D) from X's first head on."""
    columns = tl.arange(0, BR)
    kept = inside[:, None] & (columns < R // 2)[None, :]
    for step in tl.static_range(HEADS):
        x = X + rows[:, None] * x_row + (first + step).to(tl.int64) * x_head
        out = OUT + rows[:, None] * out_row + (first + step) * D
        a = tl.load(x + columns[None, :], mask=kept, other=0.0).to(tl.float32)
        b = tl.load(x + (R // 2 + columns[None, :]), mask=kept, other=0.0).to(tl.float32)
        tl.store(out + columns[None, :], a * cos - b * sin, mask=kept)
        tl.store(out + (R // 2 + columns[None, :]), b * cos_ + a * sin_, mask=kept)
        if R < D:
            rest = R + tl.arange(0, BD)
            left = inside[:, None] & (rest < D)[None, :]
            tl.store(out + rest[None, :], tl.load(x + rest[None, :], mask=left), mask=left)


@triton.jit(do_not_specialize=["T"])
def kernel(
    Q,
    K,
    COS,
    SIN,
    OUT,
    T,
    heads,
    kv_heads,
    q_row,
    q_head,
    k_row,
    k_head,
    cos_row,
    sin_row,
    D: tl.constexpr,
    R: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Tokens [BT * program 0, ...), and program 1 of the groups of HEADS heads: first the queries', then the keys'."""
    tokens = tl.program_id(0) * BT + tl.arange(0, BT)
    inside = tokens < T
    rows = tokens.to(tl.int64)
    columns = tl.arange(0, BR)
    kept = inside[:, None] & (columns < R // 2)[None, :]
    cosines = COS + rows[:, None] * cos_row + columns[None, :]
    sines = SIN + rows[:, None] * sin_row + columns[None, :]
    cos = tl.load(cosines, mask=kept, other=0.0).to(tl.float32)
    sin = tl.load(sines, mask=kept, other=0.0).to(tl.float32)
    cos_ = tl.load(cosines + R // 2, mask=kept, other=0.0).to(tl.float32)
    sin_ = tl.load(sines + R // 2, mask=kept, other=0.0).to(tl.float32)
    out_row = (heads + kv_heads) * D
    group = tl.program_id(1)
    groups = heads // HEADS
    if group < groups:
        _turn(Q, OUT, q_row, q_head, out_row, rows, inside, group * HEADS, cos, sin, cos_, sin_, D, R, BR, BD, HEADS)
    else:
        _turn(
            K,
            OUT + heads * D,
            k_row,
            k_head,
            out_row,
            rows,
            inside,
            (group - groups) * HEADS,
            cos,
            sin,
            cos_,
            sin_,
            D,
            R,
            BR,
            BD,
            HEADS,
        )


def rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor) -> None:
    """Launch the kernel on arguments that `fastrerank.ops.rotary` describes; fills `out` (T, H + Hkv, D)."""
    _, heads, tokens, head_dim = q.shape
    kv_heads, rotated = k.shape[1], cos.shape[2]
    _, q_head, q_row, _ = q.stride()
    _, k_head, k_row, _ = k.stride()
    together, block = heads_of(heads, kv_heads), tokens_of(rotated)
    grid = (-(-tokens // block), (heads + kv_heads) // together)
    kernel[grid](
        q,
        k,
        cos,
        sin,
        out,
        tokens,
        heads,
        kv_heads,
        q_row,
        q_head,
        k_row,
        k_head,
        cos.stride(1),
        sin.stride(1),
        D=head_dim,
        R=rotated,
        BT=block,
        BR=triton.next_power_of_2(rotated // 2),
        BD=triton.next_power_of_2(max(1, head_dim - rotated)),
        HEADS=together,
        num_warps=WARPS,
    )
