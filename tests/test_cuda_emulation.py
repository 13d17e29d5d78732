"""The CUDA top-k of packed items on a CPU: csrc/cuda/cur_topk.cu, compiled by g++ with tests/cuda_emulation.

Blocks and barriers are real, threads run in an order that a seed draws. What compute-sanitizer would say on a device
(memcheck, racecheck), g++'s sanitizers say here: of memory between threads too, because each is a fiber to them.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import pytest

from fastrerank import ops
from fastrerank.ops import reference

ROOT = Path(__file__).resolve().parents[1]
SOURCE = (ROOT / "csrc" / "cuda" / "cur_topk.cu").read_text()
SHIM = ROOT / "tests" / "cuda_emulation"
COMPILER = shutil.which("g++")
SANITIZERS = {"none": "", "address": "address,undefined", "thread": "thread"}
# Which barrier is left out, by what follows it: two accesses are then not ordered any more.
BARRIERS = {
    "behind a batch": "\n        const int filled = count;",
    "before the next batch": "\n        if (filled + kBatch <= size) return;",
    "of the merge": "\n    merge_lists",
    "before the scores": "\n    for (int i = lane; i < g.wanted; i += kFinishThreads) {",
    "before places that were read": "  // entries go to places that have been read",
    "of what groups say": "\n                if (lane % part < step",
}
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++")


@dataclass(frozen=True)
class Scan:
    """One call of cur_topk. Its queries are rounded without loss, so that the best products are the best scores."""

    items: ops.PackedItems
    queries: npt.NDArray[np.float32]
    k: int
    wanted: int
    blocks: int
    first: int = 0

    @property
    def scores(self) -> npt.NDArray[np.float32]:
        """Equals all scores, (B, N), summed as the kernel does."""
        vectors, queries = self.items.vectors().astype(np.float64), self.queries.astype(np.float64)
        scale = np.ones((1, 1)) if self.items.scale is None else self.items.scale.astype(np.float64)
        if self.items.scale is not None:
            vectors = np.rint(vectors / np.where(scale > 0, scale, 1))
        if self.items.scales == "anchor":
            queries *= scale[:, 0]
        total = np.zeros((len(queries), self.items.N))
        for query, row in zip(queries.T, vectors, strict=True):
            total += query[:, None] * row
        return (total * scale if self.items.scales == "item" else total).astype(np.float32)

    def bytes(self, seeds: int = 1, missing: int = 0) -> bytes:
        """Equals what `run` reads, for runs with so many seeds; `missing` tiles are not there."""
        items, data = self.items, self.items.data[: len(self.items.data) - missing].tobytes()
        scale = b"" if items.scale is None else items.scale.tobytes()
        kinds = (items.scales == "item" and len(scale) > 0, items.scales == "anchor" and len(scale) > 0)
        numbers = (items.storage == "int8", len(data), items.data.shape[1], items.N, *kinds, self.first, items.K,
                   stored_width(items), len(self.queries), self.k, self.wanted, self.blocks, seeds)  # fmt: skip
        return described(numbers, reach(items), data, scale, self.queries.tobytes())


def stored_width(items: ops.PackedItems) -> int:
    return (items.data.shape[1] - 64) // 16 // (1 if items.storage == "int8" else 2)


def reach(items: ops.PackedItems) -> float:
    vectors = items.vectors()
    if items.scales == "anchor":
        vectors = vectors / np.where(items.scale > 0, items.scale, 1)
    finite = np.where(np.isfinite(vectors), vectors, 0)
    return float(np.linalg.norm(finite, axis=0).max(initial=0)) * 1.001


def described(numbers: tuple[int, ...], reach: float, *memory: bytes) -> bytes:
    """Equals a call as `run` reads it: the numbers that it names, tiles, scales and queries."""
    return np.array(numbers, np.int64).tobytes() + np.float64(reach).tobytes() + b"".join(memory)


def scan(
    storage: str, width: int, count: int, k: int, blocks: int, first: int = 0, kind: str = "normal",
    wanted: int | None = None,
) -> Scan:  # fmt: skip
    """Items of small integers and queries with a largest value of 127: rounding a query loses nothing."""
    random = np.random.default_rng([width, count, k, blocks])
    values = random.integers(-9, 10, (width, count)).astype(np.float32)
    values[:, count // 2 :: 3] = values[:, :1]  # equal items, which come by id
    if kind == "ascending":
        values[:] = 0
        values[0] = np.arange(count) // 3
    if kind == "infinite":
        values[0, ::7], values[0, 1::7] = np.inf, -np.inf
    queries = random.integers(-127, 128, (2, width)).astype(np.float32)
    queries[:, 0] = 127
    wanted = k if wanted is None else wanted
    if storage == "bfloat16":
        return Scan(ops.cur_pack(values, storage), queries, k, wanted, blocks, first)
    values[:, -1] = 127  # anchors' scales: 1
    items = ops.cur_pack(values, "int8", scales=storage.split()[1])
    return Scan(items, queries, k, wanted, blocks, first)


SCANS = [
    *(scan(kind, 20, count, k, blocks, wanted=2 * k)
      for kind in ("int8 item", "int8 anchor", "bfloat16")
      for count, k, blocks in ((1, 1, 1), (15, 4, 2), (1024, 64, 3), (3001, 7, 2), (3001, 1024, 3), (40, 50, 4))),
    scan("int8 item", 1, 5000, 300, 2, kind="ascending"),  # nearly every item passes: reservoirs run full
    scan("bfloat16", 33, 5000, 300, 2, first=(1 << 31) - 5000, kind="ascending"),
    scan("bfloat16", 17, 900, 300, 5, kind="infinite"),
    scan("int8 anchor", 7, 9000, 2112, 2),
    scan("int8 item", 10, 9000, 3, 2),  # a threshold from what the groups of two blocks say
    scan("bfloat16", 10, 3000, 5, 2, wanted=14),
]  # fmt: skip


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`program(sanitizer, source)` -> the emulation of a source with a sanitizer, compiled."""

    made: dict[tuple[str, str], Path] = {}
    flags = ["-std=c++17", "-g", "-O1", "-Wall", "-Wextra", "-Wno-unknown-pragmas", f"-I{SHIM}", f"-I{ROOT / 'csrc'}"]
    flags.append(f"-I{ROOT / 'csrc' / 'cuda'}")

    def fibers(sanitizer: str) -> Path:
        if (sanitizer, "") not in made:
            made[sanitizer, ""] = tmp_path_factory.mktemp("fibers") / "fibers.o"
            place = ["-c", str(SHIM / "fibers.cpp"), "-o", str(made[sanitizer, ""])]
            _run([str(COMPILER), *flags, f"-DFOR_{sanitizer.upper()}=1", *place])
        return made[sanitizer, ""]

    def compiled(sanitizer: str, source: str = SOURCE) -> Path:
        if (sanitizer, source) in made:
            return made[sanitizer, source]
        made[sanitizer, source] = tmp_path_factory.mktemp("emulated") / "run"
        place = made[sanitizer, source]
        source = re.sub(
            r"extern __shared__ (\w+) (\w+)\[\];", r"\1* \2 = reinterpret_cast<\1*>(emulated::shared);", source
        )
        source, launches = re.subn(r"(\w+)<<<(.*?)>>>\(", r"emulated::launch(\1, \2)(", source, flags=re.DOTALL)
        assert launches == 3
        place.with_name("cur_topk.cpp").write_text(source)
        checks = [f"-fsanitize={SANITIZERS[sanitizer]}", "-fno-sanitize-recover=all"] if sanitizer != "none" else []
        sources = [str(place.with_name("cur_topk.cpp")), str(SHIM / "run.cpp"), str(fibers(sanitizer))]
        _run([str(COMPILER), *flags, *checks, *sources, "-o", str(place)])
        return place

    return compiled


