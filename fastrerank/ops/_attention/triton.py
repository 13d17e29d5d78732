"""Attention by key intervals in Triton: one program per tile of rows and query head, an online softmax over the keys.

A tile of rows reads the union of its rows' intervals. Blocks of keys that every row sees completely need no mask and
run in a pipelined loop. The others are masked per row, and keys that no row sees are skipped.

A head is read as two tiles whose widths are powers of two (96 = 64 + 32, 80 = 64 + 16), because a Triton tile must have
one and a dot product needs at least 16: padding 80 or 96 to 128 would waste a third of the tensor cores' work. Hopper's
tensor cores get both tiles in one layout or the head padded (`constants` says why).

Programs begin with the last rows, all heads of a tile side by side: later rows of a long causal prompt see more keys,
and the programs that begin last should be short.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

__all__ = ["Tile", "attention", "constants", "kernel", "tanh", "tile"]


class Tile(NamedTuple):
    """Rows and keys per tile, warps, and stages of the pipelined loop."""

    rows: int
    keys: int
    warps: int
    stages: int


# By the largest head size of a line. Those of 90 up to 128 are within 10 % of the fastest of some fifteen on an H200:
# on passages of some 90 tokens, on documents of 512 and on causal prompts of 2,000 and 10,000 tokens (heads of 32: on
# passages alone). The others fit and hardly spill when compiled; they were never timed.
_HALF = {
    80: {64: Tile(128, 64, 8, 3), 128: Tile(128, 32, 8, 3), 256: Tile(32, 32, 8, 2)},
    90: {32: Tile(64, 64, 4, 2), 64: Tile(64, 64, 4, 3), 128: Tile(64, 64, 4, 3), 256: Tile(128, 32, 8, 2)},
    100: {64: Tile(128, 64, 4, 3), 128: Tile(128, 64, 8, 3), 256: Tile(64, 64, 8, 2)},
}
_HALF_PREFIXED = {90: {128: Tile(64, 32, 4, 3)}}  # faster where rows see a prefix too
_HALF_SMALL = {64: Tile(64, 64, 4, 2), 128: Tile(128, 32, 8, 2), 256: Tile(32, 32, 8, 2)}
# float32 has no tensor cores and keeps its operands in registers: tiles for correctness, not for speed.
_SINGLE = {64: Tile(32, 32, 8, 1), 128: Tile(16, 16, 8, 1), 256: Tile(16, 16, 8, 1)}


def tile(head_dim: int, dtype: torch.dtype, arch: int, *, prefixed: bool = False) -> Tile:
    """Return the tile for a head size, dtype and compute capability (90 for 9.0); from a table; nothing is timed.

    Capabilities without a row of their own take tiles that fit in the 99 KB of shared memory of consumer devices.
    """
    table = _SINGLE if dtype == torch.float32 else _HALF.get(100 if arch == 103 else arch, _HALF_SMALL)
    largest = next(largest for largest in table if head_dim <= largest)
    if prefixed and dtype != torch.float32:
        return _HALF_PREFIXED.get(arch, table).get(largest, table[largest])
    return table[largest]


def constants(head_dim: int, dtype: torch.dtype, arch: int) -> dict[str, int]:
    """Return the kernel's constants that split a head in two tiles; the second has 0 columns where one is enough.

    From compute capability 9.0 on, tensor cores read 16-bit tiles from shared memory by descriptors, which name the
    layout of a tile by its width. With two layouts in one kernel, ptxas 12.8 gives some products the descriptor of the
    wrong one (seen in the machine code for sm_90 and in results): tiles of less than 64 columns, which have layouts of
    their own, stand alone there.
    """
    first = 1 << (head_dim.bit_length() - 1)
    if head_dim <= 16:
        return {"D": head_dim, "DA": 16, "DB": 0}
    rest = head_dim - first
    if rest and arch >= 90 and dtype != torch.float32:
        if first < 128:
            return {"D": head_dim, "DA": 2 * first, "DB": 0}
        return {"D": head_dim, "DA": first, "DB": max(64, triton.next_power_of_2(rest))}
    return {"D": head_dim, "DA": first, "DB": max(16, triton.next_power_of_2(rest)) if rest else 0}


@triton.jit
def _rows(base, rows, keep, stride, first: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, MASK: tl.constexpr):
    """(rows, WIDTH) of a head from its column `first` on; zeros in rows that are not kept and beyond the head."""
    columns = first + tl.arange(0, WIDTH)
    pointers = base + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    if first + WIDTH > D:
        return tl.load(pointers, mask=keep[:, None] & (columns[None, :] < D), other=0.0)
    if MASK:
        return tl.load(pointers, mask=keep[:, None], other=0.0)
    return tl.load(pointers)


@triton.jit
def tanh(x):
    """tanh to about 3 ulp: by the exponential, and by an odd polynomial fitted on |x| <= 0.55, where 1 - t cancels."""
    t = tl.exp2(tl.abs(x) * -2.8853900817779268)  # e^-2|x|
    large = (1.0 - t) / (1.0 + t)
    square = x * x
    p = square * -0.006282467395067215 + 0.021077753975987434
    p = p * square - 0.05385385826230049
    p = p * square + 0.13332602381706238
    p = p * square - 0.33333319425582886
    small = x * (p * square) + x
    return tl.where(tl.abs(x) < 0.55, small, tl.where(x < 0, -large, large))


@triton.jit
def _step(
    qa,
    qb,
    k,
    v,
    n,
    end,
    lo,
    hi,
    m,
    total,
    acc_a,
    acc_b,
    k_row,
    v_row,
    inner,
    factor,
    D: tl.constexpr,
    DA: tl.constexpr,
    DB: tl.constexpr,
    BN: tl.constexpr,
    MASK: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Add the keys [n, min(n + BN, end)) to the online softmax; without MASK every row sees all BN of them."""
    keys = n + tl.arange(0, BN)
    inside = keys < end
    # "ieee": float32 stays float32 (no tf32); 16-bit inputs are not affected
    s = tl.dot(qa, tl.trans(_rows(k, keys, inside, k_row, 0, D, DA, MASK)), input_precision="ieee")
    if DB > 0:
        s = tl.dot(qb, tl.trans(_rows(k, keys, inside, k_row, DA, D, DB, MASK)), acc=s, input_precision="ieee")
    if SOFTCAP:
        s = tanh(s * inner)
    if MASK:
        seen = (keys[None, :] >= lo[:, None]) & (keys[None, :] < hi[:, None]) & inside[None, :]
        s = tl.where(seen, s, float("-inf"))
    largest = tl.maximum(m, tl.max(s, 1) * factor)
    shift = tl.where(largest == float("-inf"), 0.0, largest)  # rows without a key so far
    p = tl.exp2(s * factor - shift[:, None])
    shrink = tl.exp2(m - shift)
    total = total * shrink + tl.sum(p, 1)
    values = _rows(v, keys, inside, v_row, 0, D, DA, MASK)
    p = p.to(values.dtype)
    acc_a = tl.dot(p, values, acc=acc_a * shrink[:, None], input_precision="ieee")
    if DB > 0:
        values_b = _rows(v, keys, inside, v_row, DA, D, DB, MASK)
        acc_b = tl.dot(p, values_b, acc=acc_b * shrink[:, None], input_precision="ieee")
    return largest, total, acc_a, acc_b


