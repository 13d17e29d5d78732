"""ops.cur_topk against its reference over stored values, at every instruction-set level."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrerank import ops
from fastrerank.ops import reference

STORAGES = ("float32", "bfloat16", "int8")


def expected(queries: np.ndarray, items: Any, k: int, exclude: Any = None) -> tuple[np.ndarray, np.ndarray]:
    shards = [items] if isinstance(items, ops.PackedItems) else items
    vectors = np.concatenate([stored(shard) for shard in shards], axis=1)
    return reference.cur_topk(queries.astype(np.float64), vectors, k, exclude)


def stored(items: ops.PackedItems) -> np.ndarray:
    """The stored values in float64; `vectors()` rounds the product of an int8 value and its scale to float32."""
    values = items.vectors().astype(np.float64)
    if items.scale is None:
        return values
    scale = items.scale.astype(np.float64)
    return np.rint(values / scale) * scale


def integers(random: np.random.Generator, shape: tuple[int, ...], limit: int) -> np.ndarray:
    return random.integers(-limit, limit + 1, shape).astype(np.float32)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("width", [1, 3, 16, 17, 60, 64, 100])
@pytest.mark.parametrize("count", [1, 15, 16, 47, 48, 49, 1000])
def test_equals_its_reference(storage: str, width: int, count: int) -> None:
    random = np.random.default_rng(width * 1000 + count)
    vectors = random.normal(size=(width, count)).astype(np.float32)
    items = ops.cur_pack(vectors, storage)
    for rows, k in ((1, 1), (3, 10), (9, 100)):
        queries = random.normal(size=(rows, width)).astype(np.float32)
        ids, scores = ops.cur_topk(queries, items, k)
        true_ids, true_scores = expected(queries, items, k)
        np.testing.assert_array_equal(ids, true_ids)
        np.testing.assert_array_equal(scores, true_scores)


def test_wraps_appends_and_reads_back() -> None:
    random = np.random.default_rng(1)
    vectors = random.normal(size=(20, 100)).astype(np.float32)
    for storage in STORAGES:
        whole = ops.cur_pack(vectors, storage)
        for split in (0, 1, 16, 37, 100):
            grown = ops.cur_pack(vectors[:, :split], storage).append(vectors[:, split:])
            np.testing.assert_array_equal(grown.data, whole.data)
            if whole.scale is not None:
                np.testing.assert_array_equal(grown.scale, whole.scale)
        again = ops.PackedItems(whole.data, whole.scale, storage=storage, width=20, count=100)
        np.testing.assert_array_equal(again.vectors([3, 50]), whole.vectors()[:, [3, 50]])
        bound = {"float32": 0, "bfloat16": 2.0**-8, "int8": 0.501 / 127}[storage] * np.abs(vectors).max()
        assert np.abs(whole.vectors() - vectors).max() <= bound
    with pytest.raises(ValueError, match="row 4"):
        ops.cur_pack(vectors, "int8", scales="anchor").append(np.eye(20, 3, -4, dtype=np.float32) * 100)


@pytest.mark.parametrize("scales", ["item", "anchor"])
def test_int8_tiles_hold_norms_and_residuals_rounded_up(scales: str) -> None:
    vectors = np.random.default_rng(6).normal(size=(70, 50)).astype(np.float32)
    vectors[:, 7] = 0
    items = ops.cur_pack(vectors, "int8", scales=scales)
    words = items.data[:, -64:].copy().view(np.uint32).reshape(-1)[:50]
    values = stored(items) / items.scale.astype(np.float64)
    left = vectors / items.scale.astype(np.float64) - np.rint(values)
    for halves, exact in ((words & 0xFFFF0000, np.rint(values)), (words << 16, left)):
        norms = np.sqrt(np.square(exact).sum(axis=0))
        held = halves.astype(np.uint32).view(np.float32)
        assert (held >= norms).all()
        assert (held <= norms * (1 + 2.0**-6)).all()


@given(
    values=st.lists(st.integers(-3, 3) | st.sampled_from([-np.inf, np.inf]), min_size=1, max_size=90),
    k=st.integers(1, 100),
    order=st.sampled_from(["as drawn", "ascending", "descending", "equal"]),
)
@settings(max_examples=150, deadline=None)
def test_order_is_total(values: list[float], k: int, order: str) -> None:
    line = np.array(values, np.float32)
    line = {"as drawn": line, "ascending": np.sort(line), "descending": -np.sort(-line), "equal": line[:1].repeat(61)}[
        order
    ]
    ids, scores = ops.cur_topk(np.ones((1, 1), np.float32), ops.cur_pack(line[None], "float32"), k)
    true_ids, true_scores = reference.cur_topk(np.ones((1, 1)), line[None].astype(np.float64), k)
    np.testing.assert_array_equal(ids, true_ids)
    np.testing.assert_array_equal(scores, true_scores)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("rows", [1, 5, 16, 33, 70])
def test_many_queries_threads_and_small_reservoirs(storage: str, rows: int) -> None:
    random = np.random.default_rng(rows)
    vectors = random.normal(size=(36, 7001)).astype(np.float32)
    vectors[:, ::50] *= 20  # long items among short ones
    queries = random.normal(size=(rows, 36)).astype(np.float32)
    items = ops.cur_pack(vectors, storage)
    for k in (1, 300):
        true_ids, true_scores = expected(queries, items, k)
        for threads in (1, 3):
            ids, scores = ops.cur_topk(queries, items, k, threads=threads)
            np.testing.assert_array_equal(ids, true_ids)
            np.testing.assert_array_equal(scores, true_scores)


def test_levels_agree_bitwise() -> None:
    random = np.random.default_rng(5)
    vectors = random.normal(size=(50, 9000)).astype(np.float32)
    queries = random.normal(size=(40, 50)).astype(np.float32)
    for storage, scales in (("float32", None), ("bfloat16", None), ("int8", "item"), ("int8", "anchor")):
        items = ops.cur_pack(vectors, storage, scales=scales)
        results = []
        for level in ops.cpu_info()["supported"]:
            ops.set_isa(level)
            try:
                results.append(ops.cur_topk(queries, items, 200))
            finally:
                ops.set_isa(None)
        for ids, scores in results[1:]:
            np.testing.assert_array_equal(ids, results[0][0])
            np.testing.assert_array_equal(scores.view(np.int32), results[0][1].view(np.int32))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("second", ["float32", "bfloat16"])
@pytest.mark.parametrize("scales", ["item", "anchor"])
def test_rescored_int8_gives_the_answer_of_the_rescoring_items(second: str, scales: str) -> None:
    random = np.random.default_rng(11)
    vectors = (random.normal(size=(40, 5000)) * random.lognormal(size=(1, 5000))).astype(np.float32)
    vectors *= random.lognormal(size=(40, 1)).astype(np.float32)
    queries = random.standard_t(2, size=(20, 40)).astype(np.float32)
    rough, fine = ops.cur_pack(vectors, "int8", scales=scales), ops.cur_pack(vectors, second)
    ids, scores = ops.cur_topk(queries, rough, 50, rescore=fine)
    true_ids, true_scores = expected(queries, fine, 50)
    np.testing.assert_array_equal(ids, true_ids)
    np.testing.assert_array_equal(scores, true_scores)
    other = ops.cur_pack(np.roll(vectors, 1, axis=1), second)
    with pytest.raises(ValueError, match="rescore must hold the items that items were rounded from"):
        ops.cur_topk(queries, rough, 50, rescore=other)


@pytest.mark.usefixtures("isa")
def test_scales_of_anchors_multiply_the_rows() -> None:
    random = np.random.default_rng(3)
    vectors = (random.normal(size=(24, 3000)) * 10.0 ** random.integers(-3, 4, (24, 1))).astype(np.float32)
    queries = random.normal(size=(6, 24)).astype(np.float32)
    items = ops.cur_pack(vectors, "int8", scales="anchor")
    assert items.scale.shape == (24, 1)
    assert items.scales == "anchor"
    ids, scores = ops.cur_topk(queries, items, 40)
    true_ids, true_scores = expected(queries, items, 40)
    np.testing.assert_array_equal(ids, true_ids)
    np.testing.assert_array_equal(scores, true_scores)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("storage", STORAGES)
def test_excluded_ids_are_left_out(storage: str) -> None:
    random = np.random.default_rng(8)
    vectors = random.normal(size=(12, 400)).astype(np.float32)
    queries = random.normal(size=(3, 12)).astype(np.float32)
    items = ops.cur_pack(vectors, storage)
    best, _ = expected(queries, items, 400)
    lists = [best[0, :150].tolist(), [], best[2, ::2].tolist()]
    for k in (10, 300):
        ids, scores = ops.cur_topk(queries, items, k, exclude=lists)
        true_ids, true_scores = expected(queries, items, k, lists)
        np.testing.assert_array_equal(ids, true_ids)
        np.testing.assert_array_equal(scores, true_scores)
    assert ids.shape == (3, 300)
    assert (ids[0, 250:] == -1).all()
    assert np.isneginf(scores[0, 250:]).all()
    table = np.full((3, 5), -1)
    table[1, :2] = best[1, :2]
    np.testing.assert_array_equal(ops.cur_topk(queries, items, 4, exclude=table)[0][1], best[1, 2:6])
    shared, _ = ops.cur_topk(queries, items, 400, exclude=np.arange(390))
    assert shared.shape == (3, 10)
    assert ops.cur_topk(queries, items, 4, exclude=np.arange(400))[0].shape == (3, 0)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("storage", STORAGES)
def test_shards_are_one_index(storage: str, tmp_path: Path) -> None:
    random = np.random.default_rng(9)
    vectors = random.normal(size=(20, 2000)).astype(np.float32)
    queries = random.normal(size=(7, 20)).astype(np.float32)
    whole = ops.cur_pack(vectors, storage)
    shards = []
    for number, (begin, end) in enumerate(((0, 3), (3, 3), (3, 1500), (1500, 2000))):
        part = ops.cur_pack(vectors[:, begin:end], storage)
        data = np.memmap(tmp_path / f"{number}", np.uint8, "w+", shape=part.data.shape) if end > begin else part.data
        data[:] = part.data
        shards.append(ops.PackedItems(data, part.scale, storage=storage, width=20, count=end - begin))
    ids, scores = ops.cur_topk(queries, shards, 64)
    true_ids, true_scores = ops.cur_topk(queries, whole, 64)
    np.testing.assert_array_equal(ids, true_ids)
    np.testing.assert_array_equal(scores, true_scores)


AT_THE_END_OF_MEMORY = """
import ctypes, mmap, sys
import numpy as np
from fastrerank import ops

