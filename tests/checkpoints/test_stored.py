"""Every tensor of every native family: left out, of another shape or type, ruled out by config.json, read by nobody."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")
import tiny as factory
import torch
from safetensors.torch import load_file, save_file

from fastrerank import CrossEncoder, EmbeddingReranker, LateInteractionReranker
from fastrerank.checkpoints.checkpoint import open_checkpoint
from fastrerank.engine.families import family_of
from fastrerank.engine.heads import Head
from fastrerank.engine.loading import Plan, load_encoder
from fastrerank.engine.native.encoder import NativeEncoder

Tiny = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
NATIVE = Plan("native", ("cpu",), "float32")


def load(folder: Path) -> Any:
    return load_encoder(open_checkpoint(folder), None, NATIVE, num_threads=1)


@pytest.fixture(params=factory.FAMILIES)
def broken(
    request: pytest.FixtureRequest, tiny: Tiny, tmp_path: Path
) -> tuple[Path, Tensors, Callable[[Tensors], Path]]:
    """(folder of a copy, its tensors, `write(tensors)`), for each family."""
    folder = Path(shutil.copytree(tiny(request.param), tmp_path / "model"))
    file = folder / "model.safetensors"
    tensors = load_file(file)

    def write(changed: Tensors) -> Path:
        file.unlink(missing_ok=True)
        save_file(changed, file)
        return folder

    return folder, tensors, write


def test_a_tensor_that_is_left_out_is_named(broken: Any) -> None:
    folder, tensors, write = broken
    load(folder)
    for name in tensors:
        write({other: value for other, value in tensors.items() if other != name})
        with pytest.raises(ValueError, match=re.escape(repr(name))):
            load(folder)
        with pytest.raises(ValueError, match=re.escape(repr(name))):
            CrossEncoder(folder)


def test_vectors_need_every_tensor_of_the_body(broken: Any) -> None:
    folder, tensors, write = broken
    base = family_of(open_checkpoint(folder).config).base
    body = [name for name in tensors if name.startswith(base) and "pooler" not in name]
    assert len(body) > 20
    for name in body:
        write({other: value for other, value in tensors.items() if other != name})
        with pytest.raises(ValueError, match=re.escape(repr(name))):
            NativeEncoder.load(open_checkpoint(folder), Head("mean"))


def odd_shapes(value: torch.Tensor) -> Iterator[torch.Tensor]:
    yield torch.zeros(())
    yield value[None]
    yield value[:0]
    yield torch.cat([value, value[:1]])
    yield torch.zeros(*value.shape[:-1], value.shape[-1] + 1)
    if value.ndim == 2:
        yield value.flatten()
        if value.shape[0] != value.shape[1]:
            yield value.T.contiguous()
    else:
        yield value[:, None]


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.nightly)])
def test_a_tensor_of_another_shape_is_named(broken: Any, every: int) -> None:
    folder, tensors, write = broken
    for number, (name, value) in enumerate(tensors.items()):
        for odd in list(odd_shapes(value))[number % every :: every]:
            write(tensors | {name: odd.clone()})
            with pytest.raises(ValueError, match=re.escape(f"{name!r} has shape {tuple(odd.shape)}")):
                load(folder)


def test_tensors_that_are_no_floating_point_numbers_are_named(broken: Any) -> None:
    folder, tensors, write = broken
    # uint16 above all: it has the bits of bfloat16, and means other numbers.
    for dtype in (torch.uint16, torch.int64, torch.uint8, torch.float8_e4m3fn, torch.bool):
        for name in list(tensors)[:: max(1, len(tensors) // 9)]:
            write(tensors | {name: torch.zeros(tensors[name].shape, dtype=dtype)})
            with pytest.raises(ValueError, match=re.escape(f"{name!r} is stored as ")):
                load(folder)


def test_float64_is_read_as_float32(broken: Any) -> None:
    folder, tensors, write = broken
    expected = CrossEncoder(folder).predict([("owl", "cat")])
    write({name: value.double() for name, value in tensors.items()})
    np.testing.assert_array_equal(CrossEncoder(folder).predict([("owl", "cat")]), expected)
    write(
        {
            name: value.double() * (1e300 if "dense" in name or "classifier" in name else 1)
            for name, value in tensors.items()
        }
    )
    with pytest.raises(ValueError, match="NaN or infinite"):
        load(folder)


def test_biases_that_modernbert_rules_out_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("modernbert-mean"), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    names = {
        "attention_bias": "model.layers.0.attn.Wqkv.bias",
        "mlp_bias": "model.layers.0.mlp.Wi.bias",
        "norm_bias": "model.embeddings.norm.bias",
        "classifier_bias": "head.dense.bias",
    }
    for key, name in names.items():
        for value, message in ((False, f"{name!r}, which config.json rules out"), (1, f"{key} .* true or false")):
            (folder / "config.json").write_text(json.dumps(config | {key: value}))
            with pytest.raises(ValueError, match=message):
                load(folder)
    without = Path(shutil.copytree(tiny("modernbert"), tmp_path / "without"))
    config = json.loads((without / "config.json").read_text())
    for key, name in names.items():
        (without / "config.json").write_text(json.dumps(config | {key: True}))
        with pytest.raises(ValueError, match=f"{name!r}"):
            load(without)


@pytest.mark.parametrize(
    ("family", "name", "shape"),
    [
        ("electra", "electra.embeddings_project.weight", (40, 40)),
        ("modernbert", "model.layers.0.attn_norm.weight", (48,)),
        ("distilbert", "distilbert.embeddings.token_type_embeddings.weight", (2, 40)),
    ],
)
def test_modules_that_config_rules_out_are_refused(
    tmp_path: Path, family: str, name: str, shape: tuple[int, ...]
) -> None:
    folder = factory.save(tmp_path, family, change=lambda tensors: tensors | {name: torch.ones(shape)})
    for kind in (CrossEncoder, EmbeddingReranker):
        with pytest.raises(ValueError, match=f"{name!r}, which config.json rules out"):
            kind(folder)


HEAD_NAMES = (
    "classifier.norm.weight",
    "score.weight",
    "classifier2.bias",
    "head.gate.weight",
    "linear2.weight",
    "bert.classifier.weight",
    "qa_outputs.bias",
)


@pytest.mark.parametrize("name", HEAD_NAMES)
def test_a_heads_tensor_that_nothing_reads_is_an_error(tmp_path: Path, name: str) -> None:
    folder = factory.save(tmp_path, "bert", change=lambda tensors: tensors | {name: torch.ones(3)})
    with pytest.raises(ValueError, match=f"hold {name!r}.*not be the trained"):
        CrossEncoder(folder)
    if not name.startswith("bert."):
        with pytest.raises(ValueError, match=f"hold {name!r}.*not be the trained"):
            CrossEncoder(folder, engine="torch")


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_tensors_of_the_body_that_nothing_reads_are_named_once(
    tmp_path: Path, engine: str, caplog: pytest.LogCaptureFixture
) -> None:
    names = [f"bert.encoder.layer.0.adapter{i}.weight" for i in range(5)]
    extra = {name: torch.ones(1) for name in names}
    folder = factory.save(tmp_path, "bert", change=lambda tensors: tensors | extra)
    with caplog.at_level(logging.WARNING, "fastrerank"):
        CrossEncoder(folder, engine=engine)
    (record,) = [record for record in caplog.records if "nothing reads" in record.getMessage()]
    assert "'bert.encoder.layer.0.adapter0.weight'" in record.getMessage()
    assert "and 2 more" in record.getMessage()


HARMLESS = {
    "bert": ("bert.embeddings.position_ids", "cls.predictions.bias", "cls.seq_relationship.weight"),
    "roberta": ("roberta.embeddings.position_ids", "lm_head.dense.weight", "roberta.pooler.dense.weight"),
    "electra": ("discriminator_predictions.dense.weight", "generator_predictions.LayerNorm.bias"),
    "distilbert": ("vocab_transform.weight", "vocab_layer_norm.bias", "vocab_projector.bias"),
    "modernbert": ("decoder.bias", "model.layers.0.attn.rotary_emb.inv_freq"),
}


@pytest.mark.parametrize("family", HARMLESS)
def test_what_pre_training_leaves_is_harmless(
    tiny: Tiny, tmp_path: Path, family: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = CrossEncoder(tiny(family)).predict([("owl", "cat")])
    left = {name: torch.ones(2) for name in HARMLESS[family]}
    folder = factory.save(tmp_path, family, change=lambda tensors: tensors | left)
    with caplog.at_level(logging.WARNING, "fastrerank"):
        np.testing.assert_array_equal(CrossEncoder(folder).predict([("owl", "cat")]), expected)
        for kind in (LateInteractionReranker, EmbeddingReranker):  # the classifier's head is not read, and known
            assert np.isfinite(kind(folder).score("owl", ["cat"])).all()
    assert not [record for record in caplog.records if "nothing reads" in record.getMessage()]


def test_an_unknown_head_is_named_where_vectors_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = factory.save(tmp_path, "bert", change=lambda tensors: tensors | {"score.weight": torch.ones(1, 40)})
    with caplog.at_level(logging.WARNING, "fastrerank"):
        EmbeddingReranker(folder)
    assert any("nothing reads 'score.weight'" in record.getMessage() for record in caplog.records)


def test_the_number_of_labels_is_that_of_config(tiny: Tiny, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("bert", labels=3), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    for names in ({"0": "a"}, {"0": "a", "1": "b"}):
        (folder / "config.json").write_text(json.dumps(config | {"id2label": names}))
        with pytest.raises(ValueError, match=r"'classifier.weight' has shape \(3, 40\), expected \(\d, 40\)"):
            load(folder)


def save_modules(folder: Path, dense: dict[str, Any], tensors: Tensors, order: str = "TPD") -> Path:
    """A sentence-transformers model: bert, mean pooling, and a Dense module of these files."""
    factory.save(folder, "bert")
    types = {"T": ("Transformer", ""), "P": ("Pooling", "1_Pooling"), "D": ("Dense", "2_Dense")}
    (folder / "modules.json").write_text(
        json.dumps(
            [
                {
                    "idx": i,
                    "name": str(i),
                    "path": types[kind][1],
                    "type": f"sentence_transformers.models.{types[kind][0]}",
                }
                for i, kind in enumerate(order)
            ]
        )
    )
    for name in ("1_Pooling", "2_Dense"):
        (folder / name).mkdir()
    (folder / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    (folder / "2_Dense/config.json").write_text(json.dumps(dense))
    save_file(tensors, folder / "2_Dense/model.safetensors")
    return folder


DENSE: dict[str, Any] = {"in_features": 40, "out_features": 6, "bias": True}
DENSE_TENSORS = {"linear.weight": torch.ones(6, 40) / 40, "linear.bias": torch.ones(6)}
DENSE_WRONG: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"linear.bias": None}, "lack 'linear.bias'"),
    ({}, {"linear.weight": None}, "lack 'linear.weight'"),
    ({"bias": False}, {}, "'linear.bias', which config.json rules out"),
    ({"bias": "no"}, {}, "bias in config.json must be true or false"),
    ({"in_features": 41}, {}, r"'linear.weight' has shape \(6, 40\), expected \(6, 41\)"),
    ({"out_features": 0}, {}, "out_features in config.json must be an int from 1"),
    ({}, {"linear.weight": torch.ones(())}, r"'linear.weight' has shape \(\)"),
    ({}, {"linear.bias": torch.ones(6, 1)}, r"'linear.bias' has shape \(6, 1\)"),
    ({}, {"linear.weight": torch.ones(6, 40, dtype=torch.int64)}, "'linear.weight' is stored as I64"),
    ({}, {"residual.weight": torch.ones(6, 40)}, "'residual.weight', which a Dense module does not read"),
    ({"in_features": 30}, {"linear.weight": torch.ones(6, 30)}, "reads 30 values, gets 40"),
    ({}, {"linear.weight": torch.full((6, 40), torch.nan)}, "NaN or infinite"),
]


@pytest.mark.parametrize("engine", ["native", "torch"])
@pytest.mark.parametrize(("config", "changes", "message"), DENSE_WRONG)
def test_dense_modules_are_checked(
    tmp_path: Path, engine: str, config: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    tensors = {name: value for name, value in (DENSE_TENSORS | changes).items() if value is not None}
    folder = save_modules(tmp_path, DENSE | config, tensors)
    with pytest.raises(ValueError, match=message):
        EmbeddingReranker(folder, engine=engine)


def test_a_module_before_pooling_is_refused(tmp_path: Path) -> None:
    folder = save_modules(tmp_path, DENSE | {"activation_function": "torch.nn.Tanh"}, DENSE_TENSORS, "TDP")
    with pytest.raises(ValueError, match="Dense stands before Pooling"):
        EmbeddingReranker(folder)


def test_a_tensor_without_a_name_stands_for_none(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "nameless"
    shutil.copytree(tiny("bert"), folder)
    stored = load_file(folder / "model.safetensors")
    del stored["bert.embeddings.position_embeddings.weight"]
    save_file(stored | {"": torch.ones(3)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"the weights lack 'bert\.embeddings\.position_embeddings\.weight'"):
        CrossEncoder(folder)
