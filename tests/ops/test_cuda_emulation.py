"""The CUDA scan of packed items on a CPU: csrc/cur_topk/cur_topk.cu, compiled by g++ with tests/cuda_emulation.

Blocks and barriers are real, threads run in an order that a seed draws. What compute-sanitizer would say on a device
(memcheck, racecheck), g++'s sanitizers say here: of memory between threads too, because each is a fiber to them.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cur_rounding import rounded

from fastrerank import ops
from fastrerank.ops import reference

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "csrc" / "cur_topk"
MANY = '#include "cur_topk/cuda_many.h"\n'
SOURCE = (FOLDER / "cur_topk.cu").read_text().replace(MANY, (FOLDER / "cuda_many.h").read_text())
SHIM = ROOT / "tests" / "cuda_emulation"
COMPILER = shutil.which("g++")
SANITIZERS = {"none": "", "address": "address,undefined", "thread": "thread"}
# Which barrier is left out, by what follows it: two accesses are then not ordered any more.
BARRIERS = {
    "behind what a block begins with": "\n\n    constexpr int kApart",
    "before its first bests are looked at": "\n            if (thread < groups * live)",
    "before the bound is read": "\n#pragma unroll\n    for (int q = 0; q < Q; ++q) {\n        bar[q]",
    "behind a reservoir that is cut back": "\n        }\n#pragma unroll\n        for (int q = 0; q < Q; ++q) bar[q]",
    "before what is left is sorted": "\n    for (int q = 0; q < live; ++q) {\n        Entry* reservoir",
    "of many queries, before the sample's best are looked at": "\n    if (thread >= live) return;",
    "of many queries, behind reservoirs that are cut back": "\n    }\n    cut(g.wanted);",
    "of many queries, before lists are written": "\n    for (int q = warp;",
}
STATE = np.dtype([("floor", "u8"), ("published", "u4"), ("shift", "i4"), ("unit", "f8"), ("error", "f8")])
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++")


@dataclass(frozen=True)
class Search:
    """One call of cur_topk, and the float64 scores of its items."""

    items: ops.PackedItems
    queries: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float64]
    k: int
    wanted: int
    processors: int

    @property
    def reach(self) -> float:
        """Equals the largest norm of an item."""
        vectors = self.items.vectors().astype(np.float64)
        if self.items.scales == "anchor":
            vectors /= self.items.scale
        return float(np.linalg.norm(vectors, axis=0).max(initial=0.0)) * (1 + 2.0**-20)

    @property
    def exact(self) -> npt.NDArray[np.float64]:
        """Equals the queries that are rounded: float64, scales of anchors multiplied in."""
        queries = self.queries.astype(np.float64)
        return queries * self.items.scale.reshape(1, -1) if self.items.scales == "anchor" else queries

    @property
    def padded(self) -> int:
        """Equals the values of a rounded query, padding included."""
        least = 256 if self.items.storage == "int8" else 64
        return -(-self.items.K // least) * least

    def bytes(self, seeds: int = 1, missing: int = 0) -> bytes:
        """Equals what `run` reads, for runs with so many seeds; `missing` tiles are not there."""
        items, data = self.items, self.items.data[: len(self.items.data) - missing].tobytes()
        scale = items.scale.tobytes() if items.scale is not None else b""
        each, size = items.scales == "item", {"int8": 1, "bfloat16": 2}[items.storage]
        numbers = (
            items.storage == "int8",
            len(data),
            items.data.shape[1],
            items.N,
            each,
            not each and len(scale) > 0,
            items.K,
            (items.data.shape[1] - 64) // 16 // size,
            len(self.queries),
            self.k,
            self.wanted,
            self.processors,
            seeds,
        )
        return described(numbers, self.reach, data, scale, self.queries.tobytes())


def described(numbers: tuple[int, ...], reach: float, *memory: bytes) -> bytes:
    """Equals a search as `run` reads it: the numbers that it names, tiles, scales and queries."""
    return np.array(numbers, np.int64).tobytes() + np.float64(reach).tobytes() + b"".join(memory)


@dataclass(frozen=True)
class Found:
    """What `run` shows of a search with one seed."""

    status: npt.NDArray[np.int32]
    ids: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    states: npt.NDArray[Any]
    rounded: npt.NDArray[Any]
    entries: npt.NDArray[np.uint64]
    parts: npt.NDArray[np.int32]

    @classmethod
    def read(cls, output: bytes, begin: int, one: Search) -> tuple[Found, int]:
        """Equals what stands at `begin`, and where it ends."""
        rows, kind = len(one.queries), np.int8 if one.items.storage == "int8" else np.float32
        parts = []
        for dtype, columns in (
            (np.int32, 0),
            (np.int64, one.k),
            (np.float32, one.k),
            (STATE, 0),
            (kind, one.padded),
            (np.uint64, one.wanted),
            (np.int32, 0),
        ):
            count = rows * max(columns, 1)
            array = np.frombuffer(output, dtype, count, begin)
            parts.append(array.reshape(rows, columns) if columns else array)
            begin += count * array.itemsize
        return cls(*parts), begin


def search(
    storage: str, width: int, count: int, k: int, processors: int, *, kind: str = "normal", rows: int = 1, more: int = 0
) -> Search:
    """Items of small integers, so that bfloat16 holds them and float32 their sums, in any order."""
    random = np.random.default_rng([width, count, k, processors])
    values = random.integers(-9, 10, (width, count)).astype(np.float32)
    values[:, count // 2 :: 3] = values[:, :1]  # equal items, which come by id
    if kind == "ascending":
        values[:] = 0
        values[0] = np.arange(count) // 3
    if kind == "equal":
        values[:] = 1
    if kind == "sampled":  # one item of each of eight parts: no more than are wanted reach the bound that these give
        values[:] = 0
        values[0, 100 :: count // 8] = 1
    if kind == "some equal":  # to every other query
        values[:] = 0
        values[1] = np.arange(count) % 101 - 50
    if kind == "infinite":
        values[0, ::7], values[0, 1::7] = np.inf, -np.inf
    queries = random.integers(-9, 10, (rows, width)).astype(np.float32)
    if kind == "some equal":
        queries[::2] = 0
    queries[:, 0] = 127  # rounding takes nothing away
    if kind == "any":
        values, queries = (random.normal(size=x.shape).astype(np.float32) for x in (values, queries))
    if storage == "bfloat16":
        items = ops.cur_pack(values, storage)
    else:
        if kind not in ("any", "sampled"):
            values[:, -1] = 127  # anchors' scales: 1
        items = ops.cur_pack(values, "int8", scales=storage.split()[1])
    vectors = items.vectors().astype(np.float64)
    if items.scale is not None:
        vectors = np.rint(vectors / items.scale) * items.scale.astype(np.float64)
    return Search(items, queries, queries.astype(np.float64) @ vectors, k, k + more, processors)


# Of many queries: samples of four parts and more of 256 items, tiles that end early, rows that another scan is left.
MANY = [
    search("int8 item", 20, 8193, 3, 1, rows=5, kind="ascending"),
    search("int8 anchor", 300, 4097, 2, 2, rows=33),
    search("int8 item", 37, 33007, 8, 1, rows=9, kind="any", more=12),
    search("int8 anchor", 5, 66007, 8, 64, rows=5, kind="equal", more=12),  # lists that are chosen from in parts
    search("int8 item", 5, 9007, 4, 1, rows=5, kind="sampled"),
    search("int8 item", 5, 9007, 4, 1, rows=6, kind="some equal", more=1),  # of some queries reservoirs run full
]
SEARCHES = [
    *(
        search(kind, 20, count, k, processors)
        for kind in ("int8 item", "int8 anchor", "bfloat16")
        for count, k, processors in ((1, 1, 1), (15, 4, 2), (1024, 64, 3), (9001, 7, 2), (9001, 1024, 2), (40, 50, 1))
    ),
    search("int8 item", 1, 9000, 300, 1, kind="ascending"),  # nearly every item passes: reservoirs run full
    search("bfloat16", 33, 9000, 300, 1, kind="ascending"),
    search("bfloat16", 17, 900, 300, 2, kind="infinite"),
    search("int8 anchor", 7, 9000, 2112, 1),
    search("int8 item", 270, 1100, 5, 1, rows=6, kind="any", more=60),  # rows that share a scan, and two that are left
    search("int8 anchor", 37, 9001, 20, 2, rows=3, kind="any", more=84),
    search("bfloat16", 70, 5000, 9, 1, rows=2, kind="any", more=70),
    *MANY,
]
RACING = (SEARCHES[14], SEARCHES[18], SEARCHES[23], MANY[-1])  # of the first kind, a full reservoir, rows together


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`program(sanitizer, source)` -> the emulation of a source with a sanitizer, compiled."""

    made: dict[tuple[str, str], Path] = {}
    flags = ["-std=c++17", "-g", "-O1", "-Wall", "-Wextra", "-Wno-unknown-pragmas", f"-I{SHIM}", f"-I{ROOT / 'csrc'}"]

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
        assert launches == 9
        place.with_name("cur_topk.cpp").write_text(f'{source}\n#include "run.cpp"\n')
        checks = [f"-fsanitize={SANITIZERS[sanitizer]}", "-fno-sanitize-recover=all"] if sanitizer != "none" else []
        sources = [str(place.with_name("cur_topk.cpp")), str(fibers(sanitizer))]
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
def test_kernels_give_the_reference_in_any_order_of_threads(
    program: Callable[..., Path], sanitizer: str, tmp_path: Path
) -> None:
    searches = RACING if sanitizer == "thread" else SEARCHES
    seeds = 3 if sanitizer == "none" else 1
    (tmp_path / "searches").write_bytes(b"".join(one.bytes(seeds) for one in searches))
    output = _run([str(program(sanitizer)), str(tmp_path / "searches")]).stdout
    begin = 0
    for one in searches:
        for _ in range(seeds):
            found, begin = Found.read(output, begin, one)
            check(one, found)
            assert (found.parts > 0).all() == any(one is many for many in MANY)
    assert begin == len(output)


