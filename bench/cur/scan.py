"""Scans of packed items against numpy, torch and FAISS: exact top-k by inner product, in one run on this machine."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from bench.harness import results
from bench.harness.host import cpu_name, versions
from bench.harness.timing import SETTLE
from fastrerank import ops

Answer = Callable[[NDArray[np.float32]], NDArray[np.int64]]  # queries (B, K) -> ids (B, k)


@dataclass(frozen=True)
class Options:
    """What is measured."""

    items: int = 1_000_000
    width: int = 256
    k: int = 100
    queries: tuple[int, ...] = (1, 32)
    rounds: int = 5
    threads: int = 2
    against: tuple[str, ...] = ("numpy", "torch", "faiss")
    command: str = ""


@dataclass
class Findings:
    """Times in milliseconds by engine and number of queries, and each engine's recall against float32."""

    options: Options
    host: dict[str, Any] = field(default_factory=dict)
    read: dict[str, list[float]] = field(default_factory=dict)
    times: dict[str, dict[int, list[float]]] = field(default_factory=dict)
    recall: dict[str, float] = field(default_factory=dict)

    @property
    def sound(self) -> bool:
        """Whether ours found what it says: the exact answer wherever float32 vectors decide."""
        return all(self.recall[name] == 1.0 for name in self.recall if name in EXACT)


REPEATS = 3  # timed calls of an engine in each round
EXACT = ("fastrerank float32", "fastrerank int8, rescored")


