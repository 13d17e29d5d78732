"""ops.cur_topk for tensors: all but the kernel's launch, with a scan in torch in its place."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cur_rounding import rounded

torch = pytest.importorskip("torch")

from fastrerank import _cpu_tests, ops  # noqa: E402
from fastrerank.ops import reference  # noqa: E402
from fastrerank.ops._cur_topk import cuda as _cur_cuda  # noqa: E402


def scan_in_torch(queries: Any, items: Any, k: int) -> tuple[Any, Any, Any]:
    """What the kernels compute: sums of int8 or float32 products, chosen as blocks choose, and their exact scores."""
    finite = queries.isfinite().all(dim=1)
    exact = _cur_cuda._exact(torch.where(finite[:, None], queries, 0), items)
    given, units, errors = rounded(exact.numpy(), items.storage, items.K, items.reach)
    wanted, found, status = _cur_cuda._wider(k), [], []
    rows = items.vectors(torch.arange(items.N))
    for row, query in enumerate(given):
        vector = torch.from_numpy(query).double()
        if items.scale is not None and items.scales == "item":
            sums = (rows / items.scale.double()[:, None]).round() @ vector
            products = sums.float() * items.scale
        else:
            products = (rows @ vector).float()
        ids, best = _cpu_tests.reservoir_topk(products.tolist(), wanted, 64, 3)
        scores = _cur_cuda._scores(exact[row : row + 1], items, torch.tensor(ids))[0]
        found.append(_cur_cuda._keys_of(scores, torch.tensor(ids)).sort(descending=True).values[:k])
        least = best[-1] * units[row] + errors[row]
        least = torch.tensor(least + abs(least) * 2.0**-22 + 2.0**-146).float()
        certain = bool(_cur_cuda._scores_of(found[-1])[-1] > least)
        status.append(0 if certain and finite[row] else 1 if finite[row] else 4)
    keys = torch.stack(found)
    return _cur_cuda._ids_of(keys), _cur_cuda._scores_of(keys), lambda: status


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The k of every scan that is made."""
    made: list[int] = []

    def launch(queries: Any, items: Any, k: int) -> tuple[Any, Any, Any]:
        made.append(_cur_cuda._wider(k))
        return scan_in_torch(queries, items, k)

    monkeypatch.setattr(_cur_cuda, "_launch", launch)
    return made


def placed(items: ops.PackedItems) -> Any:
    return _cur_cuda._moved(items, torch.device("cpu"))


@pytest.mark.parametrize(
    ("storage", "scales"), [("float32", None), ("bfloat16", None), ("int8", "item"), ("int8", "anchor")]
)
def test_equals_the_cpu(storage: str, scales: str | None, scans: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cur_cuda, "_CHUNK", 500)
    random = np.random.default_rng(1)
    vectors = random.normal(size=(37, 2003)).astype(np.float32)
    queries = random.normal(size=(3, 37)).astype(np.float32)
    vectors[:, 100:120] = vectors[:, 100:101]  # equal items, which come by id
    queries[1] = vectors[:, 100]
    parts = [ops.cur_pack(vectors[:, a:b], storage, scales=scales) for a, b in ((0, 900), (900, 900), (900, 2003))]
    if scales == "anchor":
        parts = [ops.cur_pack(vectors, storage, scales=scales)]
    for k, exclude in ((1, None), (40, None), (40, [[5, 100], [], list(range(90, 110))]), (1500, None)):
        ids, scores = ops.cur_topk(torch.from_numpy(queries), [placed(part) for part in parts], k, exclude=exclude)
        true_ids, true_scores = ops.cur_topk(queries, parts, k, exclude=exclude)
        assert ids.dtype == torch.int64
        np.testing.assert_allclose(scores.numpy(), true_scores, rtol=2.0**-23)
        np.testing.assert_array_equal(ids.numpy(), true_ids)
    assert (len(scans) > 0) == (storage != "float32")


def test_what_a_rounded_query_hides_is_found(scans: list[int]) -> None:
    """Items that differ by less than the error of a rough score, more of them than are looked at exactly."""
    vectors = np.zeros((8, 3000), np.float32)
    vectors[0] = 1
    vectors[1, ::-1] = np.arange(3000) % 128 / 127
    queries = np.array([[100, 0.3, 0, 0, 0, 0, 0, 0]], np.float32)
    items = ops.cur_pack(vectors, "int8")
    ids, scores = ops.cur_topk(torch.from_numpy(queries), placed(items), 50)
    true_ids, true_scores = ops.cur_topk(queries, items, 50)
    assert scans == [164]
    np.testing.assert_array_equal(ids.numpy(), true_ids)
    np.testing.assert_array_equal(scores.numpy(), true_scores)