def check(one: Search, found: Found) -> None:
    """Results, the rounded queries with their bounds, and that what the scan found is what it should."""
    words, units, errors = rounded(one.exact, one.items.storage, one.padded, one.reach)
    np.testing.assert_array_equal(found.rounded, words, str(one))
    np.testing.assert_array_equal(found.states["unit"], units)
    # Norms are float64 sums of so many squares in another order; some roundings come before and after.
    np.testing.assert_allclose(found.states["error"], errors, rtol=(one.exact.shape[1] + 16) * 2.0**-53)
    if one.items.storage == "int8":
        np.testing.assert_array_equal(found.states["shift"], 128 * words.sum(axis=1, dtype=np.int64))
    for row, scores in enumerate(one.scores):
        true_ids, true_scores = (
            x[0] for x in reference.cur_topk(np.ones((1, 1)), scores[None].astype(np.float32).astype(np.float64), one.k)
        )
        missing = one.k - len(true_ids)
        np.testing.assert_array_equal(found.ids[row], np.concatenate([true_ids, np.full(missing, -1)]), str(one))
        expected = np.concatenate([true_scores, np.full(missing, -np.inf)])
        # float64 sums in another order, rounded once: at most the next float32.
        np.testing.assert_allclose(found.scores[row], expected, rtol=2.0**-23, err_msg=str(one))
        # Every item that was left out is below the last that was found, within the bound of both.
        ids = 0xFFFFFFFF - (found.entries[row] & 0xFFFFFFFF).astype(np.int64)
        there = found.entries[row] != 0
        assert len(set(ids[there])) == there.sum() == min(one.wanted, one.items.N)
        assert (np.diff(found.entries[row].astype(object)) <= 0).all()
        left_out = np.delete(scores, ids[there])
        if len(left_out) and np.isfinite(errors[row]):
            assert left_out.max() <= scores[ids[there]].min() + 2 * errors[row]
            sure = true_scores[-1] > scores[ids[there][-1]] + 2.1 * errors[row] + 1e-6 * abs(true_scores[-1])
            assert found.status[row] == 0 or not sure
            if one.wanted == one.k:
                assert found.status[row] == 1
        elif not len(left_out):
            assert found.status[row] == 0


