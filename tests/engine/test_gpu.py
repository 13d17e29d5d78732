"""What only a CUDA device can show of the torch engine and the kernels; `make test-gpu` runs it.

With FASTRERANK_TEST_DEVICE=cpu the tests that are not about CUDA itself run on the CPU: that tries the tests out.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")
import packing
import tiny as factory
import torch
import torch_families as families

import fastrerank
from fastrerank import ops
from fastrerank.checkpoints.checkpoint import open_checkpoint
from fastrerank.engine.heads import Head
from fastrerank.engine.torch.cuda_graphs import BUCKETS
from fastrerank.engine.torch.encoder import DTYPES, TorchEncoder
from fastrerank.ops import reference

DEVICE = os.environ.get("FASTRERANK_TEST_DEVICE", "cuda")
CUDA = torch.cuda.is_available()
needs_cuda = pytest.mark.skipif(not CUDA, reason="no CUDA device")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CUDA and DEVICE == "cuda", reason="no CUDA device")]


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """float32 products in float32, whatever the process has set before."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def encoder(folder: Path, **options: Any) -> TorchEncoder:
    return TorchEncoder.load(open_checkpoint(folder), options.pop("head", None), device=DEVICE, **options)


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def within_twice_plain(ours: np.ndarray, plain: np.ndarray, exact: np.ndarray) -> None:
    assert ours.shape == exact.shape
    assert np.isfinite(ours).all()
    assert rms(ours - exact) <= 2 * rms(plain - exact), f"{rms(ours - exact):.3g}, plain torch {rms(plain - exact):.3g}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", [*families.PACKED, *families.PADDED])
def test_token_vectors_are_within_twice_plain_torchs_error(tmp_path: Path, family: str, dtype: str) -> None:
    if (family, dtype) == ("mobilebert", "float16"):
        pytest.skip("the tiny MobileBERT overflows in float16, transformers' own too")
    documents = families.documents(family)
    logits, exact = families.results(family, "float64")
    plain_logits, plain = families.run(families.build(family).to(DEVICE, getattr(torch, dtype)), *documents)
    families.save(tmp_path, family)
    engine = encoder(tmp_path, dtype=dtype)
    assert engine.device.type == DEVICE
    assert engine.packed == (family not in (*families.PADDED, "eurobert"))
    within_twice_plain(engine.forward(*documents), plain_logits, logits)
    if plain is not None:
        vectors = encoder(tmp_path, head=Head("tokens"), dtype=dtype)
        assert vectors.packed == (family not in families.PADDED)
        within_twice_plain(vectors.forward(*documents), plain, exact)


@needs_cuda
@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert", "qwen2", "gemma2"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_replayed_graphs_equal_eager_forwards(tmp_path: Path, family: str, dtype: str) -> None:
    families.save(tmp_path, family)
    graphed = encoder(tmp_path, head=Head("tokens"), dtype=dtype)
    eager = encoder(tmp_path, head=Head("tokens"), dtype=dtype, cuda_graphs=False)
    assert eager.model.runner.graphs is None
    calls = [
        families.documents(family, lengths, seed)
        for seed, lengths in enumerate(((5,), (40, 3, 21), (63,), (65,), families.LENGTHS, (9, 2), (160, 160, 160, 7)))
    ]
    model = families.build(family)
    exact = [families.run(model.double(), *call)[1] for call in calls]
    plain = [families.run(families.build(family).to(DEVICE, getattr(torch, dtype)), *call)[1] for call in calls]
    exact, plain = np.concatenate(exact), np.concatenate(plain)  # one bound: the errors of five tokens are luck
    other = np.concatenate([eager.forward(*call) for call in calls])
    for _ in range(3):  # captured in the first, replayed with other documents in between
        ours = np.concatenate([graphed.forward(*call) for call in calls])
        within_twice_plain(ours, plain, exact)
        assert rms(ours - other) <= 2 * rms(plain - exact)
    graphs = graphed.model.runner.graphs
    assert not graphs.failed
    assert set(graphs._graphs) == {64, 96, 384, 512}


