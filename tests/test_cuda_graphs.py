"""Graphs by bucket, with a stand-in for the capture: what is padded, kept, replayed and given up."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")
import torch
import torch_families as families

from fastrerank.checkpoint import open_checkpoint
from fastrerank.engine.cuda_graphs import BUCKETS, CudaGraphs, bucket_of
from fastrerank.engine.torch_encoder import TorchEncoder


class Captures:
    """Like a graph: the same function on the same memory, its output overwritten by every replay."""

    def __init__(self) -> None:
        self.captured, self.replayed = 0, 0

    def __call__(self, forward: Callable[[], torch.Tensor], _: Any) -> tuple[Callable[[], Any], torch.Tensor]:
        self.captured += 1
        output = torch.full_like(forward(), float("nan"))

        def replay() -> None:
            self.replayed += 1
            output.copy_(forward())

        return replay, output


def with_graphs(folder: Path, capturing: Any) -> TorchEncoder:
    engine = TorchEncoder.load(open_checkpoint(folder))
    runner = engine._runner
    runner.graphs = CudaGraphs(runner._run, torch.device("cpu"), capturing)
    return engine


def test_buckets_waste_at_most_a_third() -> None:
    assert list(BUCKETS) == sorted(set(BUCKETS))
    for tokens in range(64, BUCKETS[-1] + 1):
        bucket = bucket_of(tokens)
        assert bucket is not None
        assert tokens <= bucket < 1.5 * tokens
    assert bucket_of(BUCKETS[-1] + 1) is None


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert", "qwen2"])
def test_replayed_batches_equal_the_reference(tmp_path: Path, family: str) -> None:
    families.save(tmp_path, family)
    captures = Captures()
    engine = with_graphs(tmp_path, captures)
    logits, _ = families.results(family)
    documents = families.documents(family)
    for engine.budget in (4096, 200, 4096):
        ours = engine.forward(*documents)
        assert np.abs(ours - logits).max() <= 2e-5 * np.abs(logits).max()
    assert 0 < captures.captured <= 4 < captures.replayed + 2
    with ThreadPoolExecutor(3) as pool:  # who replays holds the buffers
        for result in pool.map(lambda _: engine.forward(*documents), range(6)):
            assert np.abs(result - logits).max() <= 2e-5 * np.abs(logits).max()


def test_warmup_captures_every_bucket(tmp_path: Path) -> None:
    families.save(tmp_path, "qwen2")
    captures = Captures()
    engine = with_graphs(tmp_path, captures)
    engine._runner._run = lambda table, *_: torch.zeros(table.shape[1], 32)  # the sizes are what counts here
    engine._runner.graphs._forward = engine._runner._run
    engine.warmup()
    assert captures.captured == len(BUCKETS)
    engine.forward(*families.documents("qwen2"))
    assert captures.captured == len(BUCKETS)


def test_larger_batches_run_without_a_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    families.save(tmp_path, "bert")
    captures = Captures()
    engine = with_graphs(tmp_path, captures)
    monkeypatch.setattr("fastrerank.engine.cuda_graphs.BUCKETS", (64,))
    logits, _ = families.results("bert")
    assert np.abs(engine.forward(*families.documents("bert")) - logits).max() <= 2e-5 * np.abs(logits).max()
    assert captures.captured == 0


def test_a_capture_that_fails_is_said_once_and_done_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    families.save(tmp_path, "bert")

    def failing(*_: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    engine = with_graphs(tmp_path, failing)
    logits, _ = families.results("bert")
    with caplog.at_level(logging.WARNING, "fastrerank"):
        for _ in range(2):
            ours = engine.forward(*families.documents("bert"))
            assert np.abs(ours - logits).max() <= 2e-5 * np.abs(logits).max()
    assert caplog.text.count("going on without graphs: operation not permitted") == 1
    assert engine._runner.graphs.failed


def test_buffers_wait_for_their_last_reader(tmp_path: Path) -> None:
    families.save(tmp_path, "bert")
    order: list[str] = []

    class Event:
        def wait(self) -> None:
            order.append("wait")

        def record(self) -> None:
            order.append("record")

    def capturing(forward: Callable[[], torch.Tensor], _: Any) -> tuple[Callable[[], Any], torch.Tensor]:
        return lambda: order.append("replay"), forward()

    engine = with_graphs(tmp_path, capturing)
    engine._runner.graphs._read = Event()
    engine.forward(*families.documents("bert", (5,)))
    table = np.zeros((7, 64), np.int32)
    with torch.inference_mode(), contextlib.suppress(KeyError), engine._runner.graphs.replay(table):
        order.append("read")
        raise KeyError
    assert order == ["wait", "replay", "record", "wait", "replay", "read", "record"]