@triton.jit
def _span(
    qa,
    qb,
    k,
    v,
    lo,
    hi,
    dead,
    m,
    total,
    acc_a,
    acc_b,
    k_row,
    v_row,
    inner,
    factor,
    D: tl.constexpr,
    DA: tl.constexpr,
    DB: tl.constexpr,
    BN: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Add one interval per row to the online softmax. `dead` rows see no keys, so their sums do not matter."""
    NEVER: tl.constexpr = 2147483647
    some = lo < hi
    begin = tl.min(tl.where(some, lo, NEVER))
    end = tl.max(tl.where(some, hi, 0))
    # [full_begin, full_end): whole blocks that every row sees, except dead rows
    full_begin = tl.max(tl.where(some, lo, tl.where(dead, 0, NEVER)))
    full_keys = tl.min(tl.where(some, hi, tl.where(dead, NEVER, 0)))
    full = tl.maximum(tl.minimum(full_keys, end) - full_begin, 0) // BN
    # The pipelined loop compares `begin + BN` with the end even if it never runs, and NEVER + BN would overflow.
    full_begin = tl.where(full > 0, full_begin, 0)
    full_end = full_begin + full * BN
    for n in range(full_begin, full_end, BN):
        m, total, acc_a, acc_b = _step(
            qa,
            qb,
            k,
            v,
            n,
            full_end,
            lo,
            hi,
            m,
            total,
            acc_a,
            acc_b,
            k_row,
            v_row,
            inner,
            factor,
            D,
            DA,
            DB,
            BN,
            False,
            SOFTCAP,
        )
    n = tl.where((full > 0) & (begin == full_begin), full_end, begin)
    n = tl.min(tl.where(some & (hi > n), tl.maximum(lo, n), NEVER))
    while n < end:
        stop = tl.where((full > 0) & (n < full_begin), full_begin, end)
        m, total, acc_a, acc_b = _step(
            qa,
            qb,
            k,
            v,
            n,
            stop,
            lo,
            hi,
            m,
            total,
            acc_a,
            acc_b,
            k_row,
            v_row,
            inner,
            factor,
            D,
            DA,
            DB,
            BN,
            True,
            SOFTCAP,
        )
        n = tl.minimum(n + BN, stop)
        n = tl.where((full > 0) & (n == full_begin), full_end, n)
        n = tl.min(tl.where(some & (hi > n), tl.maximum(lo, n), NEVER))  # the next key that a row sees
    return m, total, acc_a, acc_b


# Not specialised on numbers of rows and addresses of intervals, which differ from call to call.
@triton.jit(do_not_specialize=["T", "S"], do_not_specialize_on_alignment=["LO", "HI", "PLO", "PHI", "LSE"])
def kernel(
    Q,
    K,
    V,
    LO,
    HI,
    PLO,
    PHI,
    OUT,
    LSE,
    T,
    S,
    H,
    inner,
    factor,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    out_row,
    out_head,
    G: tl.constexpr,
    D: tl.constexpr,
    DA: tl.constexpr,
    DB: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PREFIX: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WITH_LSE: tl.constexpr,
):
    """A tile of rows of one of H query heads, from the last tile on; G query heads share a key head of S keys."""
    head = tl.program_id(0) % H
    rows = (tl.num_programs(0) // H - 1 - tl.program_id(0) // H) * BM + tl.arange(0, BM)
    valid = rows < T
    q = Q + head.to(tl.int64) * q_head
    k = K + (head // G).to(tl.int64) * k_head
    v = V + (head // G).to(tl.int64) * v_head
    qa = _rows(q, rows, valid, q_row, 0, D, DA, True)
    qb = qa
    if DB > 0:
        qb = _rows(q, rows, valid, q_row, DA, D, DB, True)
    # Intervals are clamped here: checking them before the launch would wait for the device.
    lo = tl.maximum(tl.load(LO + rows, mask=valid, other=0), 0)
    hi = tl.minimum(tl.load(HI + rows, mask=valid, other=0), S)
    dead = lo >= hi
    m = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc_a = tl.zeros((BM, DA), tl.float32)
    acc_b = tl.zeros((BM, DB if DB > 0 else 16), tl.float32)
    if PREFIX:
        plo = tl.maximum(tl.load(PLO + rows, mask=valid, other=0), 0)
        phi = tl.minimum(tl.load(PHI + rows, mask=valid, other=0), S)
        dead = dead & (plo >= phi)
        m, total, acc_a, acc_b = _span(
            qa, qb, k, v, plo, phi, dead, m, total, acc_a, acc_b, k_row, v_row, inner, factor, D, DA, DB, BN, SOFTCAP
        )
    m, total, acc_a, acc_b = _span(
        qa, qb, k, v, lo, hi, dead, m, total, acc_a, acc_b, k_row, v_row, inner, factor, D, DA, DB, BN, SOFTCAP
    )

    total = tl.where(dead, 1.0, total)
    out = OUT + head.to(tl.int64) * out_head + rows.to(tl.int64)[:, None] * out_row
    columns = tl.arange(0, DA)[None, :]
    result = tl.where(dead[:, None], 0.0, acc_a / total[:, None])
    tl.store(out + columns, result.to(OUT.dtype.element_ty), mask=valid[:, None] & (columns < D))
    if DB > 0:
        columns_b = DA + tl.arange(0, DB)[None, :]
        result_b = tl.where(dead[:, None], 0.0, acc_b / total[:, None])
        tl.store(out + columns_b, result_b.to(OUT.dtype.element_ty), mask=valid[:, None] & (columns_b < D))
    if WITH_LSE:
        lse = tl.where(dead, float("-inf"), (m + tl.log2(total)) * 0.6931471805599453)
        tl.store(LSE + rows.to(tl.int64) * H + head, lse, mask=valid)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lo: torch.Tensor,
    hi: torch.Tensor,
    plo: torch.Tensor | None,
    phi: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    scale: float,
    softcap: float,
    chosen: Tile | None = None,
) -> None:
    """Launch the kernel on arguments that `fastrerank.ops.attention` has checked; fills `out` and `lse`.

    `chosen` replaces the table's tile.
    """
    rows, heads, head_dim = q.shape
    arch = capability(q.device.index) if q.is_cuda else 0
    if chosen is None:
        chosen = tile(head_dim, q.dtype, arch, prefixed=plo is not None)
    log2e = 1.4426950408889634
    inner, factor = (scale / softcap, softcap * log2e) if softcap else (1.0, scale * log2e)
    # one dimension, which takes 2^31 programs: a second one takes only 65,535, too few tiles
    kernel[(heads * triton.cdiv(rows, chosen.rows),)](
        q,
        k,
        v,
        lo,
        hi,
        lo if plo is None else plo,
        hi if phi is None else phi,
        out,
        out if lse is None else lse,
        rows,
        k.shape[0],
        heads,
        inner,
        factor,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        out.stride(0),
        out.stride(1),
        G=heads // k.shape[1],
        BM=chosen.rows,
        BN=chosen.keys,
        PREFIX=plo is not None,
        SOFTCAP=softcap > 0,
        WITH_LSE=lse is not None,
        num_warps=chosen.warps,
        num_stages=chosen.stages,
        **constants(head_dim, q.dtype, arch),
    )


_capabilities: dict[int, int] = {}


def capability(device: int) -> int:
    """Return a CUDA device's compute capability as one number (90 for 9.0), asked once per device."""
    found = _capabilities.get(device)
    if found is None:
        major, minor = torch.cuda.get_device_capability(device)
        found = _capabilities[device] = 10 * major + minor
    return found