@needs_cuda
def test_a_replay_gives_the_bits_of_the_same_padded_forward(tmp_path: Path) -> None:
    from fastrerank.engine.batch import Batch
    from fastrerank.engine.torch.placement import upload

    families.save(tmp_path, "modernbert")
    runner = encoder(tmp_path, head=Head("tokens"), dtype="bfloat16").model.runner
    with torch.inference_mode():
        for seed in range(4):
            ids, types, offsets = families.documents("modernbert", (30, 41 + seed, 9), seed)
            batch = Batch(ids, offsets, types).pack().padded_to(96)
            table = runner.table(batch)
            expected = runner._run(upload(table, runner.device))
            with runner.graphs.replay(table) as states:
                assert torch.equal(states[: offsets[-1]], expected[: offsets[-1]])
    assert not runner.graphs.failed
    assert list(runner.graphs._graphs) == [96]


@needs_cuda
def test_warmup_captures_all_sizes_and_no_more_are_captured_later(tmp_path: Path) -> None:
    families.save(tmp_path, "bert")
    engine = encoder(tmp_path, dtype="bfloat16")
    engine.warmup()
    graphs = engine.model.runner.graphs
    assert not graphs.failed
    assert tuple(graphs._graphs) == BUCKETS
    kept = dict(graphs._graphs)
    engine.forward(*families.documents("bert"))
    assert graphs._graphs == kept


@needs_cuda
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_running_out_of_device_memory_halves_the_budget(
    tmp_path: Path, family: str, caplog: pytest.LogCaptureFixture
) -> None:
    families.save(tmp_path, family)
    engine = encoder(tmp_path, head=Head("mean"))
    documents = families.documents(family, (100, 37, 150, 64) * 600)
    engine.model.budget = 4096
    expected = engine.forward(*documents)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    tokens = len(documents[0])
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    allowed = torch.cuda.memory_reserved() + 1000 * tokens  # bytes; a forward takes twice as much
    engine.model.budget = tokens
    torch.cuda.set_per_process_memory_fraction(allowed / total)
    try:
        with caplog.at_level(logging.WARNING, "fastrerank"):
            ours = engine.forward(*documents)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory on cuda" in caplog.text
    assert engine.model.budget <= tokens // 2
    assert np.abs(ours - expected).max() <= 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("family", ["bert", "deberta"])
def test_a_small_memory_limit_makes_small_batches(tmp_path: Path, family: str) -> None:
    families.save(tmp_path, family)
    logits, _ = families.results(family)
    held = torch.cuda.memory_allocated() if DEVICE == "cuda" else 0
    engine = encoder(tmp_path, memory_limit=held + 3e6)
    assert 1 <= engine.model.budget < 2000
    ours = engine.forward(*families.documents(family))
    assert np.abs(ours - logits).max() <= 2e-5 * np.abs(logits).max()
    with pytest.raises(ValueError, match=r"memory_limit .* leaves no room"):
        encoder(tmp_path, memory_limit=2.0)


@pytest.mark.parametrize("family", ["bert", "qwen2", "deberta"])
@pytest.mark.parametrize("streams", [False, True])
def test_many_threads_and_streams_share_one_engine(tmp_path: Path, family: str, streams: bool) -> None:
    families.save(tmp_path, family)
    engine = encoder(tmp_path)
    calls = [families.documents(family, (3 + n, 20, 1 + n), seed=n) for n in range(8)]
    expected = [engine.forward(*call) for call in calls]
    start = threading.Barrier(4)

    def work(number: int) -> list[np.ndarray]:
        place = torch.cuda.stream(torch.cuda.Stream()) if streams and DEVICE == "cuda" else nullcontext()
        start.wait()
        with place:
            return [engine.forward(*calls[(number + n) % 8]) for n in range(40)]

    with ThreadPoolExecutor(4) as pool:
        for number, results in enumerate(pool.map(work, range(4))):
            for n, result in enumerate(results):
                right = expected[(number + n) % 8]
                assert np.abs(result - right).max() <= 2e-5 * np.abs(right).max()


