"""Which engine, devices and precision run a checkpoint, and the rerankers on each of them."""

from __future__ import annotations

import importlib.util
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")
import tiny as factory
import torch
import torch_families as families
import transformers
from helpers_tiny import save_tiny_cross_encoder

import fastrerank
from fastrerank import CrossEncoder, EmbeddingReranker, LateInteractionReranker
from fastrerank.engine import loading, memory
from fastrerank.engine.loading import EncoderGroup, plan, usable_gpu
from fastrerank.engine.torch.encoder import TorchEncoder

Tiny = Callable[..., Path]
QUERY = "where do old cats sleep?"
TEXTS = [*factory.texts(24), "", "Café [SEP] owl", "owl"]
KINDS = (CrossEncoder, EmbeddingReranker, LateInteractionReranker)
BERT = {
    "model_type": "bert",
    "hidden_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 50,
    "max_position_embeddings": 64,
}
LLAMA = {"model_type": "llama"}


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs, as far as choosing goes."""
    monkeypatch.setattr(loading, "usable_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.parametrize(
    ("config", "arguments", "expected"),
    [
        (BERT, (None, None, "auto"), ("native", ("cpu",), "float32")),
        (BERT, (None, None, "int8"), ("native", ("cpu",), "int8")),
        (BERT, ("native", "cpu", "bfloat16"), ("native", ("cpu",), "bfloat16")),
        (BERT, (None, torch.device("cpu"), "float16"), (None, ("cpu",), "float16")),
        (BERT, ("torch", None, "auto"), ("torch", ("cpu",), "float32")),
        (BERT, ("padded", ["cpu", "cpu"], "bfloat16"), ("padded", ("cpu", "cpu"), "bfloat16")),
        (LLAMA, (None, None, "auto"), (None, ("cpu",), "float32")),
    ],
)
def test_plans_on_a_cpu(config: Any, arguments: Any, expected: Any) -> None:
    chosen = plan(config, *arguments)
    assert (chosen.engine, chosen.devices, chosen.dtype) == expected


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("config", "arguments", "expected"),
    [
        (BERT, (None, None, "auto"), (None, ("cuda",), "bfloat16")),
        (BERT, (None, "cpu", "auto"), ("native", ("cpu",), "float32")),
        (BERT, (None, None, "int8"), ("native", ("cpu",), "int8")),
        (BERT, ("native", None, "auto"), ("native", ("cpu",), "float32")),
        (BERT, ("torch", "cpu", "auto"), ("torch", ("cpu",), "float32")),
        (BERT, (None, ["cuda:0", "cuda:1"], "float32"), (None, ("cuda:0", "cuda:1"), "float32")),
        (LLAMA, ("padded", 1, "auto"), ("padded", ("cuda:1",), "bfloat16")),
    ],
)
def test_plans_on_gpus(config: Any, arguments: Any, expected: Any) -> None:
    chosen = plan(config, *arguments)
    assert (chosen.engine, chosen.devices, chosen.dtype) == expected


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (BERT, ("torch", None, "int8"), "'int8' is computed by the native engine on CPUs only"),
        (BERT, ("padded", None, "int8"), "engine='padded' takes 'float32', 'bfloat16', 'float16'"),
        (BERT, (None, "cuda", "int8"), "'int8' is computed by the native engine, which runs on CPUs, got 'cuda'"),
        (BERT, ("native", "cuda:1", "auto"), "None or 'cpu': the native engine runs on CPUs, got 'cuda:1'"),
        (BERT, ("native", ["cpu", "cuda"], "auto"), "got 'cuda'"),
        (BERT, (None, "cuda:2", "auto"), "cannot use 'cuda:2', it finds 2"),
        (LLAMA, ("native", None, "auto"), "'llama' is not a family of the native CPU encoder"),
        (LLAMA, (None, None, "int8"), "'llama' is not a family of the native CPU encoder"),
    ],
)
def test_what_an_engine_cannot_do_is_refused_with_the_reason(config: Any, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(config, *arguments)


def test_a_gpu_is_looked_for_without_importing_torch(tmp_path: Path) -> None:
    folder = save_tiny_cross_encoder(tmp_path / "model")
    code = f"""
