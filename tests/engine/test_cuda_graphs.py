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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastrerank.checkpoints.checkpoint import open_checkpoint
from fastrerank.engine.batch import Batch
from fastrerank.engine.torch import row as torch_row
from fastrerank.engine.torch.backbone import PackedBackbone
from fastrerank.engine.torch.cuda_graphs import BUCKETS, CudaGraphs, bucket_of
from fastrerank.engine.torch.encoder import TorchEncoder


class Captures:
    """Like a graph: the same function on the same memory, its output overwritten by every replay."""

    def __init__(self) -> None:
        self.captured, self.replayed = 0, 0

    def __call__(self, forward: Callable[[], torch.Tensor], *_: Any) -> tuple[Callable[[], Any], torch.Tensor]:
        self.captured += 1
        output = torch.full_like(forward(), float("nan"))

        def replay() -> None:
            self.replayed += 1
            output.copy_(forward())

        return replay, output


def with_graphs(folder: Path, capturing: Any) -> TorchEncoder:
    engine = TorchEncoder.load(open_checkpoint(folder))
    runner = engine.model.runner
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
    for engine.model.budget in (4096, 200, 4096):
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
    engine.model.runner._run = lambda table, *_: torch.zeros(table.shape[1], 32)  # the sizes are what counts here
    engine.model.runner.graphs._forward = engine.model.runner._run
    engine.warmup()
    assert captures.captured == len(BUCKETS)
    engine.forward(*families.documents("qwen2"))
    assert captures.captured == len(BUCKETS)


def test_larger_batches_run_without_a_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    families.save(tmp_path, "bert")
    captures = Captures()
    engine = with_graphs(tmp_path, captures)
    monkeypatch.setattr("fastrerank.engine.torch.cuda_graphs.BUCKETS", (64,))
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
    assert engine.model.runner.graphs.failed


def test_buffers_wait_for_their_last_reader(tmp_path: Path) -> None:
    families.save(tmp_path, "bert")
    order: list[str] = []

    class Event:
        def wait(self) -> None:
            order.append("wait")

        def record(self) -> None:
            order.append("record")

    def capturing(forward: Callable[[], torch.Tensor], *_: Any) -> tuple[Callable[[], Any], torch.Tensor]:
        return lambda: order.append("replay"), forward()

    engine = with_graphs(tmp_path, capturing)
    engine.model.runner.graphs._read = Event()
    engine.forward(*families.documents("bert", (5,)))
    table = np.zeros((7, 64), np.int32)
    with torch.inference_mode(), contextlib.suppress(KeyError), engine.model.runner.graphs.replay(table):
        order.append("read")
        raise KeyError
    assert order == ["wait", "replay", "record", "wait", "replay", "read", "record"]


class Capture(TorchDispatchMode):
    """Refuses what a CUDA graph cannot hold: reading a value back, and bringing memory of the host to the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func)
        places = {x.device.type for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor) and x.ndim}
        assert not any(word in name for word in ("_local_scalar_dense", "nonzero", "equal.", "unique")), name
        assert len(places) < 2, f"{name} between {places}"
        return out


@pytest.mark.parametrize("family", families.PACKED)
def test_a_forward_holds_nothing_that_a_capture_forbids(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors without memory, which stand for those of a GPU: whatever transformers does there on its way."""
    body: Any = families.build(family).to(torch.bfloat16)
    body = getattr(body, body.base_model_prefix)
    runner = PackedBackbone(body)
    ids, types, offsets = families.documents(family)
    batch = Batch(ids, offsets, types).pack(runner.causal)
    table = runner.table(batch.padded_to(bucket_of(len(ids)) or 0))
    asked: list[Any] = []

    def attention(q: torch.Tensor, *others: Any, **_: Any) -> torch.Tensor:
        asked.append(others)
        return torch.empty_like(q)

    monkeypatch.setattr(torch_row, "attention", attention)
    body.to("meta")
    with torch.inference_mode(), Capture():
        states = runner._run(torch.empty(table.shape, dtype=torch.int32, device="meta"))
    assert states.device.type == "meta"
    assert len(states) == table.shape[1]
    assert len(asked) == body.config.num_hidden_layers


def test_what_a_capture_forbids_is_found() -> None:
    with pytest.raises(AssertionError, match="between"), Capture():
        torch.zeros(3).to("meta")
    with pytest.raises(AssertionError, match="_local_scalar_dense"), Capture():
        torch.ones(1).item()