@pytest.mark.parametrize("devices", [[f"{DEVICE}:0"], [f"{DEVICE}:0", f"{DEVICE}:0"]])
def test_a_list_of_devices(tiny: Any, devices: list[str]) -> None:
    folder = tiny("modernbert")
    texts = factory.texts(12)
    alone = fastrerank.CrossEncoder(str(folder), engine="torch", device=DEVICE, dtype="float32")
    shared = fastrerank.CrossEncoder(str(folder), engine="torch", device=devices, dtype="float32")
    pairs = [(texts[0], text) for text in texts]
    scores = alone.predict(pairs)
    np.testing.assert_allclose(shared.predict(pairs), scores, rtol=1e-5, atol=1e-6)
    native = fastrerank.CrossEncoder(str(folder), engine="native", device="cpu", dtype="float32")
    np.testing.assert_allclose(scores, native.predict(pairs), rtol=1e-4, atol=1e-5)


@needs_cuda
def test_a_gpu_is_chosen_where_there_is_one(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastrerank.engine import loading

    monkeypatch.setattr(loading, "usable_gpu", lambda: True)
    model = fastrerank.CrossEncoder(str(tiny("bert")))
    assert (model.device, model.dtype) == ("cuda", "bfloat16")
    texts = factory.texts(5)
    assert [row["corpus_id"] for row in model.rank(texts[0], texts[1:])]


@needs_cuda
def test_bandwidth_reads_what_was_written() -> None:
    info = ops.cuda_info()
    if not info["built"]:
        pytest.skip(info["problem"])
    assert info["problem"] == ""
    assert info["devices"][0]["supported"]
    assert info["devices"][0]["name"] == torch.cuda.get_device_properties(0).name
    for size in (1 << 20, (1 << 20) + 16, 1 << 28):
        assert 0 < ops.bandwidth(0, size=size, rounds=2) < float("inf")  # a wrong sum raises
    with pytest.raises(ValueError, match="multiple of 16"):
        ops.bandwidth(0, size=(1 << 20) + 4)
    with pytest.raises(ValueError, match="rounds"):
        ops.bandwidth(0, rounds=0)
    with pytest.raises(RuntimeError, match="CUDA: choosing the device failed"):
        ops.bandwidth(torch.cuda.device_count())
    assert ops.bandwidth(0, size=1 << 20, rounds=1) > 0  # the error before is not found here again


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_cuda)])
def test_attention_is_one_node_of_a_compiled_function(backend: str) -> None:
    case = packing.Case(packing.documents([21, 2, 50]), 4, 2, 64)
    q, k, v = packing.tensors(case, torch.bfloat16, DEVICE)
    spans = [torch.from_numpy(span).to(DEVICE) for span in packing.intervals(case.segments)[:2]]

    def layer(q: Any, k: Any, v: Any, *spans: Any) -> Any:
        return ops.attention(q, k, v, *spans) + 1

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)(q, k, v, *spans)
    assert torch.equal(compiled, layer(q, k, v, *spans))