import sys, fastrerank
from fastrerank.engine import loading
print(loading.usable_gpu())
fastrerank.CrossEncoder({str(folder)!r}).rank("flea", ["a flea", "cats"])
fastrerank.CrossEncoder({str(folder)!r}, dtype="int8").rank("flea", ["a flea", "cats"])
print(*[name for name in ("torch", "transformers") if name in sys.modules])
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        env={"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ":".join(sys.path)},
    )
    assert done.stdout.split() == ["False"]


@pytest.mark.parametrize("visible", ["", "-1", " "])
def test_hidden_gpus_are_not_used(monkeypatch: pytest.MonkeyPatch, visible: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(loading.Path, "exists", lambda _: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert usable_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert not usable_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(loading.Path, "exists", lambda _: False)
    assert not usable_gpu()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [{"engine": "torch"}, {"engine": "padded"}, {"device": ["cpu", "cpu"]}, {"engine": "torch", "device": ["cpu"] * 3}],
)
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_engines_and_devices_agree(tiny: Tiny, kind: Any, options: dict[str, Any], family: str) -> None:
    expected = kind(tiny(family), engine="native").score(QUERY, TEXTS)
    reranker = kind(tiny(family), **options)
    assert reranker.device == options.get("device", "cpu")
    scores = reranker.score(QUERY, TEXTS)
    assert scores.dtype == np.float32
    assert np.abs(scores - expected).max() <= 2e-5 * np.abs(expected).max()
    assert len(reranker.score(QUERY, [])) == 0
    assert len(reranker.score(QUERY, ["owl"])) == 1
    many = reranker.score_many([QUERY, "owl"], [TEXTS[:3], TEXTS])
    assert np.abs(many[0] - expected[:3]).max() <= 2e-5 * np.abs(expected).max()


def test_devices_share_the_documents_evenly(tiny: Tiny) -> None:
    reranker = CrossEncoder(tiny("bert"), engine="torch", device=["cpu", "cpu"])
    group = reranker.engine
    assert isinstance(group, EncoderGroup)
    tokens = []
    for encoder in group.encoders:
        forward = encoder.forward
        encoder.forward = lambda ids, types, offsets, f=forward: (tokens.append(len(ids)), f(ids, types, offsets))[1]
    reranker.score(QUERY, TEXTS)
    assert len(tokens) == 2
    assert max(tokens) < 1.2 * min(tokens)


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("family", ["qwen2", "gemma2", "deberta", "albert"])
def test_cross_encoders_of_other_families(tmp_path: Path, family: str, labels: int) -> None:
    folder = families.save(tmp_path, family, labels)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    model = families.build(family, labels)
    with torch.inference_mode():
        logits = [model(**tokenizer([(QUERY, text)], return_tensors="pt")).logits for text in TEXTS]
    expected = torch.cat(logits).numpy()
    ours = CrossEncoder(folder)
    assert ours.num_labels == labels
    scores = ours.predict([(QUERY, text) for text in TEXTS], activation_fn="identity").reshape(len(TEXTS), labels)
    assert np.abs(scores - expected).max() <= 2e-5 * np.abs(expected).max()
    assert fastrerank.load(folder).method == "cross-encoder"


@pytest.mark.parametrize("pooling", ["cls", "mean", "lasttoken"])
@pytest.mark.parametrize("engine", ["torch", "padded"])
def test_cross_encoders_made_of_modules(tiny: Tiny, tmp_path: Path, pooling: str, engine: str) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling

    torch.manual_seed(0)
    transformer = Transformer(str(tiny("bert")))
    width = transformer.get_embedding_dimension()
    theirs = sentence_transformers.CrossEncoder(
        device="cpu",
        modules=[
            transformer,
            Pooling(width, pooling_mode=pooling),
            Dense(width, 30, bias=False, activation_function=torch.nn.GELU()),
            LayerNorm(30),
            Dense(30, 1, activation_function=torch.nn.Identity(), module_output_name="scores"),
        ],
    )
    theirs.save_pretrained(str(tmp_path))
    expected = theirs.predict([(QUERY, text) for text in TEXTS], activation_fn=torch.nn.Identity())
    scores = CrossEncoder(tmp_path, engine=engine).score(QUERY, TEXTS)
    assert np.abs(scores - expected).max() <= 2e-5 * max(1, np.abs(expected).max())


def test_the_log_says_once_what_runs_a_checkpoint(tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    families.save(tmp_path / "deberta", "deberta", 1)
    families.save(tmp_path / "qwen2", "qwen2", 1)
    for folder, level, words in (
        (tmp_path / "deberta", logging.WARNING, "runs in padded batches, which is slower: DebertaV2Model computes"),
        (tmp_path / "qwen2", logging.INFO, "runs packed on the torch engine: model_type 'qwen2' is not a family"),
        (tiny("bert"), logging.INFO, None),
    ):
        caplog.clear()
        with caplog.at_level(logging.INFO, "fastrerank"):
            model = CrossEncoder(folder)
            model.score(QUERY, TEXTS)
        records = [(record.levelno, record.getMessage()) for record in caplog.records if record.name == "fastrerank"]
        assert [level_ for level_, _ in records] == ([] if words is None else [level])
        assert words is None or words in records[0][1]


@pytest.mark.parametrize("engine", ["torch", "padded"])
@pytest.mark.parametrize("missing", ["classifier.", "bert.pooler."])
def test_an_untrained_head_is_refused(tmp_path: Path, engine: str, missing: str) -> None:
    folder = factory.save(
        tmp_path,
        "bert",
        change=lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.startswith(missing)},
    )
    with pytest.raises(ValueError, match=r"no trained classification head.*late-interaction.*embedding") as caught:
        CrossEncoder(folder, engine=engine)
    assert str(folder) in str(caught.value)
    for kind in (LateInteractionReranker, EmbeddingReranker):
        assert np.isfinite(kind(folder, engine=engine).score("owl", ["cat"])).all()


def test_a_decoder_without_a_score_head_is_refused(tmp_path: Path) -> None:
    model = families.build("qwen3")
    model.model.save_pretrained(tmp_path)
    factory.save_tokenizer(tmp_path, "bert")
    with pytest.raises(ValueError, match="no trained classification head"):
        CrossEncoder(tmp_path)


@pytest.mark.parametrize("engine", ["torch", "padded"])
def test_weights_that_cannot_be_right_are_refused(tmp_path: Path, engine: str) -> None:
    name = "bert.encoder.layer.1.output.dense.weight"
    changes: list[tuple[Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], str]] = [
        (lambda t: {key: value for key, value in t.items() if key != name}, f"the weights lack '{name}'"),
        (lambda t: t | {name: t[name] * float("nan")}, f"weight of {name} is NaN or infinite"),
        (lambda t: t | {name: t[name].masked_fill(t[name] > 0.5, float("inf"))}, "NaN or infinite"),
        (lambda t: t | {"classifier.weight": torch.full((1, 40), float("nan"))}, "NaN or infinite"),
        (lambda t: t | {name: t[name][:, :20].clone()}, rf"stored shape of {name} is \(40, 20\).*\(40, 50\)"),
    ]
    for number, (change, message) in enumerate(changes):
        folder = factory.save(tmp_path / str(number), "bert", change=change)
        with pytest.raises(ValueError, match=message):
            CrossEncoder(folder, engine=engine)
    config = json.loads((folder / "config.json").read_text())
    folder = factory.save(tmp_path / "relative", "bert")
    (folder / "config.json").write_text(json.dumps(config | {"position_embedding_type": "relative_key"}))
    with pytest.raises(ValueError, match="relative_key"):
        CrossEncoder(folder, engine=engine)


