"""Attention that weighted rows give to each key, in Triton: one program per tile of keys and key head.

A program holds its keys and walks over the rows of the query heads that share them, head after head, so that grouped
heads fill tiles of queries. Keys are the rows of the product, so that the sum over queries stays within a thread until
the end. The programs of each key head write their sums to memory of their own, (Hkv, S) float32, and a second kernel
adds them in order: no atomics, the same bits every time. One program for all key heads would need neither, but 2,048
keys are only 16 tiles, too few for a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastrerank.ops._attention.triton import capability, constants, tanh

__all__ = ["Tile", "attention_mass", "constants", "gather", "kernel", "tile"]


class Tile(NamedTuple):
    """Queries and keys per tile, warps, and stages of the loop over queries."""

    queries: int
    keys: int
    warps: int
    stages: int


# By the largest head size of a tile. They fit and hardly spill when compiled, and were not chosen by measured time. On
# 9.0, the one for heads of 128 is within 5 % of the fastest of twelve on an H200 at 10,000 keys, 17 % at 2,000.
_HALF = {64: Tile(64, 128, 8, 3), 128: Tile(64, 128, 8, 2), 256: Tile(32, 64, 4, 2)}
_HALF_90 = _HALF | {128: Tile(64, 128, 4, 2)}
# float32 has no tensor cores and keeps its operands in registers: tiles for correctness, not for speed.
_SINGLE = {64: Tile(16, 32, 4, 1), 128: Tile(16, 16, 8, 1), 256: Tile(16, 16, 8, 1)}
GATHERED = 256  # keys of a program that adds the key heads' sums


def tile(head_dim: int, dtype: torch.dtype, arch: int) -> Tile:
    """Return the tile for a head size, dtype and compute capability (90 for 9.0); from a table; nothing is timed.

    All tiles fit in the 99 KB of shared memory of consumer devices.
    """
    table = _SINGLE if dtype == torch.float32 else _HALF_90 if arch == 90 else _HALF
    return next(chosen for largest, chosen in table.items() if head_dim <= largest)


@triton.jit
def _rows(rows, keep, first: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """(rows, WIDTH) from column `first` of the rows at these pointers; zeros in rows not kept and beyond the head."""
    columns = first + tl.arange(0, WIDTH)
    if first + WIDTH > D:
        return tl.load(rows[:, None] + columns[None, :], mask=keep[:, None] & (columns[None, :] < D), other=0.0)
    return tl.load(rows[:, None] + columns[None, :], mask=keep[:, None], other=0.0)


# Not specialised on numbers of rows and keys and addresses of vectors, which differ from call to call.
@triton.jit(
    do_not_specialize=["R", "S", "out_head"],
    do_not_specialize_on_alignment=["LSE", "LO", "HI", "WEIGHT", "HEADS", "OUT"],
)
def kernel(
    Q,
    K,
    LSE,
    LO,
    HI,
    WEIGHT,
    HEADS,
    OUT,
    R,
    S,
    H,
    inner,
    factor,
    q_row,
    q_head,
    k_row,
    k_head,
    out_head,
    G: tl.constexpr,
    P: tl.constexpr,
    PP: tl.constexpr,
    D: tl.constexpr,
    DA: tl.constexpr,
    DB: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ADD: tl.constexpr,
):
    """Keys [BN * program 0, ...) and the P heads from P * program 1 on; their sum goes to row program 1 of OUT.

    G query heads share a key head, P divides G; PP: P rounded up to a power of two. ADD: to what OUT holds.
    """
    part = tl.program_id(1)
    keys = tl.program_id(0) * BN + tl.arange(0, BN)
    real = keys < S
    slot = tl.arange(0, PP)
    read = slot < P
    if WEIGHTED:  # heads of weight 0 are left out: the n-th of the others is the slot with count n
        read = read & (tl.load(HEADS + part * P + slot, mask=read, other=0.0) != 0.0)
    count = tl.cumsum(read.to(tl.int32), 0) - 1
    queries = tl.sum(read.to(tl.int32), 0) * R
    # no queries where no row sees a key of the tile
    begin, end = S, 0
    for r in range(0, R, BM):
        row = r + tl.arange(0, BM)
        lo = tl.load(LO + row, mask=row < R, other=0)
        hi = tl.load(HI + row, mask=row < R, other=0)
        begin = tl.minimum(begin, tl.min(tl.where(lo < hi, lo, S)))
        end = tl.maximum(end, tl.max(tl.where(lo < hi, hi, 0)))
    first = tl.program_id(0) * BN
    queries = tl.where((begin < first + BN) & (end > first), queries, 0)
    held = keys < tl.where(queries > 0, S, 0)

    rows = K + keys.to(tl.int64) * k_row + (part * P // G).to(tl.int64) * k_head
    ka = _rows(rows, held, 0, D, DA)
    kb = ka
    if DB > 0:
        kb = _rows(rows, held, DA, D, DB)
    masses = tl.zeros((BN, BM), tl.float32)
    for n in range(0, queries, BM):
        query = n + tl.arange(0, BM)
        row = query % R
        head = query // R
        if WEIGHTED:
            head = tl.sum(tl.where((count[None, :] == head[:, None]) & read[None, :], slot[None, :], 0), 1)
        head += part * P
        there = query < queries
        lse = tl.load(LSE + row.to(tl.int64) * H + head, mask=there, other=float("-inf"))
        there = there & (lse != float("-inf"))
        lse = tl.where(there, lse, 0.0)
        weight = tl.load(WEIGHT + row, mask=there, other=0.0)
        if WEIGHTED:
            weight *= tl.load(HEADS + head, mask=there, other=0.0)
        # Intervals are clamped here: checking them before the launch would wait for the device.
        lo = tl.load(LO + row, mask=there, other=0)
        hi = tl.minimum(tl.load(HI + row, mask=there, other=0), S)
        pointers = Q + row.to(tl.int64) * q_row + head.to(tl.int64) * q_head
        # "ieee": float32 stays float32 (no tf32); 16-bit inputs are not affected
        s = tl.dot(ka, tl.trans(_rows(pointers, there, 0, D, DA)), input_precision="ieee")
        if DB > 0:
            s = tl.dot(kb, tl.trans(_rows(pointers, there, DA, D, DB)), acc=s, input_precision="ieee")
        s *= inner
        if SOFTCAP:
            s = tanh(s) * factor
        seen = (keys[:, None] >= lo[None, :]) & (keys[:, None] < hi[None, :])
        share = tl.exp2((s - lse[None, :]) * 1.4426950408889634) * weight[None, :]
        masses += tl.where(seen, share, 0.0)
    mass = tl.sum(masses, 1)
    out = OUT + part.to(tl.int64) * out_head + keys
    if ADD:
        mass += tl.load(out, mask=real, other=0.0)
    tl.store(out, mass, mask=real)


@triton.jit(do_not_specialize=["S"], do_not_specialize_on_alignment=["PARTS", "OUT"])
def gather(PARTS, OUT, S, N: tl.constexpr, BLOCK: tl.constexpr):
    """OUT (S,) += the rows of PARTS (N, S), summed in their order."""
    keys = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = keys < S
    total = tl.zeros((BLOCK,), tl.float32)
    parts = PARTS + keys
    for _ in range(N):
        total += tl.load(parts, mask=real, other=0.0)
        parts += S
    tl.store(OUT + keys, tl.load(OUT + keys, mask=real, other=0.0) + total, mask=real)


def attention_mass(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    lo: torch.Tensor,
    hi: torch.Tensor,
    row_weight: torch.Tensor,
    head_weight: torch.Tensor | None,
    scale: float,
    softcap: float,
    per_head: bool,
    out: torch.Tensor,
    chosen: Tile | None = None,
) -> None:
    """Launch the kernels on arguments that `fastrerank.ops.attention_mass` has checked; adds to `out`.

    `chosen` replaces the table's tile.
    """
    rows, heads, head_dim = q.shape
    keys, kv_heads, _ = k.shape
    arch = capability(q.device.index) if q.is_cuda else 0
    if chosen is None:
        chosen = tile(head_dim, q.dtype, arch)
    parts = heads if per_head else kv_heads
    direct = per_head or parts == 1
    sums = out if direct else torch.empty((parts, keys), dtype=torch.float32, device=q.device)
    together = heads // parts
    kernel[(triton.cdiv(keys, chosen.keys), parts)](
        q,
        k,
        lse,
        lo,
        hi,
        row_weight,
        row_weight if head_weight is None else head_weight,
        sums,
        rows,
        keys,
        heads,
        scale / softcap if softcap else scale,
        softcap,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        sums.stride(0),
        G=heads // kv_heads,
        P=together,
        PP=triton.next_power_of_2(together),
        BM=chosen.queries,
        BN=chosen.keys,
        WEIGHTED=head_weight is not None,
        SOFTCAP=softcap > 0,
        ADD=direct,
        num_warps=chosen.warps,
        num_stages=chosen.stages,
        **constants(head_dim, q.dtype, arch),
    )
    if not direct:
        gather[(triton.cdiv(keys, GATHERED),)](sums, out, keys, N=parts, BLOCK=GATHERED, num_warps=4)
