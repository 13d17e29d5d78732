"""The CUDA scan of packed items on a device: `make test-gpu` runs it."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from fastrerank import ops  # noqa: E402
from fastrerank.ops._cur_topk import cuda as _cur_cuda  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not ops.cuda_info()["built"], reason="this installation was built without the CUDA kernels"),
]
KINDS = [("bfloat16", None), ("int8", "item"), ("int8", "anchor")]


def check_equals_the_cpu(width: int, count: int, k: int, storage: str, scales: str | None, rows: int = 3) -> None:
    random = np.random.default_rng(width + count)
    vectors = random.normal(size=(width, count)).astype(np.float32)
    vectors[:, -40:] = vectors[:, :1]  # equal items, which come by id
    queries = random.normal(size=(rows, width)).astype(np.float32)
    items = ops.cur_pack(vectors, storage, scales=scales)
    there = items.to("cuda")
    ids, scores = ops.cur_topk(torch.from_numpy(queries).cuda(), there, k)
    true_ids, true_scores = ops.cur_topk(queries, items, k)
    np.testing.assert_allclose(scores.cpu().numpy(), true_scores, rtol=2.0**-23)
    np.testing.assert_array_equal(ids.cpu().numpy(), true_ids)


@pytest.mark.parametrize(("storage", "scales"), KINDS)
@pytest.mark.parametrize("width", [1, 17, 256])
@pytest.mark.parametrize(("count", "k"), [(300, 10), (5000, 100), (70_001, 1), (200_000, 1024), (20_000, 1500)])
def test_equals_the_cpu(width: int, count: int, k: int, storage: str, scales: str | None) -> None:
    check_equals_the_cpu(width, count, k, storage, scales)


@pytest.mark.parametrize(("storage", "scales"), KINDS)
@pytest.mark.parametrize(
    ("rows", "width", "k"),
    [(1, 300, 100), (4, 256, 100), (7, 37, 100), (33, 256, 1024), (5, 33, 9), (32, 256, 40), (70, 300, 40)],
)
def test_queries_that_share_scans(rows: int, width: int, k: int, storage: str, scales: str | None) -> None:
    check_equals_the_cpu(width, 300_017, k, storage, scales, rows)


@pytest.mark.parametrize("order", ["ascending", "descending", "equal"])
@pytest.mark.parametrize(("rows", "k"), [(1, 7), (1, 700), (4, 7), (37, 7), (6, 100)])
def test_integer_products_in_every_order(order: str, rows: int, k: int) -> None:
    """The kernels alone, whose order is total, of queries that rounding takes nothing from."""
    count = 1_100_000
    line = {"ascending": np.arange(count), "descending": -np.arange(count), "equal": np.zeros(count)}[order]
    line = line % 251 - 120.0 if order == "equal" else np.floor(line % count / (count / 254)) - 127
    vectors = np.stack([line, np.full(count, 127.0)]).astype(np.float32)
    vectors[:, 0] = 127
    items = ops.cur_pack(vectors, "int8", scales="anchor")
    values = np.rint(items.vectors() / items.scale).astype(np.int64)
    queries = np.stack([np.full(rows, 127), -3 - np.arange(rows)], axis=1).astype(np.float32)
    ids, scores, status = _cur_cuda._launch(torch.from_numpy(queries).cuda(), items.to("cuda"), k)
    assert set(status()) <= {0, 1}
    for row, query in enumerate(queries):
        sums = query.astype(np.int64) @ values
        best = np.lexsort((np.arange(count), -sums))[:k]
        np.testing.assert_array_equal(ids[row].cpu().numpy(), best)
        np.testing.assert_array_equal(scores[row].cpu().numpy(), sums[best])


def test_a_query_that_is_not_finite_is_found() -> None:
    items = ops.cur_pack(np.random.default_rng(0).normal(size=(64, 5000)).astype(np.float32), "int8").to("cuda")
    queries = torch.ones((3, 64), device="cuda")
    queries[1, 2] = torch.nan
    with pytest.raises(ValueError, match="got nan in query 1, column 2"):
        ops.cur_topk(queries, items, 10)
    assert ops.cur_topk(queries[::2, ::1], items, 10)[0].shape == (2, 10)  # with strides


@pytest.mark.parametrize("k", [40, 100])
def test_a_graph_holds_the_kernels(k: int) -> None:
    random = np.random.default_rng(1)
    items = ops.cur_pack(random.normal(size=(64, 300_000)).astype(np.float32), "int8").to("cuda")
    queries = torch.from_numpy(random.normal(size=(5, 64)).astype(np.float32)).cuda()
    ids, scores = ops.cur_topk(queries, items, k)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = _cur_cuda._launch(queries, items, k)
    for _ in range(3):
        held[0].zero_()
        graph.replay()
        assert held[2]() == [0] * 5
        assert torch.equal(held[0], ids)
        assert torch.equal(held[1], scores)


def test_other_streams_and_repeated_calls_give_the_same() -> None:
    random = np.random.default_rng(0)
    items = ops.cur_pack(random.normal(size=(64, 300_000)).astype(np.float32), "int8").to("cuda")
    queries = torch.from_numpy(random.normal(size=(4, 64)).astype(np.float32)).cuda()
    ids, scores = ops.cur_topk(queries, items, 100)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for _ in range(5):
        with torch.cuda.stream(stream):
            again = ops.cur_topk(queries, items, 100)
        stream.synchronize()
        assert torch.equal(again[0], ids)
        assert torch.equal(again[1], scores)
    with pytest.raises(ValueError, match="queries must be on cuda"):
        ops.cur_topk(queries.cpu(), items, 3)