@pytest.mark.parametrize("engine", ["torch", "padded"])
def test_overflow_is_an_error_that_names_the_document(tmp_path: Path, engine: str) -> None:
    name = "bert.encoder.layer.1.output.dense.weight"
    folder = factory.save(
        tmp_path, "bert", change=lambda tensors: tensors | {name: tensors[name] / tensors[name].abs().max() * 3e38}
    )
    with pytest.raises(FloatingPointError, match="score of document 0 is NaN or infinite"):
        CrossEncoder(folder, engine=engine).rank("owl", ["cat", "old cat"])


def test_without_torch_the_extra_is_named(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = families.save(tmp_path, "qwen2", 1)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "torch" else find(name, *a))
    with pytest.raises(ImportError, match=r"pip install 'fastrerank\[torch\]'"):
        CrossEncoder(tiny("bert"), engine="torch")
    with pytest.raises(ImportError, match=r"'qwen2' is not a family.*pip install 'fastrerank\[torch\]'"):
        CrossEncoder(folder)
    with pytest.raises(ImportError, match=r"device 'cuda' needs torch"):
        CrossEncoder(tiny("bert"), device="cuda")
    assert not usable_gpu()


def test_threads_are_torchs_own_unless_given(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = torch.get_num_threads(), []
    for threads in (None, 3):
        engine = CrossEncoder(tiny("bert"), engine="torch", num_threads=threads).engine
        assert isinstance(engine, TorchEncoder)
        read = engine.model.runner.read
        monkeypatch.setattr(
            engine.model.runner, "read", lambda *a, r=read: (seen.append(torch.get_num_threads()), r(*a))[1]
        )
        engine.forward(np.array([5], np.int32), None, np.array([0, 1]))
        assert torch.get_num_threads() == before
    assert seen == [before, 3]


def test_a_call_may_name_the_models_device_only(tiny: Tiny) -> None:
    model = CrossEncoder(tiny("bert"), engine="torch", device=["cpu", "cpu"])
    pairs = [(QUERY, text) for text in TEXTS]
    np.testing.assert_array_equal(model.predict(pairs, device=["cpu", "cpu:0"]), model.predict(pairs))
    assert model.to(["cpu", "cpu"]) is model
    for same in ("cpu", ["cpu"], ["cpu"] * 3):  # the same place, however often it is named
        np.testing.assert_array_equal(model.predict(pairs, device=same), model.predict(pairs))
    for wrong in ("cuda", ["cuda:0"], ["cpu", "cuda:0"]):
        with pytest.raises(ValueError, match=r"device must be None or \['cpu', 'cpu'\]: the model was loaded there"):
            model.predict(pairs, device=wrong)


def test_memory_limits(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 1 << 30
    monkeypatch.setattr(memory, "_memory", lambda _: (10 * gib, 16 * gib, 2 * gib))
    device = torch.device("cuda")
    each = 1 << 20
    assert memory.device_budget(device, each, None) == 10 << 10  # 0.9 of 16 less 2 is more than is free
    assert memory.device_budget(device, each, 0.5) == 6 << 10
    assert memory.device_budget(device, each, 3 * gib) == 1 << 10
    assert memory.device_budget(device, 1, None) == memory.MOST_TOKENS
    for wrong in (0, -1, -0.5):
        with pytest.raises(ValueError, match="memory_limit must be a positive number of bytes or a fraction"):
            memory.device_budget(device, each, wrong)
    with pytest.raises(ValueError, match=r"memory_limit 0.1 leaves no room on cuda"):
        memory.device_budget(device, each, 0.1)
    monkeypatch.undo()
    model = CrossEncoder(tiny("bert"), engine="torch", memory_limit=1 << 20)
    assert isinstance(model.engine, TorchEncoder)
    assert 0 < model.engine.model.budget < 1000
    expected = CrossEncoder(tiny("bert"), engine="torch").score(QUERY, TEXTS)
    assert np.abs(model.score(QUERY, TEXTS) - expected).max() <= 2e-5 * np.abs(expected).max()
