"""The scan of packed items alone on a GPU: the best of ten million int8 items for one query and for 32, against torch.

Items are made on the device, in the layout that the kernel reads; the rivals hold the same values in bfloat16, where
they are exact. Times are those of `bench.kernels`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench.kernels import CALLS, WARM, KernelResult, captured, said, timed_call
from fastrerank import ops
from fastrerank.ops._cur_topk import cuda as _cur_cuda
from fastrerank.ops._cur_topk.items import TILE

_CHUNK = 1 << 20  # items that the way in two passes scores before it chooses


@dataclass(frozen=True)
class CurCase:
    """The k best of N int8 items of width K for each of some queries."""

    name: str
    items: int
    width: int
    k: int
    rows: int = 1

    @property
    def flop(self) -> float:
        """Equals 2 x the multiply-accumulates of all products."""
        return 2.0 * self.rows * self.items * self.width

    @property
    def bytes(self) -> float:
        """Equals the bytes of all int8 values and of their scales, read once for all queries."""
        return self.items * (self.width + 4.0)


def cases(*, tiny: bool) -> list[CurCase]:
    """Equals what is measured."""
    whole = ((10_000_000, 256, 100, 1), (1_000_000, 256, 100, 1), (10_000_000, 256, 100, 32))
    sizes = ((4_000, 32, 10, 1),) if tiny else whole
    return [
        CurCase(f"{n:,} x {width} int8, k {k}" + (f", {rows} queries" if rows > 1 else ""), n, width, k, rows)
        for n, width, k, rows in sizes
    ]


def measure(case: CurCase, device: torch.device, rounds: int) -> list[KernelResult]:
    """Equals the results of ours and of torch's on one case; ours are checked against float64 before they are timed.

    The rivals' `error` is the share of the exact best that they miss: they score in bfloat16.
    """
    generator = torch.Generator(device).manual_seed(0)
    items, half = _items(case, device, generator)
    queries = torch.randn((case.rows, case.width), device=device, generator=generator)
    best = _cur_cuda._ids_of(_cur_cuda._by_scores(queries.double(), items, 0, case.k, 0))
    vectors = queries.to(torch.bfloat16)
    ways: dict[str, tuple[Callable[[], Any], bool]] = {  # a call that gives ids, and whether a graph can hold it
        "ops.cur_topk": (lambda: ops.cur_topk(queries, items, case.k)[0], False),
        "kernels alone": (lambda: _cur_cuda._launch(queries, items, case.k)[0], True),
        "torch products + topk, bfloat16": (lambda: _products(half, vectors).topk(case.k).indices, True),
        "torch in two passes, bfloat16": (lambda: _two_passes(half, vectors, case.k), True),
    }
    results, missing = [], _missing(device)
    for way, (run, capturable) in ways.items():
        result = KernelResult(case.name, way)
        results.append(result)
        if missing and not way.startswith("torch"):
            result.state, result.detail = "not here", missing
            continue
        try:
            _checked(result, run(), best, exact_wanted=not way.startswith("torch"))
            if result.state == "ok":
                _time(result, run, capturable and device.type == "cuda", device, rounds)
        except Exception as error:  # the next way may do
            result.state, result.detail = "failed", said(error)
    return results


def _checked(result: KernelResult, found: torch.Tensor, best: torch.Tensor, *, exact_wanted: bool) -> None:
    result.error = 1 - float((best[:, :, None] == found[:, None]).any(dim=2).float().mean())
    if exact_wanted and not torch.equal(found, best):
        result.state, result.detail = "WRONG", "the ids are not those of float64 products"
    elif result.error > 0.1:
        result.state, result.detail = "WRONG", f"misses {result.error:.0%} of the best"


def _missing(device: torch.device) -> str:
    """Why the kernels cannot run; empty where they can."""
    if device.type != "cuda":
        return "the kernels need a GPU"
    return str(ops.cuda_info()["problem"])


def _time(result: KernelResult, run: Callable[[], Any], capturable: bool, device: torch.device, rounds: int) -> None:
    for _ in range(WARM):
        run()
    result.call = [timed_call(run, device) for _ in range(rounds)]
    if capturable:
        replay = captured(run)
        replay()
        result.graph = [timed_call(replay, device) / CALLS for _ in range(rounds)]


def _products(items: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    return torch.mv(items, queries[0])[None] if len(queries) == 1 else torch.mm(queries, items.T)


def _two_passes(items: torch.Tensor, queries: torch.Tensor, k: int) -> torch.Tensor:
    """As FAISS's flat index on GPUs: a block's scores in memory, its best, and the best of those."""
    parts = [_products(part, queries).topk(min(k, len(part))) for part in items.split(_CHUNK)]
    places = torch.cat([part.indices + number * _CHUNK for number, part in enumerate(parts)], dim=1)
    return places.gather(1, torch.cat([part.values for part in parts], dim=1).topk(k).indices)


def _items(case: CurCase, device: torch.device, generator: torch.Generator) -> tuple[Any, torch.Tensor]:
    """Normally distributed int8 values: packed with a scale of 1/42 each, and as bfloat16 (N, K)."""
    tiles, wide = -(-case.items // TILE), case.width
    data = torch.empty((tiles, TILE * (wide + 4)), dtype=torch.uint8, device=device)
    half = torch.empty((tiles * TILE, wide), dtype=torch.bfloat16, device=device)
    reach = 0.0
    for begin in range(0, tiles, 1 << 14):
        part = data[begin : begin + (1 << 14)]
        count = len(part) * TILE
        values = (42 * torch.randn((count, wide), device=device, generator=generator)).round_().clamp_(-127, 127)
        half[begin * TILE : begin * TILE + count] = values
        norms = values.norm(dim=1) * (1 + 2.0**-20)
        reach = max(reach, float(norms.max()) / 42 * (1 + 2.0**-20))
        stored = (values + 128).to(torch.uint8).view(-1, TILE, wide // 4, 4).transpose(1, 2)
        part[:, : TILE * wide] = stored.reshape(len(part), -1)
        part[:, TILE * wide :] = norms.view(-1, TILE).contiguous().view(torch.uint8)
    scale = torch.full((case.items,), 1 / 42, device=device)
    return _cur_cuda.CudaItems(data, scale, "int8", "item", wide, case.items, reach), half[: case.items]
