"""Values of config.json that no model can have: one error that names them, before anything is allocated."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")
import tiny as factory

import fastrerank._cpu as _cpu
from fastrerank import CrossEncoder, ops
from fastrerank.checkpoints.checkpoint import open_checkpoint
from fastrerank.checkpoints.config_values import InvalidConfig, check_sizes
from fastrerank.engine.families import family_of

Tiny = Callable[..., Path]
NAN, HUGE = float("nan"), 10**30
SIZES = (0, -1, True, 2.0, "4", None, [3], {}, 10**9, HUGE)
SIZE_KEYS = {
    "distilbert": ("dim", "n_layers", "n_heads", "hidden_dim", "max_position_embeddings", "vocab_size"),
    "modernbert": (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "max_position_embeddings",
        "vocab_size",
    ),
    "electra-narrow": ("embedding_size",),
    "bert": (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "max_position_embeddings",
        "type_vocab_size",
        "vocab_size",
    ),
}
OTHERS: list[tuple[str, dict[str, Any], str]] = [
    *[("bert", {"layer_norm_eps": x}, "layer_norm_eps") for x in (NAN, float("inf"), 0, -1e-5, "1e-5", None, True, 1)],
    *[("modernbert", {"norm_eps": x}, "norm_eps") for x in (NAN, 0, "x")],
    *[("roberta", {"pad_token_id": x}, "pad_token_id") for x in (-2, -1, None, 1.0, True, "1", 10**9, 161, [1])],
    *[("bert", {"hidden_act": x}, "hidden_act") for x in (None, 3, ["gelu"], {})],
    *[("bert", {"id2label": x}, "id2label") for x in ([1], "a", 3)],
    *[
        ("modernbert", {"layer_types": x}, "layer_types")
        for x in (
            [],
            ["full_attention"],
            ["full_attention"] * 5,
            ["full_attention"] * 3 + ["linear"],
            "full_attention",
            4,
            [["full_attention"]] * 4,
            [None] * 4,
        )
    ],
    *[("modernbert", {"layer_types": None, "global_attn_every_n_layers": x}, "global_attn_") for x in (0, -1, 1.5)],
    *[("modernbert", {"local_attention": x}, "local_attention") for x in (-8, 0, 1, "8", None, HUGE)],
    *[
        ("modernbert", {"rope_parameters": {"full_attention": {"rope_theta": x}}}, "rope_theta")
        for x in (0, -1, NAN, "1", None, [1])
    ],
    *[("modernbert", {"rope_parameters": x}, "rope_parameters") for x in (3, [1], "x")],
    *[
        ("modernbert", {"rope_parameters": None, key: x}, key)
        for key in ("global_rope_theta", "local_rope_theta")
        for x in (0, -5.0, NAN, "x")
    ],
    *[("modernbert", {"classifier_pooling": x}, "classifier_pooling") for x in ("max", None, ["cls"], 3)],
    *[
        ("modernbert", {key: x}, key)
        for key in ("norm_bias", "attention_bias", "mlp_bias", "classifier_bias")
        for x in (None, 0, "false")
    ],
    ("modernbert", {"num_attention_heads": 16}, "heads of 3 columns"),
    ("bert", {"num_attention_heads": 7}, "not a multiple of 7 heads"),
]


def with_config(source: Path, folder: Path, changes: dict[str, Any]) -> Path:
    """The checkpoint with another config.json, its other files linked."""
    folder.mkdir()
    for file in source.iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file)
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize("family", SIZE_KEYS)
def test_sizes_that_no_model_has_are_named(tiny: Tiny, tmp_path: Path, family: str) -> None:
    for number, (key, value) in enumerate(itertools.product(SIZE_KEYS[family], SIZES)):
        if value is None and key == "vocab_size":
            continue  # not stated
        folder = with_config(tiny(family), tmp_path / str(number), {key: value})
        for engine in ("native", None):
            with pytest.raises(ValueError, match=f"{key}|embeddings|layer") as caught:
                CrossEncoder(folder, engine=engine)
            assert "\n" not in str(caught.value)
            assert len(str(caught.value)) < 500


@pytest.mark.parametrize(("family", "changes", "name"), OTHERS)
def test_other_values_that_no_model_has_are_named(
    tiny: Tiny, tmp_path: Path, family: str, changes: dict[str, Any], name: str
) -> None:
    folder = with_config(tiny(family), tmp_path / "model", changes)
    for engine in ("native", None, "torch"):
        with pytest.raises(ValueError, match=name):
            CrossEncoder(folder, engine=engine)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_position_embeddings": 10**7},
        {"vocab_size": 10**7},
        {"hidden_size": 10**6, "num_attention_heads": 10},
        {"intermediate_size": 10**7},
        {"type_vocab_size": 10**7},
        {"num_hidden_layers": 4000},
    ],
)
@pytest.mark.parametrize("engine", ["native", "torch"])
def test_sizes_that_the_file_does_not_have_allocate_nothing(
    tiny: Tiny, tmp_path: Path, changes: dict[str, Any], engine: str
) -> None:
    resource = pytest.importorskip("resource")
    folder = with_config(tiny("bert"), tmp_path / "model", changes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"config\.json"):
        CrossEncoder(folder, engine=engine)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0}}},
    ],
)
def test_scaled_rotary_positions_are_not_computed_as_plain_ones(
    tiny: Tiny, tmp_path: Path, changes: dict[str, Any]
) -> None:
    folder = with_config(tiny("modernbert"), tmp_path / "model", changes)
    with pytest.raises(ValueError, match=r"rope_type '(yarn|linear)' .* not supported"):
        CrossEncoder(folder, engine="native")


@pytest.mark.parametrize(
    ("changes", "local"),
    [
        ({}, 10_000.0),
        ({"local_rope_theta": 500.0}, 500.0),
        ({"local_rope_theta": None}, 80_000.0),
    ],
)
def test_modernbert_without_rope_parameters_has_the_references_bases(
    tiny: Tiny, changes: dict[str, Any], local: float
) -> None:
    config = dict(open_checkpoint(tiny("modernbert")).config)
    del config["rope_parameters"]
    family = family_of(config | {"global_rope_theta": 80_000.0} | changes)
    assert family.rope_theta == {"full_attention": 80_000.0, "sliding_attention": local}


def test_nested_sizes_are_checked_and_lists_are_left_to_the_family() -> None:
    check_sizes({"intermediate_size": [50, 60], "max_position_embeddings": None, "text_config": {"hidden_size": 3}})
    with pytest.raises(InvalidConfig, match="num_key_value_heads"):
        check_sizes({"text_config": {"model_type": "qwen3", "num_key_value_heads": 0}})


RIGHT: dict[str, Any] = {
    "hidden": 32,
    "layers": 2,
    "heads": 2,
    "head_dim": 16,
    "intermediate": 40,
    "embedding": 32,
    "vocabulary": 9,
    "positions": 12,
    "types": 2,
    "position_offset": 0,
    "pad_id": -1,
    "pre_norm": False,
    "gated": False,
    "activation": "gelu",
    "eps": 1e-5,
    "window": [-1, -1],
    "rope": [-1, -1],
    "attention_scale": 0.25,
    "precision": "float32",
    "precise_layers": 0,
}
NUMBERS = (0, 1, -1, 7, 16, 1 << 20, 2**31 - 1, -(2**31))


def run(config: dict[str, Any], random: np.random.Generator) -> np.ndarray:
    """An encoder of this config with weights of the sizes that it states, run on a few tokens."""
    encoder = _cpu.Encoder(config, ops.isa())
    hidden, columns, inner = config["hidden"], config["heads"] * config["head_dim"], config["intermediate"]
    if max(hidden, columns, inner, config["vocabulary"], config["positions"], config["layers"]) > 1 << 9:
        raise ValueError("accepted, but too large for a test to give it weights")

    def draw(*shape: int) -> np.ndarray:
        return random.normal(0, 0.1, shape).astype(np.float32)

    encoder.set_tables(
        draw(config["vocabulary"], config["embedding"]),
        draw(config["positions"], config["embedding"]),
        draw(config["types"], config["embedding"]) if config["types"] else None,
    )
    encoder.set_norm(-1, "embedding", np.ones(config["embedding"], np.float32), None)
    encoder.set_norm(-1, "final", np.ones(hidden, np.float32), None)
    if config["embedding"] != hidden:
        encoder.set_linear(-1, "projection", draw(hidden, config["embedding"]), None)
    encoder.add_rope(1e4, 1)
    shapes = {
        "q": (columns, hidden),
        "k": (columns, hidden),
        "v": (columns, hidden),
        "o": (hidden, columns),
        "up": (inner, hidden),
        "gate": (inner, hidden),
        "down": (hidden, inner),
    }
    for i in range(config["layers"]):
        for name, shape in shapes.items():
            encoder.set_linear(i, name, draw(*shape), draw(shape[0]))
        for name in ("attention", "output"):
            encoder.set_norm(i, name, np.ones(hidden, np.float32), None)
    ids = np.array([1, 0, 3, 1, 1], np.int32)
    return encoder.forward(ids, None, np.array([0, 2, 5]), "tokens", 1)


def test_the_constructor_in_cpp_takes_nothing_that_divides_by_zero_or_reads_beyond(random: np.random.Generator) -> None:
    assert np.isfinite(run(RIGHT, random)).all()
    tried = 0
    numbers = [key for key, value in RIGHT.items() if type(value) is int]
    cases: list[dict[str, Any]] = [{key: value} for key in numbers for value in NUMBERS]
    cases += [{key: value} for key in ("window", "rope") for value in ([], [0], [-1] * 3, [9, 9], [-9, -9], [0, 0])]
    cases += [{key: value} for key in ("eps", "attention_scale") for value in (NAN, float("inf"), -1.0, 0.0)]
    for _ in range(100):
        keys = random.choice(numbers, 3, replace=False)
        cases.append({str(key): int(random.choice(NUMBERS)) for key in keys})
    for changes in cases:
        try:
            values = run(RIGHT | changes, random)
        except ValueError:
            continue
        assert values.shape == (5, (RIGHT | changes)["hidden"])
        tried += 1
    assert tried > 20


def test_an_encoder_that_lacks_a_weight_does_not_run() -> None:
    ids, offsets = np.zeros(1, np.int32), np.array([0, 1])
    with pytest.raises(ValueError, match="the word table was not set"):
        _cpu.Encoder(RIGHT, ops.isa()).forward(ids, None, offsets, "first", 1)
    encoder = _cpu.Encoder(RIGHT, ops.isa())
    encoder.set_tables(np.zeros((9, 32), np.float32), None, None)
    encoder.set_norm(-1, "embedding", np.ones(32, np.float32), None)
    with pytest.raises(ValueError, match="a matrix of the attention of layer 0 was not set"):
        encoder.forward(ids, None, offsets, "first", 1)
    for layer in (-1, 2, 1 << 30):
        with pytest.raises(ValueError, match=f"layer {layer} is not one of 2"):
            encoder.set_linear(layer, "q", np.zeros((32, 32), np.float32), None)
    for theta, half in ((0.0, 1), (NAN, 1), (1e4, 0), (1e4, -3), (1e4, 9)):
        with pytest.raises(ValueError, match="rotary"):
            encoder.add_rope(theta, half)


@pytest.mark.parametrize("shape", [(1 << 31, 1), ((1 << 30) + 1, 1), (0, 32), (32, 0)])
def test_a_matrix_has_1_to_a_billion_rows_and_columns(shape: tuple[int, int]) -> None:
    matrix = np.lib.stride_tricks.as_strided(np.zeros(32, np.float32), shape, (0, 4), writeable=False)
    with pytest.raises(ValueError, match=r"^q must have 1 to 2\^30 rows and columns$"):
        _cpu.Encoder(RIGHT, ops.isa()).set_linear(0, "q", matrix, None)


def test_a_wrong_config_is_refused_before_weights_are_opened(tiny: Tiny, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("bert"), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 0}))
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"intermediate_size in config\.json must be an int from 1"):
        CrossEncoder(folder)
    assert config["max_position_embeddings"] == factory.MAX_LENGTH