def test_what_a_status_says(program: Callable[..., Path], tmp_path: Path) -> None:
    """Queries that are not finite, one whose answer is certain, and items that are not told apart: by a rounded query,
    or because all scores overflow."""
    fine = search("int8 item", 8, 3000, 50, 1, rows=3, kind="any", more=114)
    fine.queries[0, 3], fine.queries[2, 7] = np.nan, -np.inf
    vectors = np.zeros((8, 3000), np.float32)
    vectors[0] = 1
    vectors[1, ::-1] = np.arange(3000) % 128 / 127
    alike = Search(
        ops.cur_pack(vectors, "int8"),
        np.array([[100, 0.3, 0, 0, 0, 0, 0, 0]], np.float32),
        np.empty((1, 0)),
        50,
        164,
        1,
    )
    ascending = np.linspace(1e30, 2e30, 3000, dtype=np.float32)[None]
    endless = [
        Search(items, np.full((rows, 1), 1e20, np.float32), np.empty((rows, 0)), 2, 8, 1)
        for items, rows in (
            (ops.cur_pack(ascending, "bfloat16"), 1),
            (ops.cur_pack(ascending, "int8"), 4),
            (ops.cur_pack(np.tile(ascending, 6), "int8"), 5),  # many queries
        )
    ]
    (tmp_path / "searches").write_bytes(b"".join(one.bytes() for one in (fine, alike, *endless)))
    output = _run([str(program("address")), str(tmp_path / "searches")]).stdout
    found, begin = Found.read(output, 0, fine)
    assert (found.status[[0, 2]] & 4 == 4).all()
    assert found.status[1] == 0
    found, begin = Found.read(output, begin, alike)
    assert found.status.tolist() == [1]
    for one in endless:
        found, begin = Found.read(output, begin, one)
        assert found.status.tolist() == [1] * len(one.queries)
        assert (found.parts > 0).all() == (len(one.queries) == 5)