def _run(command: list[str], expected: bool | None = True) -> subprocess.CompletedProcess[bytes]:
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1:report_bugs=1"}
    done = subprocess.run(command, capture_output=True, env=environment, check=False, timeout=120)
    for missing in (b"cannot find -l", b"cannot find lib", b"unexpected memory mapping"):
        if missing in done.stderr:
            pytest.skip(f"no working sanitizer of g++: {done.stderr.decode()[-200:]}")
    assert expected is None or (done.returncode == 0) == expected, done.stderr.decode()[-4000:]
    return done


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_the_kernels_give_the_reference_in_any_order_of_threads(
    program: Callable[..., Path], sanitizer: str, tmp_path: Path
) -> None:
    scans = (SCANS[14], SCANS[18], SCANS[22]) if sanitizer == "thread" else SCANS
    seeds = 3 if sanitizer == "none" else 1
    (tmp_path / "scans").write_bytes(b"".join(one.bytes(seeds) for one in scans))
    output = _run([str(program(sanitizer)), str(tmp_path / "scans")]).stdout
    begin = 0
    for one in scans:
        rows, missing = len(one.queries), max(0, one.k - one.items.N)
        best = [reference.cur_topk(np.ones((1, 1)), row[None].astype(np.float64), one.k) for row in one.scores]
        true_ids, true_scores = (np.concatenate(part) for part in zip(*best, strict=True))
        ids = np.pad(true_ids + one.first, ((0, 0), (0, missing)), constant_values=-1)
        scores = np.pad(true_scores, ((0, 0), (0, missing)), constant_values=-np.inf)
        for _ in range(seeds):
            parts = []
            for kind, size in ((np.int64, rows * one.k), (np.float32, rows * one.k), (np.int32, rows)):
                end = begin + np.dtype(kind).itemsize * size
                parts.append(np.frombuffer(output[begin:end], kind).reshape(rows, -1))
                begin = end
            np.testing.assert_array_equal(parts[0], ids, str(one))
            np.testing.assert_array_equal(parts[1], scores, str(one))
            # Sure where all items are looked at; unsure where the last that is looked at is among the best itself.
            expected = 0 if one.wanted >= one.items.N else 1 if one.wanted == one.k else None
            assert expected is None or (parts[2] == expected).all(), str(one)
    assert begin == len(output)