def test_rows_that_have_fewer_are_filled(scans: list[int]) -> None:
    items = ops.cur_pack(np.arange(10, dtype=np.float32)[None], "int8")
    ids, scores = ops.cur_topk(torch.ones((2, 1)), placed(items), 9, exclude=[[0, 1, 2], []])
    assert ids[0].tolist() == [9, 8, 7, 6, 5, 4, 3, -1, -1]
    assert scores[0, 7:].tolist() == [-np.inf, -np.inf]
    assert ids[1].tolist() == [9, 8, 7, 6, 5, 4, 3, 2, 1]
    assert scans == []  # a scan for so few would find all of them


def test_queries_that_a_block_has_no_room_for(scans: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = np.random.default_rng(3).normal(size=(40, 500)).astype(np.float32)
    items = ops.cur_pack(vectors, "bfloat16")
    results = []
    for room in (4 * 48, 4 * 48 - 1):  # 40 values are stored as 48, float32 in the query
        monkeypatch.setattr(_cur_cuda, "_MOST_SHARED", room)
        results.append(ops.cur_topk(torch.ones((1, 40)), placed(items), 7)[0])
    assert scans == [78]
    assert torch.equal(*results)


def test_a_query_that_is_not_finite_is_found_behind_the_scan(scans: list[int]) -> None:
    items = placed(ops.cur_pack(np.random.default_rng(3).normal(size=(4, 500)).astype(np.float32), "int8"))
    queries = torch.ones((3, 4))
    queries[1, 2] = torch.inf
    with pytest.raises(ValueError, match="got inf in query 1, column 2"):
        ops.cur_topk(queries, items, 3)
    assert scans == [70]
    assert ops.cur_topk(queries[:0], items, 3)[0].shape == (0, 3)
    assert ops.cur_topk(queries[:1], items, 3, exclude=list(range(500)))[1].shape == (1, 0)


def test_keys_order_as_scores_and_ids_do() -> None:
    scores = torch.tensor([0.0, -0.0, 1.5, -1.5, np.inf, -np.inf, 1.5, 1e-45, -1e-45])
    keys = _cur_cuda._keys_of(scores, torch.arange(9) + 2**31 - 10)
    order = keys.argsort(descending=True)
    true, _ = reference.cur_topk(np.ones((1, 1)), scores.double().numpy()[None], 9)
    assert order.tolist() == true[0].tolist()
    assert _cur_cuda._ids_of(keys).tolist() == (torch.arange(9) + 2**31 - 10).tolist()
    assert torch.equal(_cur_cuda._scores_of(keys), scores)


@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
def test_scores_that_overflow_come_by_id(storage: str, scans: list[int]) -> None:
    items = ops.cur_pack(np.linspace(1e30, 2e30, 500, dtype=np.float32)[None], storage)
    queries = np.full((2, 1), 1e20, np.float32)
    ids, scores = ops.cur_topk(torch.from_numpy(queries), placed(items), 5)
    assert (scores == torch.inf).all()
    assert ids.tolist() == ops.cur_topk(queries, items, 5)[0].tolist() == [[0, 1, 2, 3, 4]] * 2
    assert scans == [74]


def test_infinities_and_nan() -> None:
    vectors = np.random.default_rng(2).normal(size=(2, 300)).astype(np.float32)
    vectors[0, 40], vectors[1, 50] = np.inf, -np.inf
    items = ops.cur_pack(vectors, "bfloat16")
    ids, _ = ops.cur_topk(torch.ones((1, 2)), placed(items), 5)
    assert ids.tolist() == ops.cur_topk(np.ones((1, 2), np.float32), items, 5)[0].tolist()
    with pytest.raises(ValueError, match="query 1, item 50"):
        ops.cur_topk(torch.tensor([[1.0, 1.0], [1.0, 0.0]]), placed(items), 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"queries": torch.ones((1, 3))}, ValueError, r"queries must be \(B, 4\)"),
        ({"queries": torch.ones((1, 4)).double()}, TypeError, "queries must be float32"),
        ({"queries": torch.full((1, 4), torch.nan)}, ValueError, "query 0, column 0"),
        ({"queries": torch.ones((1, 4), device="meta")}, ValueError, "queries must be on cpu"),
        ({"k": 0}, ValueError, "k must be"),
        ({"exclude": [40]}, ValueError, r"within 0 \.\. 39"),
        ({"items": []}, TypeError, "items must be on the queries' device"),
        ({"items": ops.cur_pack(np.ones((4, 40), np.float32), "int8")}, TypeError, "got PackedItems: PackedItems.to"),
        ({"rescore": ops.cur_pack(np.ones((4, 40), np.float32), "float32")}, ValueError, "rescore is for items on"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    items = ops.cur_pack(np.ones((4, 40), np.float32), "int8")
    given = {"queries": torch.ones((1, 4)), "items": placed(items), "k": 3}
    with pytest.raises(error, match=message):
        ops.cur_topk(**(given | change))
    with pytest.raises(ValueError, match="device must be a CUDA device"):
        items.to("cpu")
