"""Checkpoints and arguments that cannot work: one clear error each, never a made-up score."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")
import tiny as factory
import torch

import fastrerank
from fastrerank import CrossEncoder, EmbeddingReranker, LateInteractionReranker, ops
from fastrerank.engine.native.encoder import DTYPES

Tiny = Callable[..., Path]
CLASSES = (CrossEncoder, LateInteractionReranker, EmbeddingReranker)


@pytest.fixture
def folder(tiny: Tiny, tmp_path: Path) -> Path:
    """A tiny checkpoint to break."""
    return Path(shutil.copytree(tiny("bert"), tmp_path / "model"))


def set_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def changed(tmp_path: Path, name: str, change: Callable[[torch.Tensor], None], family: str = "bert") -> Path:
    def apply(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        change(tensors[name])
        return tensors

    return factory.save(tmp_path / "changed", family, change=apply)


@pytest.mark.parametrize("missing", ["classifier.", "bert.pooler."])
def test_a_checkpoint_without_its_head_is_refused_and_told_what_it_can_do(tmp_path: Path, missing: str) -> None:
    path = factory.save(
        tmp_path,
        "bert",
        change=lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.startswith(missing)},
    )
    with pytest.raises(ValueError, match=r"no trained classification head.*late-interaction.*embedding") as caught:
        CrossEncoder(path)
    assert str(path) in str(caught.value)
    assert np.isfinite(LateInteractionReranker(path).score("owl", ["cat"])).all()
    assert np.isfinite(EmbeddingReranker(path).score("owl", ["cat"])).all()


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_an_encoder_is_refused_by_methods_that_read_attention(tiny: Tiny, family: str) -> None:
    words = r"Model is an encoder.*\(icr, qrhead, core\) need a decoder.*cross-encoder, late-interaction or embedding"
    with pytest.raises(ValueError, match=words):
        fastrerank.load(str(tiny(family)), method="icr")
    with pytest.raises(ValueError, match=words):
        fastrerank.load(str(tiny(family)), method="core", heads=[(0, 0)])


def test_a_language_model_of_an_unknown_name_is_told_its_methods(folder: Path) -> None:
    set_config(folder, architectures=["LlamaForCausalLM"])
    with pytest.raises(ValueError, match=r"is a language model.*'pointwise'.*'setwise'.*method='icr'"):
        fastrerank.load(str(folder))


def test_real_embedding_model_is_refused_as_a_cross_encoder(minilm: Path) -> None:
    with pytest.raises(ValueError, match=r"late-interaction.*embedding"):
        CrossEncoder(minilm)


@pytest.mark.parametrize("labels", [2, 3])
def test_another_number_of_labels_is_refused(folder: Path, labels: int) -> None:
    with pytest.raises(ValueError, match=f"num_labels is {labels}, but the head in .* has 1"):
        CrossEncoder(folder, num_labels=labels)
    assert CrossEncoder(folder, num_labels=1).num_labels == 1


@pytest.mark.parametrize("kind", CLASSES)
def test_unknown_choices_list_the_valid_ones(folder: Path, kind: Any) -> None:
    for dtype in ("float64", "fp8", ""):
        with pytest.raises(ValueError, match=r"auto.*float32.*bfloat16.*int8.*float16"):
            kind(folder, dtype=dtype)
    with pytest.raises(ValueError, match=r"auto.*float32.*bfloat16.*int8.*engine='native', got 'float16'"):
        kind(folder, dtype="float16", engine="native")
    for device in ("mps", "tpu", "cuda:", "cuda:-1", "", -1, ["cpu", "tpu"]):
        with pytest.raises(ValueError, match=r"None or 'cpu'.*got"):
            kind(folder, device=device)
    for device in ("cuda", "cuda:99", 99):
        if device == "cuda" and torch.cuda.is_available():
            continue
        with pytest.raises(ValueError, match=r"None or 'cpu'.*cannot use 'cuda"):
            kind(folder, device=device)
    with pytest.raises(ValueError, match="at least one device"):
        kind(folder, device=[])
    for threads in (0, -1, 2.5):
        with pytest.raises(ValueError, match="num_threads must be a positive int"):
            kind(folder, num_threads=threads).score("owl", ["cat"])


@pytest.mark.parametrize("kind", CLASSES)
def test_no_tokens_and_no_layers_are_refused(folder: Path, kind: Any) -> None:
    with pytest.raises(ValueError, match="max_length must be at least 1"):
        kind(folder, max_length=0)
    set_config(folder, num_hidden_layers=0)
    with pytest.raises(ValueError, match=r"num_hidden_layers in config\.json must be an int from 1 .*got 0"):
        kind(folder, engine="native")


def test_unknown_engine_method_and_backend(folder: Path) -> None:
    with pytest.raises(ValueError, match="'native', 'torch', 'padded', got 'onnx'"):
        CrossEncoder(folder, engine="onnx")
    with pytest.raises(ValueError, match="cross-encoder, late-interaction, embedding"):
        fastrerank.load(folder, method="psychic")
    with pytest.raises(ValueError, match="backend"):
        CrossEncoder(folder, backend="psychic")
    with pytest.raises(TypeError, match="model_name_or_path"):
        CrossEncoder()


BODY = "bert.encoder.layer.1."


@pytest.mark.parametrize(
    "name",
    [
        f"{BODY}attention.self.key.weight",
        f"{BODY}output.dense.bias",
        f"{BODY}output.LayerNorm.weight",
        "bert.embeddings.LayerNorm.bias",
        "bert.pooler.dense.weight",
        "classifier.bias",
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, name: str, value: float) -> None:
    path = changed(tmp_path, name, lambda tensor: tensor.view(-1)[-1:].fill_(value))
    for dtype in DTYPES:
        with pytest.raises(ValueError, match="NaN or infinite"):
            CrossEncoder(path, dtype=dtype)


@pytest.mark.parametrize("table", ["word", "position", "token_type"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("isa")
def test_embeddings_that_are_not_finite_never_rank(tmp_path: Path, table: str, dtype: str) -> None:
    # Tables are mapped, not read, when a model is loaded: what is wrong in them shows when a text uses it.
    name = f"bert.embeddings.{table}_embeddings.weight"
    row = {"word": factory.BERT_SPECIALS.index("[SEP]"), "position": 2, "token_type": 1}[table]
    path = changed(tmp_path, name, lambda tensor: tensor[row, 7].fill_(float("nan")))
    with pytest.raises((FloatingPointError, ValueError), match="NaN or infinite"):
        CrossEncoder(path, dtype=dtype).rank("owl", ["cat", "old cat"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("isa")
def test_overflow_is_an_error_that_names_the_document(tmp_path: Path, dtype: str) -> None:
    path = changed(tmp_path, f"{BODY}output.dense.weight", lambda tensor: tensor.div_(tensor.abs().max()).mul_(3e38))
    model = CrossEncoder(path, dtype=dtype)
    with pytest.raises(FloatingPointError, match="score of document 0 is NaN or infinite"):
        model.rank("owl", ["cat", "old cat"])
    with pytest.raises(FloatingPointError, match="of query 1"):
        model.score_many(["a", "owl"], [[], ["cat"]])
    with pytest.raises(FloatingPointError, match="document 0"):
        model.predict([("owl", "cat")])


def test_families_and_variants_that_the_native_engine_does_not_run(folder: Path) -> None:
    for changes, message in (
        ({"model_type": "deberta-v2"}, "deberta-v2.*bert.*modernbert"),
        ({"model_type": "llama"}, "llama.*bert"),
        ({"hidden_act": "laplace"}, "laplace.*gelu"),
        ({"position_embedding_type": "relative_key"}, "relative_key.*absolute"),
        ({"is_decoder": True}, "is_decoder"),
        ({"add_cross_attention": [1]}, "add_cross_attention"),
        ({"num_attention_heads": 3}, "not a multiple of 3 heads"),
    ):
        saved = (folder / "config.json").read_text()
        set_config(folder, **changes)
        with pytest.raises(ValueError, match=message):
            CrossEncoder(folder, engine="native")
        (folder / "config.json").write_text(saved)
    config = json.loads((folder / "config.json").read_text())
    del config["num_attention_heads"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="lacks 'num_attention_heads'"):
        CrossEncoder(folder, engine="native")


@pytest.mark.parametrize(
    "changes",
    [
        {"intermediate_size": 60},
        {"hidden_size": 48},
        {"num_hidden_layers": 5},
        {"model_type": "roberta"},
        {"max_position_embeddings": 161},
        {"type_vocab_size": 3},
        {"model_type": "distilbert"},
    ],
)
def test_weights_that_do_not_fit_config_json(folder: Path, changes: dict[str, Any]) -> None:
    set_config(folder, **changes)
    with pytest.raises(ValueError, match=r"weights|shape|expected|wide|lack"):
        CrossEncoder(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1, -1000])
def test_truncated_weights(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: keep if keep >= 0 else len(content) + keep])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        CrossEncoder(folder)


def test_missing_files(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").rename(tmp_path / "kept.json")
    with pytest.raises(FileNotFoundError, match=r"tokenizer"):
        CrossEncoder(folder)
    (tmp_path / "kept.json").rename(folder / "tokenizer.json")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"safetensors"):
        CrossEncoder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        CrossEncoder(folder)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        CrossEncoder(tmp_path / "absent")


PAIRS_WRONG: list[tuple[Any, str]] = [
    ([("a", "b"), ("a", None)], r"inputs\[1\]\[1\] must be str, got NoneType"),
    ([("a", "b"), (3, "b")], r"inputs\[1\]\[0\] must be str, got int"),
    ([("a", "b")] * 2500 + [("a", b"b")], r"inputs\[2500\]\[1\] must be str, got bytes"),
    ([("a", "b"), ("a",)], r"inputs\[1\] must be a .* pair, got 1 items"),
    ([("a", "b"), "ab"], r"inputs\[1\] must be a .* pair, got str"),
    ([None], r"inputs\[0\] must be a .* pair, got NoneType"),
    (["a", "b", "c"], r"inputs must be a .* pair, got 3 items"),
    (["a", None], r"inputs\[1\] must be str"),
    ("ab", "inputs must be a sequence"),
    (5, "inputs must be a sequence"),
    ({"a": "b"}, "inputs must be a sequence"),
    (None, "inputs"),
    (np.zeros((2, 2, 2), dtype=object), "3 dimensions"),
    (np.array("ab"), "0 dimensions"),
    (np.zeros((2, 2)), r"inputs\[0\]\[0\] must be str, got float"),
]


@pytest.mark.parametrize(("inputs", "message"), PAIRS_WRONG)
@pytest.mark.parametrize("prompt", [None, "query: "])
def test_what_is_not_a_pair_of_texts_is_named_by_position(
    tiny: Tiny, inputs: Any, message: str, prompt: str | None
) -> None:
    with pytest.raises(TypeError, match=message):
        CrossEncoder(tiny("bert")).predict(inputs, prompt=prompt)


def test_set_isa_names_the_levels() -> None:
    with pytest.raises(ValueError, match="portable"):
        ops.set_isa("pentium")