@pytest.mark.parametrize("dtype", DTYPES)
def test_label_logits_of_real_sizes_with_and_without_compilation_and_graphs(dtype: str) -> None:
    """Qwen3-0.6B's width and FIRST's 26 labels, read from the last positions of a padded batch."""
    generator = torch.Generator().manual_seed(0)
    states = (3 * torch.randn((200, 3, 1024), generator=generator)).to(DEVICE, getattr(torch, dtype))
    head = (torch.randn((500, 1024), generator=generator) / 32).to(DEVICE, getattr(torch, dtype))
    gamma = torch.rand(1024, generator=generator).to(DEVICE)
    hidden, weight = states[:, -1], head[::19][:26]

    def readout() -> Any:
        return ops.label_logits(hidden, weight, norm="rms", norm_weight=gamma, return_order=True)

    logits, order = readout()
    exact, _ = reference.label_logits(
        *(x.double().cpu().numpy() for x in (hidden, weight)), norm="rms", norm_weight=gamma.double().cpu().numpy()
    )
    plain = torch.nn.functional.rms_norm(hidden.float(), (1024,), gamma, 1e-6) @ weight.float().T
    within_twice_plain(logits.cpu().numpy(), plain.cpu().numpy(), exact)
    assert torch.equal(order.long(), (-logits).argsort(dim=1, stable=True))
    torch._dynamo.reset()
    compiled = torch.compile(lambda: readout(), fullgraph=True, backend="inductor" if DEVICE == "cuda" else "eager")()
    assert torch.equal(compiled[0], logits)
    if DEVICE != "cuda":
        return
    again = torch.cuda.CUDAGraph()
    with torch.cuda.graph(again):
        replayed, places = readout()
    hidden.copy_(hidden.flip(0))
    again.replay()
    assert torch.equal(replayed, logits.flip(0))
    assert torch.equal(places, order.flip(0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_mass_of_real_sizes_behind_attention_compiled_and_in_a_graph(dtype: str) -> None:
    """A long context and 60 rows behind it, of which 25 calibrate, at Qwen2.5-0.5B's heads."""
    generator = torch.Generator().manual_seed(0)
    context, rows = (2000, 60) if DEVICE == "cuda" else (500, 20)
    q, k, v = (
        torch.randn((context + rows, heads, 64), generator=generator).to(DEVICE, getattr(torch, dtype))
        for heads in (14, 2, 2)
    )
    lo = torch.zeros(rows, dtype=torch.int32, device=DEVICE)
    end = torch.arange(context + 1, context + rows + 1, dtype=torch.int32, device=DEVICE)
    _, lse = ops.attention(q[context:], k, v, lo, end, return_lse=True)
    weight = torch.where(torch.arange(rows) < 35, 1 / 35, -1 / 25).to(DEVICE)
    total = torch.zeros(context, device=DEVICE)
    heads = torch.ones(14, device=DEVICE)
    heads[3:9] = 0

    def layer() -> Any:
        hi = torch.full_like(lo, context)
        return ops.attention_mass(q[context:], k[:context], lse, lo, hi, weight, head_weight=heads, out=total)

    mass = layer().clone()
    wide = [x.double().cpu() for x in (q[context:], k[:context].repeat_interleave(7, 1), lse)]
    scores = torch.einsum("rhd,shd->hrs", *wide[:2]) / 8
    exact = torch.einsum(
        "hrs,r,h->s", (scores - wide[2].T[..., None]).exp(), weight.double().cpu(), heads.double().cpu()
    )
    scores = torch.einsum("rhd,shd->hrs", *(x.float() for x in wide[:2])) / 8
    plain = torch.einsum("hrs,r,h->s", (scores - wide[2].float().T[..., None]).exp(), weight.cpu(), heads.cpu())
    within_twice_plain(mass.cpu().numpy(), plain.numpy(), exact.numpy())
    torch._dynamo.reset()
    total.zero_()
    compiled = torch.compile(layer, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "eager")
    assert torch.equal(compiled(), mass)
    if DEVICE != "cuda":
        return
    again = torch.cuda.CUDAGraph()
    with torch.cuda.graph(again):
        layer()
    total.zero_()
    again.replay()
    assert torch.equal(total, mass)


@needs_cuda
def test_tensors_that_do_not_start_at_a_tile_and_long_rows() -> None:
    """Offsets into larger memory, and more rows than a grid's first wave: written wholly, nothing beside them."""
    case = packing.Case(packing.documents([511, 1, 700, 129] * 12), 2, 1, 64)
    inputs, spans = packing.tensors(case, torch.bfloat16, DEVICE), packing.intervals(case.segments)
    rows = len(inputs[0])
    wide = torch.full((rows + 7, 2, 64), 7.0, dtype=torch.bfloat16, device=DEVICE)
    out, lse = ops.attention(
        *inputs, *(torch.from_numpy(span).to(DEVICE) for span in spans[:2]), out=wide[3:-4], return_lse=True
    )
    assert (wide[:3] == 7).all()
    assert (wide[-4:] == 7).all()
    begin = 0
    for length in (511, 1, 700, 129):  # float64 of the first four documents; the others repeat their lengths
        part = [x[begin : begin + length] for x in inputs]
        alone = packing.intervals(packing.documents([length]))
        packing.check(out[begin : begin + length], lse[begin : begin + length], part, alone)
        begin += length
