"""ops.cur_topk against its reference over stored values, at every instruction-set level."""

from __future__ import annotations

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


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("width", [1, 3, 16, 17, 60, 64, 100])
@pytest.mark.parametrize("count", [1, 15, 16, 47, 48, 49, 1000])
def test_equals_its_reference(isa: str, storage: str, width: int, count: int) -> None:
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