def run(options: Options, log: Console) -> Findings:
    """Equals the findings: every engine on the same vectors and queries, rounds interleaved over the engines."""
    random = np.random.default_rng(0)
    found = Findings(
        options,
        {
            "cpu": cpu_name(),
            "threads": options.threads,
            "level": ops.isa(),
            "versions": versions(("numpy", "torch", "faiss-cpu")),
        },
    )
    vectors = random.standard_normal((options.items, options.width), np.float32)
    queries = random.standard_normal((max(options.queries), options.width), np.float32)
    engines = _engines(vectors, options, log)
    for name in engines:
        found.times[name] = {count: [] for count in options.queries}
    log.print("warming up and checking")
    expected = engines["fastrerank float32"](queries)
    for name, answer in engines.items():
        ids = answer(queries)
        same = sum(len(np.intersect1d(a, b)) for a, b in zip(ids, expected, strict=True))
        found.recall[name] = same / expected.size
    _check(vectors, queries, expected)
    tiles, padded = -(-options.items // 16), -(-options.width // 4) * 4
    reader = _reader(tiles * 16 * (padded + 4), options)  # values and norms
    found.read = {"int8": []}
    for _ in range(options.rounds):
        found.read["int8"] += _timed(reader)
        for count in options.queries:
            for name, answer in engines.items():
                found.times[name][count] += _timed(lambda answer=answer, count=count: answer(queries[:count]))
    return found


def _engines(vectors: NDArray[np.float32], options: Options, log: Console) -> dict[str, Answer]:
    columns = np.ascontiguousarray(vectors.T)
    stored = {}
    for storage in ("float32", "bfloat16", "int8"):
        log.print(f"packing {storage}")
        stored[storage] = ops.cur_pack(columns, storage)
    del columns
    k, threads = options.k, options.threads

    def ours(storage: str, rescore: str | None = None) -> Answer:
        second = None if rescore is None else stored[rescore]
        return lambda q: ops.cur_topk(q, stored[storage], k, threads=threads, rescore=second)[0]

    engines: dict[str, Answer] = {
        "fastrerank float32": ours("float32"),
        "fastrerank bfloat16": ours("bfloat16"),
        "fastrerank int8": ours("int8"),
        "fastrerank int8, rescored": ours("int8", "float32"),
    }
    if "numpy" in options.against:

        def numpy_float32(q: NDArray[np.float32]) -> NDArray[np.int64]:
            scores = q @ vectors.T
            best = np.argpartition(scores, -k, axis=1)[:, -k:]
            order = np.argsort(-np.take_along_axis(scores, best, 1), axis=1)
            return np.take_along_axis(best, order, 1)

        engines["numpy float32"] = numpy_float32
    if "torch" in options.against:
        import torch

        torch.set_num_threads(threads)
        wide = torch.from_numpy(vectors)
        half = wide.bfloat16()

        def torch_float32(q: NDArray[np.float32]) -> NDArray[np.int64]:
            with torch.inference_mode():
                return (torch.from_numpy(q) @ wide.T).topk(k).indices.numpy()

        def torch_bfloat16(q: NDArray[np.float32]) -> NDArray[np.int64]:
            with torch.inference_mode():
                return (torch.from_numpy(q).bfloat16() @ half.T).topk(k).indices.numpy()

        engines["torch float32"], engines["torch bfloat16"] = torch_float32, torch_bfloat16
    if "faiss" in options.against:
        import faiss

        faiss.omp_set_num_threads(threads)
        for name, factory in (("flat", "Flat"), ("SQ8", "SQ8"), ("bf16", "SQbf16")):
            log.print(f"FAISS {name}")
            index = faiss.index_factory(options.width, factory, faiss.METRIC_INNER_PRODUCT)
            index.train(vectors[:100_000])
            index.add(vectors)
            engines[f"FAISS {name}"] = lambda q, index=index: index.search(q, k)[1]
    return engines


def _check(vectors: NDArray[np.float32], queries: NDArray[np.float32], ids: NDArray[np.int64]) -> None:
    """The answer that recalls are measured against, against float64 products for one query."""
    scores = vectors @ queries[0]  # candidates by float32, whose error is far below the margin that is taken
    near = np.argpartition(scores, -2 * ids.shape[1])[-2 * ids.shape[1] :]
    exact = (vectors[near].astype(np.float64) @ queries[0].astype(np.float64)).astype(np.float32)
    order = near[np.lexsort((near, -exact))][: ids.shape[1]]
    if not np.array_equal(order, ids[0]):
        raise ValueError("fastrerank's float32 answer differs from float64 products")


def _reader(size: int, options: Options) -> Callable[[], object]:
    """Sums as many bytes as an int8 scan reads, as 64-bit integers in torch with the same threads."""
    import torch

    torch.set_num_threads(options.threads)
    words = torch.ones(size // 8, dtype=torch.int64)
    return words.sum


def _timed(call: Callable[[], object]) -> list[float]:
    """Milliseconds of REPEATS calls after an untimed one: what the engine before left in a large last-level cache, and
    its workers that still spin, would favour some engines over others.
    """
    time.sleep(SETTLE)
    call()
    spent = []
    gc.disable()
    for _ in range(REPEATS):
        begin = time.perf_counter()
        call()
        spent.append((time.perf_counter() - begin) * 1e3)
    gc.enable()
    return spent


def median(times: list[float]) -> float:
    """Equals the middle time, the lower one of two."""
    return sorted(times)[(len(times) - 1) // 2]


def show(found: Findings, console: Console) -> None:
    """Print the table."""
    options = found.options
    table = Table(
        title=f"top {options.k} of {options.items:,} x {options.width}, {options.threads} threads, ms (median)"
    )
    table.add_column("engine")
    for count in options.queries:
        table.add_column(f"{count} quer{'y' if count == 1 else 'ies'}", justify="right")
    table.add_column("recall", justify="right")
    table.add_row("read the int8 bytes", f"{median(found.read['int8']):.1f}", *[""] * len(options.queries))
    for name, times in found.times.items():
        table.add_row(name, *(f"{median(times[n]):.1f}" for n in options.queries), f"{found.recall[name]:.4f}")
    console.print(table)
    for line in claims(found):
        console.print(line)


def claims(found: Findings) -> list[str]:
    """Equals the ratios that the table is read for."""
    lines = []
    ours = found.times["fastrerank int8"]
    if 1 in ours:
        one = median(ours[1])
        lines.append(f"one query, int8: {one / median(found.read['int8']):.2f} of the time to read the bytes")
        if "FAISS SQ8" in found.times:
            lines.append(f"one query, int8: {one / median(found.times['FAISS SQ8'][1]):.2f} of FAISS SQ8's time")
    rivals = {name: times for name, times in found.times.items() if not name.startswith("fastrerank")}
    for count in found.options.queries:
        if count > 1 and rivals:
            name = min(rivals, key=lambda rival: median(rivals[rival][count]))
            for mode in ("fastrerank int8", "fastrerank int8, rescored"):
                factor = median(rivals[name][count]) / median(found.times[mode][count])
                lines.append(f"{count} queries, {mode[11:]}: {factor:.1f} times as fast as {name}, the fastest rival")
    return lines


def write_json(found: Findings, path: Path) -> None:
    """Write everything, raw times included."""
    results.write_json(found, path, {"claims": claims(found)})