def test_queries_that_are_not_finite_are_said(program: Callable[..., Path], tmp_path: Path) -> None:
    one = scan("int8 item", 20, 3001, 7, 2)
    one.queries[1, 13] = np.inf
    (tmp_path / "scans").write_bytes(one.bytes())
    output = _run([str(program("none")), str(tmp_path / "scans")]).stdout
    assert np.frombuffer(output[-8:], np.int32).tolist() == [1, 3]


def test_cur_topk_of_tensors_on_the_emulated_kernels(
    program: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From `ops.cur_topk` to the kernels and back: what a pointer means, and every number beside it."""
    torch = pytest.importorskip("torch")
    from fastrerank.ops import _cur_cuda

    run = program("none")
    found: list[int] = []

    def cur_topk(
        int8: bool, tiles: int, tile_bytes: int, count: int, scale: int, anchors: int, first: int, width: int,
        stored: int, reach: float, queries: int, rows: int, k: int, wanted: int, blocks: int, scratch: int, ids: int,
        scores: int, status: int, stream: int,
    ) -> None:  # fmt: skip
        """As fastrerank._cuda.cur_topk, of pointers to host memory."""
        assert scratch
        assert stream == 7
        data = ctypes.string_at(tiles, -(-count // 16) * tile_bytes)
        scales = ctypes.string_at(scale, 4 * count) if scale else b""
        scales += ctypes.string_at(anchors, 4 * width) if anchors else b""
        numbers = (int8, len(data), tile_bytes, count, bool(scale), bool(anchors), first, width, stored, rows, k,
                   wanted, blocks, 1)  # fmt: skip
        given = ctypes.string_at(queries, rows * width * 4)
        (tmp_path / "scan").write_bytes(described(numbers, reach, data, scales, given))
        output = _run([str(run), str(tmp_path / "scan")]).stdout
        assert len(output) == 12 * rows * k + 4 * rows
        ctypes.memmove(ids, output, 8 * rows * k)
        ctypes.memmove(scores, output[8 * rows * k :], 4 * rows * k)
        ctypes.memmove(status, output[12 * rows * k :], 4 * rows)
        found.extend(np.frombuffer(output[12 * rows * k :], np.int32).tolist())

    fake = SimpleNamespace(cur_topk=cur_topk, cur_topk_scratch=lambda *_: 16)
    monkeypatch.setitem(sys.modules, "fastrerank._cuda", fake)
    monkeypatch.setattr(_cur_cuda, "_multiprocessors", lambda _: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=7))
    random = np.random.default_rng(5)
    queries, vectors = (random.normal(size=shape).astype(np.float32) for shape in ((2, 37), (37, 3001)))
    for storage, scales in (("bfloat16", None), ("int8", "item"), ("int8", "anchor")):
        items = ops.cur_pack(vectors, storage, scales=scales)
        there = _cur_cuda._moved(items, torch.device("cpu"))
        for shards, exclude in (([there, there], [3000, 3001]), ([there], None)):
            ids, scores = ops.cur_topk(torch.from_numpy(queries), shards, 20, exclude=exclude)
            true_ids, true_scores = ops.cur_topk(queries, [items] * len(shards), 20, exclude=exclude)
            np.testing.assert_array_equal(ids.numpy(), true_ids)
            np.testing.assert_allclose(scores.numpy(), true_scores, rtol=2.0**-23)
    assert found == [0] * len(found)  # what rounding hides was among the items that were looked at


def test_a_tile_that_is_not_there_is_found(program: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "scans").write_bytes(scan("bfloat16", 20, 100, 5, 1).bytes(missing=1))
    done = _run([str(program("address")), str(tmp_path / "scans")], expected=False)
    assert b"heap-buffer-overflow" in done.stderr


def test_a_barrier_that_is_not_there_is_found(program: Callable[..., Path], tmp_path: Path) -> None:
    full = scan("int8 item", 20, 5000, 300, 2, kind="ascending")
    (tmp_path / "scans").write_bytes(full.bytes() + SCANS[22].bytes())

    program("thread")

    def findings(behind: str) -> bytes:
        assert SOURCE.count(f"__syncthreads();{behind}") == 1, behind
        without = SOURCE.replace(f"__syncthreads();{behind}", behind)
        done = _run([str(program("thread", without)), str(tmp_path / "scans")], expected=None)
        return done.stderr

    with ThreadPoolExecutor(2) as pool:
        for place, found in zip(BARRIERS, pool.map(findings, BARRIERS.values()), strict=True):
            assert b"data race" in found, place
