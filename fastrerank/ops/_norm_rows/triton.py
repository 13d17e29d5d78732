"""Norms of rows in Triton: registers hold a whole row, so it is read once and written once."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

__all__ = ["Tile", "kernel", "norm_rows", "tile"]


class Tile(NamedTuple):
    """Rows and columns of a program, and warps."""

    rows: int
    columns: int
    warps: int


def tile(width: int) -> Tile:
    """Return the tile for rows of `width`: 32 values a thread. Not yet chosen by measured time.

    A row of up to 1024 columns lies in one warp, whose sums need neither shared memory nor a barrier.
    """
    columns = int(triton.next_power_of_2(width))
    return Tile(max(1, 1024 // columns), columns, max(1, columns // 1024))


@triton.jit(do_not_specialize=["T"])
def kernel(
    X,
    RESIDUAL,
    GAMMA,
    BETA,
    OUT,
    T,
    inner,
    outer_row,
    inner_row,
    residual_outer,
    residual_inner,
    eps,
    W: tl.constexpr,
    LAYER: tl.constexpr,
    WITH_RESIDUAL: tl.constexpr,
    WITH_BETA: tl.constexpr,
    BM: tl.constexpr,
    BW: tl.constexpr,
):
    """Rows [BM * program, ...) of T; row r lies at r // inner * outer_row + r % inner * inner_row."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    columns = tl.arange(0, BW)
    inside = columns < W
    kept = (rows < T)[:, None] & inside[None, :]
    at = rows // inner * outer_row + rows % inner * inner_row
    x = tl.load(X + at[:, None] + columns[None, :], mask=kept, other=0.0).to(tl.float32)
    if WITH_RESIDUAL:
        at = rows // inner * residual_outer + rows % inner * residual_inner
        x += tl.load(RESIDUAL + at[:, None] + columns[None, :], mask=kept, other=0.0).to(tl.float32)
    if LAYER:
        x = tl.where(kept, x - (tl.sum(x, 1) / W)[:, None], 0.0)
    spread = tl.sum(x * x, 1) / W + eps
    root = tl.rsqrt(spread)
    # one step of Newton's method where the approximation is a number: the hardware's root has an error of 2 last bits
    closer = root * (1.5 - 0.5 * spread * root * root)
    root = tl.where(closer == closer, closer, root)
    y = x * root[:, None] * tl.load(GAMMA + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    if WITH_BETA:
        y += tl.load(BETA + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(OUT + rows[:, None] * W + columns[None, :], y, mask=kept)


def norm_rows(
    x: torch.Tensor,
    layer: bool,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Launch the kernel on arguments that `fastrerank.ops.norm_rows` describes; x and residual are (A, B, width)."""
    outer, inner, width = x.shape
    rows, columns, warps = tile(width)
    added = x if residual is None else residual
    kernel[(-(-outer * inner // rows),)](
        x,
        added,
        weight,
        weight if bias is None else bias,
        out,
        outer * inner,
        inner,
        x.stride(0),
        x.stride(1),
        added.stride(0),
        added.stride(1),
        eps,
        W=width,
        LAYER=layer,
        WITH_RESIDUAL=residual is not None,
        WITH_BETA=bias is not None,
        BM=rows,
        BW=columns,
        num_warps=warps,
    )
