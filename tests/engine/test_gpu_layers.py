"""Models on the fused GPU layers, which Triton's interpreter runs where there is no GPU."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("triton")
import torch
import torch_families as families

from fastrerank.engine.batch import Batch
from fastrerank.engine.readouts import Tokens
from fastrerank.engine.torch import gpu_layers
from fastrerank.engine.torch.backbone import PackedBackbone

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu
LENGTHS = (3, 12, 1)


def packed(family: str) -> PackedBackbone:
    model: Any = families.build(family)
    return PackedBackbone(getattr(model, model.base_model_prefix).to(DEVICE))


def states(runner: PackedBackbone, family: str) -> torch.Tensor:
    ids, types, offsets = families.documents(family, LENGTHS)
    with torch.inference_mode():
        ids = np.minimum(ids, runner.backbone.config.vocab_size - 1)
        return runner.read(Batch(ids, offsets, types), Tokens())


def exact(family: str) -> np.ndarray:
    """The token vectors of the same model in float64, by its own attention."""
    ids, types, offsets = families.documents(family, LENGTHS)
    model: Any = families.build(family).double()
    ids = np.minimum(ids, model.config.vocab_size - 1)
    vectors = families.run(model, ids, types, offsets)[1]
    assert vectors is not None
    return vectors


def errs_no_more(found: Any, before: Any, right: np.ndarray) -> None:
    """Twice the error that the model had before its layers were fused is allowed."""
    rms = [float(np.sqrt(np.mean((np.asarray(x, np.float64) - right) ** 2))) for x in (found, before)]
    assert rms[0] <= 2 * rms[1], f"rms error {rms[0]:.3g}, before {rms[1]:.3g}"


@pytest.mark.parametrize(
    ("family", "layers"),
    [("modernbert", 4), ("llama", 3), ("qwen2", 3), ("qwen3", 3), ("gemma2", 3), ("bert", 0)],
)
def test_a_model_computes_the_same_with_our_rotary_embedding(
    monkeypatch: pytest.MonkeyPatch, family: str, layers: int
) -> None:
    calls = []
    ours = gpu_layers.rotary
    monkeypatch.setattr(gpu_layers, "rotary", lambda *x: calls.append(1) or ours(*x))
    runner = packed(family)
    expected = states(runner, family)
    put_back = gpu_layers.fuse_rotary(runner.backbone)
    found = states(runner, family)
    assert len(calls) == layers
    errs_no_more(found.cpu(), expected.cpu(), exact(family))
    other = families.build(family)  # other models of the class are as they were
    assert not any("forward" in vars(module) for module in other.modules())
    put_back()
    assert torch.equal(states(runner, family), expected)
    assert len(calls) == layers


@pytest.mark.parametrize(
    ("family", "count"),
    [("modernbert", 8), ("llama", 6), ("qwen3", 12), ("gemma2", 12), ("bert", 7), ("xlm-roberta", 7)],
)
def test_a_model_computes_the_same_with_our_norms(monkeypatch: pytest.MonkeyPatch, family: str, count: int) -> None:
    calls = []
    ours = gpu_layers.norm_rows
    monkeypatch.setattr(gpu_layers, "norm_rows", lambda *x: calls.append(1) or ours(*x))
    runner = packed(family)
    expected = states(runner, family)
    put_back = gpu_layers.fuse_norms(runner.backbone)
    found = states(runner, family)
    assert count <= len(calls) <= count + 1  # the last one may stand in the head
    errs_no_more(found.cpu(), expected.cpu(), exact(family))
    put_back()
    assert torch.equal(states(runner, family), expected)


@pytest.mark.parametrize(
    ("family", "count"), [("modernbert", 4), ("llama", 3), ("qwen3", 3), ("gemma2", 3), ("bert", 0)]
)
def test_a_model_computes_the_same_with_our_gates(monkeypatch: pytest.MonkeyPatch, family: str, count: int) -> None:
    calls = []
    ours = gpu_layers.gated
    runner = packed(family)
    expected = states(runner, family)
    held = sum(p.untyped_storage().nbytes() for p in runner.backbone.parameters())
    put_back = gpu_layers.fuse_gated_layers(runner.backbone)
    monkeypatch.setattr(gpu_layers, "gated", lambda *x: calls.append(1) or ours(*x))
    found = states(runner, family)
    assert len(calls) == count
    errs_no_more(found.cpu(), expected.cpu(), exact(family))
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in runner.backbone.parameters()}
    assert sum(storages.values()) == held  # nothing twice
    put_back()
    assert torch.equal(states(runner, family), expected)


@pytest.mark.parametrize(("family", "count"), [("bert", 6), ("xlm-roberta", 6), ("electra", 6), ("llama", 0)])
def test_a_model_computes_the_same_with_sums_in_its_norms(family: str, count: int) -> None:
    runner = packed(family)
    expected = states(runner, family)
    put_back = gpu_layers.fuse_sums(runner.backbone)
    assert sum("forward" in vars(module) for module in runner.backbone.modules()) == count
    found = states(runner, family)
    errs_no_more(found.cpu(), expected.cpu(), exact(family))
    put_back()
    assert torch.equal(states(runner, family), expected)


@pytest.mark.parametrize(
    ("family", "count"), [("bert", 3), ("xlm-roberta", 3), ("llama", 3), ("qwen2", 3), ("qwen3", 3), ("modernbert", 0)]
)
def test_a_model_computes_the_same_with_merged_projections(family: str, count: int) -> None:
    runner = packed(family)
    expected = states(runner, family)
    held = sum(p.untyped_storage().nbytes() for p in runner.backbone.parameters())
    gpu_layers.fuse_rotary(runner.backbone)
    turned = states(runner, family)
    put_back = gpu_layers.merge_projections(runner.backbone)
    linears = [m for m in runner.backbone.modules() if isinstance(m, torch.nn.Linear)]
    assert sum("forward" in vars(linear) for linear in linears) == 3 * count
    errs_no_more(states(runner, family).cpu(), expected.cpu(), exact(family))
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in runner.backbone.parameters()}
    assert sum(storages.values()) == held  # nothing twice
    put_back()
    assert torch.equal(states(runner, family), turned)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_a_decoder_whose_last_layer_is_pruned_keeps_its_logits(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, family: str
) -> None:
    import decoders

    from fastrerank.engine.torch import decoder
    from fastrerank.engine.torch.causal import CausalScorer

    prompts, labels = decoders.prompts(), np.arange(3, 35)
    monkeypatch.setattr(decoder, "fuse_layers", lambda _: None)
    expected = CausalScorer.from_model(decoders.build(family), device=DEVICE).label_logits(prompts, labels)[0]
    monkeypatch.setattr(decoder, "fuse_layers", gpu_layers.fuse_on_gpu)
    monkeypatch.setattr("fastrerank.engine.torch.probe.packs", lambda _: False)  # torch's linear layers, as on a GPU
    with caplog.at_level("INFO", "fastrerank"):
        found = CausalScorer.from_model(decoders.build(family), device=DEVICE).label_logits(prompts, labels)[0]
    assert "keeps its own" not in caplog.text
    errs_no_more(found, expected, decoders.full_logits(decoders.build(family).double(), prompts, labels))


def test_attention_masses_stay_the_same(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    import decoders

    from fastrerank.engine.readouts import Reading
    from fastrerank.engine.torch import attention as attention_scorer

    reading = Reading.of(np.arange(3, 15), np.array([20, 21, 22]), np.array([20, 30]), 1, 9)
    monkeypatch.setattr(attention_scorer, "packs", lambda _: False)  # torch's linear layers, as on a GPU
    masses = []
    for fuse in (lambda _: None, gpu_layers.fuse_on_gpu):
        monkeypatch.setattr(attention_scorer, "fuse_layers", fuse)
        model = decoders.build("qwen3").model
        with caplog.at_level("INFO", "fastrerank"):
            scorer = attention_scorer.AttentionScorer.from_model(model, [(0, 1), (1, 2)], device=DEVICE)
        masses.append(scorer.masses(reading)[0])
    assert "keeps its own" not in caplog.text
    # the bound of attention masses against transformers' own: 1e-5 of the largest
    assert np.abs(masses[1] - masses[0]).max() <= 1e-5 * np.abs(masses[0]).max()


def test_another_rotation_is_left_alone() -> None:
    import decoders

    model = decoders.build("cohere")  # turns neighbouring columns
    gpu_layers.fuse_rotary(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_part_of_a_head_turns() -> None:
    import decoders

    runner = PackedBackbone(decoders.build("gpt-neox").gpt_neox.to(DEVICE))
    ids, _, offsets = families.documents("llama", LENGTHS)
    ids = np.minimum(ids, runner.backbone.config.vocab_size - 1)
    model = decoders.build("gpt-neox").gpt_neox.double()
    with torch.inference_mode():
        alone = [model(torch.from_numpy(part)[None])[0][0].numpy() for part in np.split(ids, offsets[1:-1])]
    expected = states(runner, "llama")
    gpu_layers.fuse_rotary(runner.backbone)
    errs_no_more(states(runner, "llama").cpu(), expected.cpu(), np.concatenate(alone))


def test_what_differs_is_put_back(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    ours = gpu_layers.rotary
    monkeypatch.setattr(gpu_layers, "rotary", lambda q, k, cos, sin: ours(q, k, sin, cos))
    runner = packed("llama")
    expected = states(runner, "llama")
    with caplog.at_level("INFO", "fastrerank"):
        gpu_layers.fuse_on_gpu(runner)
    assert "keeps its own rotary embedding: results differ" in caplog.text
    errs_no_more(states(runner, "llama").cpu(), expected.cpu(), exact("llama"))


def test_compiled_a_layer_is_one_graph() -> None:
    runner = packed("qwen3")
    layer = runner.backbone.layers[0]
    layer.self_attn.config._attn_implementation = "eager"
    x = torch.randn(1, 5, 32, device=DEVICE)
    angles = tuple(torch.randn(1, 5, 8, device=DEVICE) for _ in range(2))
    with torch.inference_mode():
        expected = layer(x, position_embeddings=angles)
        right = copy.deepcopy(layer).double()(x.double(), position_embeddings=tuple(y.double() for y in angles))
        for fuse in (
            gpu_layers.fuse_rotary,
            gpu_layers.fuse_norms,
            gpu_layers.fuse_gated_layers,
            gpu_layers.merge_projections,
        ):
            fuse(runner.backbone)
        found = torch.compile(layer, backend="eager", fullgraph=True)(x, position_embeddings=angles)
    errs_no_more(found.cpu(), expected.cpu(), right.cpu().numpy())