libc = ctypes.CDLL(None)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
page = mmap.PAGESIZE
random = np.random.default_rng(0)
ops.set_isa(sys.argv[1])
for width in (1, 4, 20, 24, 28, 60, 64, 100):
    for count in (16, 33, 512):
        items = ops.cur_pack(random.normal(size=(width, count)).astype(np.float32), "int8")
        end = -(-items.data.size // page) * page
        memory = np.frombuffer(mmap.mmap(-1, end + page), np.uint8)
        assert libc.mprotect(memory.ctypes.data + end, page, 0) == 0
        data = memory[end - items.data.size : end].reshape(items.data.shape)
        data[:] = items.data
        last = ops.PackedItems(data, items.scale, storage="int8", width=width, count=count)
        for rows in (1, 8, 40):
            queries = random.normal(size=(rows, width)).astype(np.float32)
            for threads in (1, 2):
                found, true = (ops.cur_topk(queries, x, 5, threads=threads)[0] for x in (last, items))
                assert (found == true).all()
print("read")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="pages are closed with Linux's mprotect")
def test_nothing_is_read_behind_the_items(isa: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", AT_THE_END_OF_MEMORY, isa], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout.strip()) == (0, "read"), done.stderr


def test_a_query_that_is_not_finite_beneath_a_mask_is_refused() -> None:
    items = ops.cur_pack(np.ones((2, 40), np.float32), "float32")
    queries = np.ma.masked_invalid(np.array([[np.nan, 1]], np.float32))
    with pytest.raises(ValueError, match="queries must be finite, got nan in query 0, column 0"):
        ops.cur_topk(queries, items, 3)


@functools.cache
def sampled(storage: str, misled: bool) -> tuple[np.ndarray, ops.PackedItems, np.ndarray, np.ndarray]:
    """Queries, items so many that a scan begins with a sample of them, and the answer without the items 3 and 50."""
    random = np.random.default_rng(13)
    width = {"float32": 64, "bfloat16": 128, "int8": 256}[storage]  # 4 KB for each tile
    vectors = random.standard_normal((width, 62_000), np.float32)
    queries = random.standard_normal((6, width), np.float32)
    if misled:  # nearly all the best of two queries are in the sample, and of one none is
        vectors[:, :90] += 2 * queries[0][:, None]
        vectors[:, 40:80] += 3 * queries[2][:, None]
        vectors[:, 30_000:30_090] += 2 * queries[1][:, None]
    items = ops.cur_pack(vectors, storage)
    return queries, items, *expected(queries, items, 100, [[3, 50]] * 6)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("misled", [False, True])
def test_a_sample_that_is_not_like_the_items_changes_nothing(storage: str, misled: bool) -> None:
    queries, items, true_ids, true_scores = sampled(storage, misled)
    for threads in (1, 2):
        ids, scores = ops.cur_topk(queries, items, 100, exclude=[3, 50], threads=threads)
        np.testing.assert_array_equal(ids, true_ids)
        np.testing.assert_array_equal(scores, true_scores)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("rows", [1, 20])
def test_many_equal_items_come_by_id(storage: str, rows: int) -> None:
    vectors = np.ones((9, 6000), np.float32)
    vectors[:, 3000] = 2
    queries = np.random.default_rng(0).normal(size=(rows, 9)).astype(np.float32)
    queries[0] = 0
    items = ops.cur_pack(vectors, storage)
    ids, _ = ops.cur_topk(queries, items, 30)
    np.testing.assert_array_equal(ids, expected(queries, items, 30)[0])


@pytest.mark.usefixtures("isa")
def test_extreme_magnitudes_keep_their_order() -> None:
    random = np.random.default_rng(4)
    for exponent in (-44, -30, 0, 30, 37):
        vectors = (random.normal(size=(8, 300)) * 10.0**exponent).astype(np.float32)
        for storage in ("float32", "int8"):
            items = ops.cur_pack(vectors, storage)
            for factor in (1e-40, 1e-10, 1.0, 1e20):
                queries = (random.normal(size=(2, 8)) * factor).astype(np.float32)
                with np.errstate(over="ignore"):
                    true_ids, true_scores = expected(queries, items, 20)
                ids, scores = ops.cur_topk(queries, items, 20)
                np.testing.assert_array_equal(scores, true_scores)
                np.testing.assert_array_equal(ids, true_ids)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("rows", [1, 9, 40])
def test_scales_whose_inverse_overflows_bound_nothing(rows: int) -> None:
    random = np.random.default_rng(6)
    packed = ops.cur_pack(random.normal(size=(70, 2000)).astype(np.float32), "int8")
    scale = np.float32(1e-42) * random.integers(1, 9, 2000).astype(np.float32)  # denormal, below 2**-128
    items = ops.PackedItems(packed.data, scale, storage="int8", width=70, count=2000)
    queries = random.normal(size=(rows, 70)).astype(np.float32)
    ids, scores = ops.cur_topk(queries, items, 20)
    true_ids, true_scores = expected(queries, items, 20)
    np.testing.assert_array_equal(scores, true_scores)
    np.testing.assert_array_equal(ids, true_ids)


@pytest.mark.usefixtures("isa")
def test_infinite_items_are_ordered_and_nan_is_refused() -> None:
    vectors = np.random.default_rng(2).normal(size=(2, 100)).astype(np.float32)
    vectors[0, 40], vectors[1, 50], vectors[0, 60] = np.inf, -np.inf, np.inf
    items = ops.cur_pack(vectors, "float32")
    ids, scores = ops.cur_topk(np.array([[1.0, 0.5]], np.float32), items, 100)
    true_ids, true_scores = expected(np.array([[1.0, 0.5]], np.float32), items, 100)
    np.testing.assert_array_equal(ids, true_ids)
    np.testing.assert_array_equal(scores, true_scores)
    with pytest.raises(ValueError, match="query 0, item 50"):
        ops.cur_topk(np.array([[1.0, 0.0]], np.float32), items, 3)
    with pytest.raises(ValueError, match="query 0, column 1"):
        ops.cur_topk(np.array([[1.0, np.nan]], np.float32), items, 3)
    vectors[1, 70] = np.nan
    with pytest.raises(ValueError, match="item 70 in row 1"):
        ops.cur_pack(vectors, "float32")
    vectors[1, 70] = 0
    with pytest.raises(ValueError, match="finite for int8"):
        ops.cur_pack(vectors, "int8")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"queries": np.ones((1, 3), np.float32)}, ValueError, r"queries must be \(B, 4\)"),
        ({"queries": np.ones((1, 4))}, TypeError, "queries must be a float32"),
        ({"k": 0}, ValueError, "k must be"),
        ({"exclude": [40]}, ValueError, r"within 0 \.\. 39"),
        ({"exclude": np.zeros((2, 1), int)}, ValueError, r"exclude must be integers \(1, E\)"),
        ({"items": []}, TypeError, "items must be PackedItems"),
        ({"rescore": ops.cur_pack(np.ones((4, 40), np.float32), "float32")}, ValueError, "rescore must be"),
        ({"threads": 0}, ValueError, "num_threads"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {
        "queries": np.ones((1, 4), np.float32),
        "items": ops.cur_pack(np.ones((4, 40), np.float32), "float32"),
        "k": 3,
    }
    with pytest.raises(error, match=message):
        ops.cur_topk(**(given | change))


def test_wrong_buffers_are_named() -> None:
    items = ops.cur_pack(np.ones((4, 40), np.float32), "int8")
    good = {"data": items.data, "scale": items.scale, "storage": "int8", "width": 4, "count": 40}
    for change, error, message in (
        ({"storage": "int4"}, ValueError, "storage must be one of"),
        ({"data": items.data[:2]}, ValueError, "data must be C-contiguous"),
        ({"data": items.data.view(np.int8)}, TypeError, "data must be a uint8"),
        ({"scale": None}, TypeError, "scale must be"),
        ({"scale": items.scale * 0}, ValueError, "scale must be positive"),
        ({"width": 5, "scale": items.scale}, ValueError, "data must be"),
        ({"count": -1}, ValueError, "count must be"),
    ):
        with pytest.raises(error, match=message):
            ops.PackedItems(**(good | change))


@pytest.mark.parametrize("ids", [1e300, [0.0, 1.0], [True], "1"])
def test_ids_that_are_no_integers_are_refused(ids: Any) -> None:
    with pytest.raises(TypeError, match="ids must be integers"):
        ops.cur_pack(np.ones((2, 3), np.float32), "float32").vectors(ids)


def test_references_of_no_queries_and_of_integers() -> None:
    places, scores = reference.cur_topk(np.zeros((0, 2)), np.ones((2, 5)), 3)
    assert places.shape == scores.shape == (0, 3)
    assert reference.max_sim(np.array([[1, 0]]), np.array([[0.5, 2.0]]), np.array([0, 1])).tolist() == [0.5]
