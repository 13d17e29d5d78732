"""The CUDA scan of packed items on a CPU: csrc/cuda/cur_scan.cu, compiled by g++ with tests/cuda_emulation.

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
SOURCE = (ROOT / "csrc" / "cuda" / "cur_scan.cu").read_text()
SHIM = ROOT / "tests" / "cuda_emulation"
COMPILER = shutil.which("g++")
SANITIZERS = {"none": "", "address": "address,undefined", "thread": "thread"}
# Which barrier is left out, by what follows it: two accesses are then not ordered any more.
BARRIERS = {
    "behind a batch": "\n        const int filled = count;",
    "before the next batch": "\n        if (filled + kBatch",
    "of the merge": "\n    merge_lists",
}
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++")


@dataclass(frozen=True)
class Scan:
    """One call of cur_scan; `products`: what the kernel computes of the items, in their order."""

    items: ops.PackedItems
    query: npt.NDArray[np.int8] | npt.NDArray[np.float32]
    products: npt.NDArray[np.float32]
    k: int
    blocks: int
    first: int = 0

    def bytes(self, seeds: int = 1, missing: int = 0) -> bytes:
        """Equals what `run` reads, for runs with so many seeds; `missing` tiles are not there."""
        items, data = self.items, self.items.data[: len(self.items.data) - missing].tobytes()
        scale = items.scale.tobytes() if items.scale is not None and items.scales == "item" else b""
        numbers = (items.storage == "int8", len(data), items.data.shape[1], items.N, len(scale) > 0, self.first)
        return described((*numbers, len(self.query), self.k, self.blocks, seeds), data, scale, self.query.tobytes())


def described(numbers: tuple[int, ...], *memory: bytes) -> bytes:
    """Equals a scan as `run` reads it: the numbers that it names, tiles, scales and the query."""
    return np.array(numbers, np.int64).tobytes() + b"".join(memory)


def scan(storage: str, width: int, count: int, k: int, blocks: int, first: int = 0, kind: str = "normal") -> Scan:
    """Items of small integers, so that bfloat16 holds them and float32 their sums, in any order."""
    random = np.random.default_rng([width, count, k, blocks])
    values = random.integers(-9, 10, (width, count)).astype(np.float32)
    values[:, count // 2 :: 3] = values[:, :1]  # equal items, which come by id
    if kind == "ascending":
        values[:] = 0
        values[0] = np.arange(count) // 3
    if kind == "infinite":
        values[0, ::7], values[0, 1::7] = np.inf, -np.inf
    query = random.integers(-9, 10, width).astype(np.float32)
    query[0] = 3
    if storage == "bfloat16":
        items = ops.cur_pack(values, storage)
        products = (query.astype(np.float64) @ items.vectors()).astype(np.float32)
        return Scan(items, _padded(query, -(-width // 16) * 16), products, k, blocks, first)
    values[:, -1] = 127  # anchors' scales: 1
    items = ops.cur_pack(values, "int8", scales=storage.split()[1])
    assert items.scale is not None
    whole = np.rint(items.vectors() / items.scale)
    sums = (query.astype(np.float64) @ whole).astype(np.float32)
    products = sums * items.scale if items.scales == "item" else sums
    return Scan(items, _padded(query.astype(np.int8), -(-width // 4) * 4), products, k, blocks, first)


def _padded(query: npt.NDArray[np.generic], width: int) -> npt.NDArray[np.generic]:
    return np.concatenate([query, np.zeros(width - len(query), query.dtype)])


SCANS = [
    *(scan(kind, 20, count, k, blocks)
      for kind in ("int8 item", "int8 anchor", "bfloat16")
      for count, k, blocks in ((1, 1, 1), (15, 4, 2), (1024, 64, 3), (3001, 7, 2), (3001, 1024, 3), (40, 50, 4))),
    scan("int8 item", 1, 5000, 300, 2, kind="ascending"),  # nearly every item passes: reservoirs run full
    scan("bfloat16", 33, 5000, 300, 2, first=(1 << 31) - 5000, kind="ascending"),
    scan("bfloat16", 17, 900, 300, 5, kind="infinite"),
    scan("int8 anchor", 7, 9000, 2112, 2),
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
        assert launches == 2
        place.with_name("cur_scan.cpp").write_text(source)
        checks = [f"-fsanitize={SANITIZERS[sanitizer]}", "-fno-sanitize-recover=all"] if sanitizer != "none" else []
        sources = [str(place.with_name("cur_scan.cpp")), str(SHIM / "run.cpp"), str(fibers(sanitizer))]
        _run([str(COMPILER), *flags, *checks, *sources, "-o", str(place)])
        return place

    return compiled


def _run(command: list[str], expected: bool = True) -> subprocess.CompletedProcess[bytes]:
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1:report_bugs=1"}
    done = subprocess.run(command, capture_output=True, env=environment, check=False, timeout=120)
    for missing in (b"cannot find -l", b"cannot find lib", b"unexpected memory mapping"):
        if missing in done.stderr:
            pytest.skip(f"no working sanitizer of g++: {done.stderr.decode()[-200:]}")
    assert (done.returncode == 0) == expected, done.stderr.decode()[-4000:]
    return done


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_scan_and_merge_give_the_reference_in_any_order_of_threads(
    program: Callable[..., Path], sanitizer: str, tmp_path: Path
) -> None:
    scans = (SCANS[14], SCANS[18]) if sanitizer == "thread" else SCANS  # the first and a full reservoir
    seeds = 3 if sanitizer == "none" else 1
    (tmp_path / "scans").write_bytes(b"".join(one.bytes(seeds) for one in scans))
    output = _run([str(program(sanitizer)), str(tmp_path / "scans")]).stdout
    begin = 0
    for one in scans:
        true_ids, true_scores = reference.cur_topk(np.ones((1, 1)), one.products[None].astype(np.float64), one.k)
        missing = one.k - len(true_ids[0])
        ids = np.concatenate([true_ids[0] + one.first, np.full(missing, -1)])
        scores = np.concatenate([true_scores[0], np.full(missing, -np.inf)])
        for _ in range(seeds):
            found = output[begin : begin + 8 * one.k]
            np.testing.assert_array_equal(np.frombuffer(found[: 4 * one.k], np.int32), ids, str(one))
            np.testing.assert_array_equal(np.frombuffer(found[4 * one.k :], np.float32), scores, str(one))
            begin += 8 * one.k
    assert begin == len(output)


def test_cur_topk_of_tensors_on_the_emulated_kernels(
    program: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From `ops.cur_topk` to the kernels and back: what a pointer means, and every number beside it."""
    torch = pytest.importorskip("torch")
    from fastrerank.ops import _cur_cuda

    run = program("none")

    def cur_scan(
        int8: bool, tiles: int, tile_bytes: int, count: int, scale: int, first: int, width: int, query: int, k: int,
        best: int, blocks: int, ids: int, scores: int, stream: int,
    ) -> None:  # fmt: skip
        """As fastrerank._cuda.cur_scan, of pointers to host memory."""
        assert best
        assert stream == 7
        data = ctypes.string_at(tiles, -(-count // 16) * tile_bytes)
        scales = ctypes.string_at(scale, 4 * count) if scale else b""
        numbers = (int8, len(data), tile_bytes, count, bool(scale), first, width, k, blocks, 1)
        (tmp_path / "scan").write_bytes(
            described(numbers, data, scales, ctypes.string_at(query, width * (4 - 3 * int8)))
        )
        output = _run([str(run), str(tmp_path / "scan")]).stdout
        assert len(output) == 8 * k
        ctypes.memmove(ids, output, 4 * k)
        ctypes.memmove(scores, output[4 * k :], 4 * k)

    monkeypatch.setitem(sys.modules, "fastrerank._cuda", SimpleNamespace(cur_scan=cur_scan))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=1))
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=7))
    random = np.random.default_rng(5)
    queries, vectors = (random.normal(size=shape).astype(np.float32) for shape in ((2, 37), (37, 3001)))
    for storage, scales in (("bfloat16", None), ("int8", "item"), ("int8", "anchor")):
        items = ops.cur_pack(vectors, storage, scales=scales)
        there = _cur_cuda._moved(items, torch.device("cpu"))
        ids, scores = ops.cur_topk(torch.from_numpy(queries), [there, there], 20, exclude=[3000, 3001])
        true_ids, true_scores = ops.cur_topk(queries, [items, items], 20, exclude=[3000, 3001])
        np.testing.assert_array_equal(ids.numpy(), true_ids)
        np.testing.assert_allclose(scores.numpy(), true_scores, rtol=2.0**-23)


def test_a_tile_that_is_not_there_is_found(program: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "scans").write_bytes(scan("bfloat16", 20, 100, 5, 1).bytes(missing=1))
    done = _run([str(program("address")), str(tmp_path / "scans")], expected=False)
    assert b"heap-buffer-overflow" in done.stderr


def test_a_barrier_that_is_not_there_is_found(program: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "scans").write_bytes(scan("int8 item", 20, 5000, 300, 2, kind="ascending").bytes())

    program("thread")

    def findings(behind: str) -> bytes:
        assert SOURCE.count(f"__syncthreads();{behind}") == 1
        without = SOURCE.replace(f"__syncthreads();{behind}", behind)
        return _run([str(program("thread", without)), str(tmp_path / "scans")], expected=False).stderr

    with ThreadPoolExecutor(2) as pool:
        for place, found in zip(BARRIERS, pool.map(findings, BARRIERS.values()), strict=True):
            assert b"data race" in found, place