def test_cur_topk_of_tensors_on_the_emulated_kernels(
    program: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From `ops.cur_topk` to the kernels and back: what a pointer means, and every number beside it."""
    torch = pytest.importorskip("torch")
    from fastrerank.ops._cur_topk import cuda as _cur_cuda

    run = program("none")

    def cur_topk(
        int8: bool,
        tiles: int,
        tile_bytes: int,
        count: int,
        scale: int,
        anchor: int,
        width: int,
        wide: int,
        reach: float,
        queries: int,
        rows: int,
        k: int,
        wanted: int,
        processors: int,
        scratch: int,
        ids: int,
        scores: int,
        device: int,
        stream: int,
    ) -> None:
        """As fastrerank._cuda.cur_topk, of pointers to host memory."""
        assert (device, stream) == (0, 7)
        data = ctypes.string_at(tiles, -(-count // 16) * tile_bytes)
        scales = ctypes.string_at(scale or anchor, 4 * (count if scale else width)) if scale or anchor else b""
        numbers = (
            int8,
            len(data),
            tile_bytes,
            count,
            bool(scale),
            bool(anchor),
            width,
            wide,
            rows,
            k,
            wanted,
            processors,
            1,
        )
        given = ctypes.string_at(queries, rows * width * 4)
        (tmp_path / "search").write_bytes(described(numbers, reach, data, scales, given))
        output = _run([str(run), str(tmp_path / "search")]).stdout
        for place, begin, size in (
            (scratch, 0, 4 * rows),
            (ids, 4 * rows, 8 * rows * k),
            (scores, (4 + 8 * k) * rows, 4 * rows * k),
        ):
            ctypes.memmove(place, output[begin : begin + size], size)

    def cur_status(scratch: int, rows: int, device: int, stream: int) -> list[int]:
        assert (device, stream) == (0, 7)
        return np.frombuffer(ctypes.string_at(scratch, 4 * rows), np.int32).tolist()

    made = SimpleNamespace(cur_topk=cur_topk, cur_status=cur_status, cur_scratch=lambda *given: 4 * given[3])
    monkeypatch.setattr(_cur_cuda, "_kernels", lambda: made)
    monkeypatch.setattr(_cur_cuda, "_processors", lambda _: 1)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=7))
    random = np.random.default_rng(5)
    queries, vectors = (random.normal(size=shape).astype(np.float32) for shape in ((2, 37), (37, 3001)))
    for storage, scales in (("bfloat16", None), ("int8", "item"), ("int8", "anchor")):
        items = ops.cur_pack(vectors, storage, scales=scales)
        there = _cur_cuda._moved(items, torch.device("cpu"))
        for shards, k, exclude in ((1, 20, None), (2, 20, [3000, 3001]), (1, 1000, None)):
            ids, scores = ops.cur_topk(torch.from_numpy(queries), [there] * shards, k, exclude=exclude)
            true_ids, true_scores = ops.cur_topk(queries, [items] * shards, k, exclude=exclude)
            np.testing.assert_array_equal(ids.numpy(), true_ids)
            np.testing.assert_allclose(scores.numpy(), true_scores, rtol=2.0**-23)


def test_a_tile_that_is_not_there_is_found(program: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "scans").write_bytes(search("bfloat16", 20, 100, 5, 1).bytes(missing=1))
    done = _run([str(program("address")), str(tmp_path / "scans")], expected=False)
    assert b"heap-buffer-overflow" in done.stderr


def test_a_barrier_that_is_not_there_is_found(program: Callable[..., Path], tmp_path: Path) -> None:
    few = (search("int8 item", 20, 9000, 20, 1), search("int8 item", 20, 9000, 300, 1, kind="ascending"))
    (tmp_path / "few").write_bytes(b"".join(one.bytes() for one in few))
    (tmp_path / "many").write_bytes(MANY[-1].bytes())

    program("thread")

    def findings(place: str) -> bytes:
        behind = BARRIERS[place]
        assert SOURCE.count(f"__syncthreads();{behind}") == 1
        without = SOURCE.replace(f"__syncthreads();{behind}", behind)
        searches = tmp_path / ("many" if place.startswith("of many") else "few")
        return _run([str(program("thread", without)), str(searches)], expected=False).stderr

    with ThreadPoolExecutor(2) as pool:
        for place, found in zip(BARRIERS, pool.map(findings, BARRIERS), strict=True):
            assert b"data race" in found, place
