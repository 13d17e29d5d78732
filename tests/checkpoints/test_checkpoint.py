"""Checkpoint folders: layouts, weight files, saved activations, limits, hub failures, damaged files."""

from __future__ import annotations

import gc
import json
import mmap
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from safetensors.numpy import save_file

from fastrerank.checkpoints.checkpoint import Tensors, max_length_of, open_checkpoint, position_limit

CONFIG = {"model_type": "bert", "max_position_embeddings": 512}
WEIGHTS: dict[str, np.ndarray[Any, Any]] = {
    "embeddings": np.arange(12, dtype=np.float32).reshape(3, 4),
    "half": np.array([1.5, -2.0], np.float16),
    "ids": np.array([[1, 2**40]], np.int64),
    "scalar": np.array(3.0, np.float32),
    "empty": np.zeros((0, 4), np.float32),
    "mask": np.array([True, False]),
}


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_raw_safetensors(path: Path, entries: dict[str, tuple[str, list[int], bytes]], pad: int = 0) -> None:
    """A safetensors file whose header is padded to a chosen length, so that values need not be aligned."""
    header, values = {}, b""
    for name, (dtype, shape, data) in entries.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(values), len(values) + len(data)]}
        values += data
    text = json.dumps(header).encode() + b" " * pad
    path.write_bytes(len(text).to_bytes(8, "little") + text + values)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "config.json", CONFIG)
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    return tmp_path


def test_plain_folder(folder: Path) -> None:
    for model in (folder, str(folder)):
        checkpoint = open_checkpoint(model)
        assert checkpoint.path == checkpoint.transformer_path == folder
        assert (checkpoint.config, checkpoint.modules, checkpoint.st_config) == (CONFIG, [], {})
        assert checkpoint.max_seq_length == 512
        assert checkpoint.activation() is None


def test_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert open_checkpoint(f"~/{folder.name}").path == folder


def test_safetensors_are_read_only_views(folder: Path) -> None:
    with open_checkpoint(folder).tensors() as tensors:
        assert set(tensors) == set(WEIGHTS)
        assert len(tensors) == len(WEIGHTS)
        kept = tensors["embeddings"].float32()
        for name, expected in WEIGHTS.items():
            tensor = tensors[name]
            assert (tensor.name, tensor.shape, tensor.raw.dtype) == (name, expected.shape, expected.dtype)
            np.testing.assert_array_equal(tensor.raw, expected)
            np.testing.assert_array_equal(tensor.float32(), expected.astype(np.float32))
            assert tensor.float32().flags.c_contiguous
            assert tensor.float32().flags.aligned
            assert not tensor.raw.flags.writeable
        raw = tensors["embeddings"].raw
        assert np.shares_memory(raw, tensors["embeddings"].raw)
        # What is read is memory of its own, which no change of the file reaches.
        assert not np.shares_memory(kept, raw)
        np.testing.assert_array_equal(tensors["embeddings"].read(), raw)
        assert tensors["ids"].dtype == "I64"
        assert tensors["half"].dtype == "F16"
    with pytest.raises(ValueError, match="are closed"):
        tensors["embeddings"]
    del tensors
    gc.collect()
    np.testing.assert_array_equal(kept, WEIGHTS["embeddings"])
    np.testing.assert_array_equal(raw, WEIGHTS["embeddings"])


@pytest.mark.parametrize("pad", range(8))
def test_values_at_any_offset(tmp_path: Path, pad: int) -> None:
    values = np.array([1.25, -3.5, 1e-30], np.float32)
    upper = (values.view(np.uint32) >> 16).astype(np.uint16)
    entries = {
        "flag": ("BOOL", [1], b"\1"),
        "full": ("F32", [3], values.tobytes()),
        "brain": ("BF16", [3], upper.tobytes()),
    }
    write_raw_safetensors(tmp_path / "model.safetensors", entries, pad)
    with Tensors.open(tmp_path) as tensors:
        np.testing.assert_array_equal(tensors["full"].float32(), values)
        assert tensors["full"].float32().flags.aligned
        assert tensors["brain"].raw.dtype == np.uint16
        expected = (upper.astype(np.uint32) << 16).view(np.float32)
        np.testing.assert_array_equal(tensors["brain"].float32(), expected)


def test_unsupported_type_is_refused_when_read(tmp_path: Path) -> None:
    entries = {"tiny": ("F8_E4M3", [2], b"\1\2"), "full": ("F32", [1], b"\0" * 4)}
    write_raw_safetensors(tmp_path / "model.safetensors", entries)
    with Tensors.open(tmp_path) as tensors:
        assert tensors["tiny"].raw.tolist() == [1, 2]
        with pytest.raises(ValueError, match="tensor 'tiny' is stored as F8_E4M3; supported: F64, F32"):
            tensors["tiny"].float32()


def test_shards(tmp_path: Path) -> None:
    write(tmp_path / "config.json", CONFIG)
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": np.full(3, 2.0, np.float32)}, tmp_path / "model-00002-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    write(tmp_path / "model.safetensors.index.json", index)
    with open_checkpoint(tmp_path).tensors() as tensors:
        assert {name: tensor.raw.tolist() for name, tensor in tensors.items()} == {"a": [1, 1], "b": [2, 2, 2]}
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"model-00002-of-00002\.safetensors is named by the checkpoint's index"
    ):
        Tensors.open(tmp_path)


def test_the_index_of_shards_is_read_once_and_every_promise_of_it_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight_map = {}
    for i in range(30):
        name = f"model-{i:05}-of-00030.safetensors"
        save_file({f"{i}.a": np.ones(1, np.float32), f"{i}.b": np.ones(1, np.float32)}, tmp_path / name)
        weight_map |= {f"{i}.a": name, f"{i}.b": name}
    index, read, reads = tmp_path / "model.safetensors.index.json", Path.read_text, []
    write(index, {"weight_map": weight_map})
    monkeypatch.setattr(Path, "read_text", lambda path, **options: (reads.append(path), read(path, **options))[1])
    with Tensors.open(tmp_path) as tensors:
        assert set(tensors) == set(weight_map)
    assert reads == [index]
    write(index, {"weight_map": weight_map | {"more": "model-00017-of-00030.safetensors"}})
    with pytest.raises(ValueError, match=r"model-00017-of-00030\.safetensors: lacks the tensor 'more', which .*index"):
        Tensors.open(tmp_path)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"a": "../model.safetensors"}}, []])
def test_malformed_index(tmp_path: Path, index: Any) -> None:
    write(tmp_path / "model.safetensors.index.json", index)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json: "):
        Tensors.open(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 40, -1])
def test_truncated_safetensors(folder: Path, kept: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged or truncated safetensors file \(.+\)"):
        open_checkpoint(folder).tensors()


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="resident pages of a mapping are read from /proc")
def test_drop_releases_pages_and_keeps_values(tmp_path: Path) -> None:
    entries = {"before": ("U8", [3], b"abc"), "big": ("U8", [1 << 20], b"\7" * (1 << 20)), "after": ("U8", [1], b"z")}
    write_raw_safetensors(tmp_path / "model.safetensors", entries)

    def resident() -> int:
        lines = iter(Path("/proc/self/smaps").read_text().splitlines())
        sizes = (next(after for after in lines if after.startswith("Rss")) for line in lines if str(tmp_path) in line)
        return sum(int(line.split()[1]) for line in sizes) * 1024

    with Tensors.open(tmp_path) as tensors:
        raw = tensors["big"].raw
        assert raw.sum(dtype=np.int64) == 7 << 20
        read = resident()
        tensors.drop("big")
        assert read >= 1 << 20
        assert resident() <= read - (1 << 20) + 4 * mmap.PAGESIZE
        assert raw.sum(dtype=np.int64) == 7 << 20
        assert tensors["after"].raw.tobytes() == b"z"
        tensors.drop("before")
        with pytest.raises(KeyError):
            tensors.drop("missing")


def test_pytorch_pickle(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    values = torch.tensor([[1.5, -2.0], [0.25, 3.0]])
    state = {"full": values.T, "brain": values.bfloat16(), "half": values.half(), "ids": torch.tensor([3])}
    torch.save(state, tmp_path / "pytorch_model.bin")
    with Tensors.open(tmp_path) as tensors:
        assert [tensors[name].dtype for name in state] == ["F32", "BF16", "F16", "I64"]
        np.testing.assert_array_equal(tensors["full"].raw, values.T.numpy())
        for name in ("brain", "half"):
            np.testing.assert_array_equal(tensors[name].float32(), values.numpy())
        assert not tensors["full"].raw.flags.writeable
        tensors.drop("full")
    save_file({"only": np.ones(1, np.float32)}, tmp_path / "model.safetensors")
    assert list(Tensors.open(tmp_path)) == ["only"]


class Payload:
    def __reduce__(self) -> Any:
        return (os.mkdir, (os.environ["FASTRERANK_PAYLOAD"],))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickle_never_runs_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    target = tmp_path / "made by the payload"
    monkeypatch.setenv("FASTRERANK_PAYLOAD", str(target))
    file = tmp_path / "pytorch_model.bin"
    for content in (pickle.dumps(Payload()), b"", b"not a pickle"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"pytorch_model\.bin: not a readable PyTorch weight file"):
            Tensors.open(tmp_path)
    torch.save({"a": Payload()}, file)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: not a readable PyTorch weight file"):
        Tensors.open(tmp_path)
    assert not target.exists()


def test_pickle_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"pytorch_model\.bin is a PyTorch pickle.*install torch.*safetensors"):
        Tensors.open(tmp_path)


def test_no_weights(tmp_path: Path) -> None:
    write(tmp_path / "config.json", CONFIG)
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path} holds no weights: expected model\.safetensors"):
        open_checkpoint(tmp_path).tensors()


@pytest.mark.parametrize("sub_folder", ["", "0_Transformer"])
def test_sentence_transformers_layout(tmp_path: Path, sub_folder: str) -> None:
    entries = [
        {"idx": 0, "name": "0", "path": sub_folder, "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense.Dense"},
        {"idx": 3, "name": "3", "path": "3_Normalize", "type": "sentence_transformers.models.Normalize"},
    ]
    write(tmp_path / "modules.json", entries)
    write(tmp_path / "config_sentence_transformers.json", {"similarity_fn_name": "cosine"})
    write(tmp_path / sub_folder / "config.json", CONFIG)
    write(tmp_path / sub_folder / "sentence_bert_config.json", {"max_seq_length": 256})
    write(tmp_path / "1_Pooling/config.json", {"pooling_mode_mean_tokens": True})
    write(tmp_path / "2_Dense/config.json", {"in_features": 4, "out_features": 2})
    save_file({"embeddings": np.ones(1, np.float32)}, tmp_path / sub_folder / "model.safetensors")
    save_file({"linear.weight": np.ones((2, 4), np.float32)}, tmp_path / "2_Dense/model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.transformer_path == tmp_path / sub_folder
    assert checkpoint.path == tmp_path
    assert [module.type for module in checkpoint.modules] == ["Transformer", "Pooling", "Dense", "Normalize"]
    assert checkpoint.modules[1].config == {"pooling_mode_mean_tokens": True}
    assert checkpoint.modules[3].config == {}
    assert checkpoint.config == CONFIG
    assert checkpoint.max_seq_length == 256
    assert checkpoint.st_config == {"similarity_fn_name": "cosine"}
    assert list(checkpoint.tensors()) == ["embeddings"]
    assert checkpoint.modules[2].tensors()["linear.weight"].shape == (2, 4)


@pytest.mark.parametrize("content", [{"type": "T"}, [3], [{"type": "T"}], [{"type": "T", "path": "../up"}], '[{"ty'])
def test_malformed_modules(folder: Path, content: Any) -> None:
    (folder / "modules.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=r"modules\.json: "):
        open_checkpoint(folder)


@pytest.mark.parametrize("content", [b'{"model_type": ', b"[]", b"\xff\xfe\x00"])
def test_malformed_config(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json: (malformed JSON|expected a JSON object|not a UTF-8)"):
        open_checkpoint(folder)


def test_missing_config(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist: .* is not a Hugging Face checkpoint"):
        open_checkpoint(tmp_path)
    write(tmp_path / "adapter_config.json", {})
    with pytest.raises(FileNotFoundError, match=r"holds an adapter only: merge it"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("config", "st_config", "expected"),
    [
        ({}, {}, None),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, {}, "identity"),
        ({"sbert_ce_default_activation_function": "torch.nn.modules.activation.Sigmoid"}, {}, "sigmoid"),
        ({"sentence_transformers": {"version": "5.0.0"}, "sbert_ce_default_activation_function": None}, {}, None),
        ({"sentence_transformers": {"activation_fn": "torch.nn.ReLU"}}, {"activation_fn": "torch.nn.Tanh"}, "tanh"),
    ],
)
def test_saved_activation(folder: Path, config: Any, st_config: Any, expected: str | None) -> None:
    write(folder / "config.json", CONFIG | config)
    write(folder / "config_sentence_transformers.json", st_config)
    assert open_checkpoint(folder).activation() == expected


def test_foreign_activation_needs_trust(folder: Path) -> None:
    write(folder / "config.json", CONFIG | {"sentence_transformers": {"activation_fn": "evil.module.Thing"}})
    with pytest.raises(ValueError, match=r"'evil\.module\.Thing' is not part of torch.*trust_remote_code=True"):
        open_checkpoint(folder).activation()
    assert open_checkpoint(folder, trust_remote_code=True).activation() == "evil.module.Thing"


@pytest.mark.parametrize(
    ("config", "tokenizer_config", "sentence_config", "limit", "positions"),
    [
        ({"model_type": "bert", "max_position_embeddings": 512}, {}, {}, 512, 512),
        ({"model_type": "bert", "max_position_embeddings": 512}, {"model_max_length": 1e30}, {}, 512, 512),
        ({"model_type": "bert", "max_position_embeddings": 512}, {"model_max_length": 128}, {}, 128, 512),
        ({"model_type": "bert", "max_position_embeddings": 512}, {}, {"max_seq_length": 1024}, 512, 512),
        ({"model_type": "bert"}, {"model_max_length": 512}, {"max_seq_length": 256}, 256, None),
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, {}, {}, 512, 512),
        ({"model_type": "xlm-roberta", "max_position_embeddings": 514}, {"model_max_length": 514}, {}, 512, 512),
        ({"model_type": "modernbert", "max_position_embeddings": 8192}, {}, {"max_seq_length": None}, 8192, None),
        ({"model_type": "llama"}, {"model_max_length": 1e30}, {}, None, None),
    ],
)
def test_limits(
    tmp_path: Path, config: Any, tokenizer_config: Any, sentence_config: Any, limit: int | None, positions: int | None
) -> None:
    write(tmp_path / "tokenizer_config.json", tokenizer_config)
    write(tmp_path / "sentence_bert_config.json", sentence_config)
    assert max_length_of(tmp_path, config) == limit
    assert position_limit(config) == positions


def test_limit_of_older_sentence_transformers_file(folder: Path) -> None:
    write(folder / "sentence_roberta_config.json", {"max_seq_length": 100})
    assert open_checkpoint(folder).max_seq_length == 100


@pytest.mark.parametrize("model", ["./missing", "/missing/folder", "../a/b", "a/b/c", "missing/", "~/missing"])
def test_missing_folder(model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"the checkpoint folder .* does not exist; pass an existing folder"):
        open_checkpoint(model)


def test_argument_that_is_no_folder(folder: Path) -> None:
    with pytest.raises(NotADirectoryError, match="is a file"):
        open_checkpoint(folder / "config.json")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_checkpoint(folder / "missing")
    with pytest.raises(ValueError, match="got the empty string"):
        open_checkpoint("")
    with pytest.raises(TypeError, match=r"model must be a folder or a hub id .* got int"):
        open_checkpoint(3)  # type: ignore[arg-type]


class FakeHub:
    """Stands for huggingface_hub.snapshot_download over one repository's file list."""

    def __init__(self, cache: Path, files: list[str]) -> None:
        self.cache, self.files, self.calls = cache, files, []  # type: ignore[var-annotated]

    def __call__(self, repo_id: str, *, allow_patterns: list[str], ignore_patterns: list[str], **options: Any) -> str:
        self.calls.append((repo_id, options))
        names = huggingface_hub.utils.filter_repo_objects(
            self.files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        for name in names:
            path = self.cache / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}" if path.name != "modules.json" else json.dumps(MODULES))
        return str(self.cache)

    def fetched(self) -> list[str]:
        return sorted(str(path.relative_to(self.cache)) for path in self.cache.rglob("*") if path.is_file())


MODULES = [{"type": "s.Transformer", "path": ""}, {"type": "s.Dense", "path": "2_Dense"}]
COMMON = ["colbert_linear.pt", "config.json", "tokenizer.json", "vocab.txt"]
OTHERS = [
    "README.md",
    "onnx/model.onnx",
    "onnx/tokenizer.json",
    "openvino/openvino_model.bin",
    "tf_model.h5",
    "flax_model.msgpack",
    "code.py",
    "sparse_linear.pt",
]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (["model.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
        (["pytorch_model.bin"], ["pytorch_model.bin"]),
        (
            ["modules.json", "model.safetensors", "pytorch_model.bin", "2_Dense/model.safetensors"],
            ["2_Dense/model.safetensors", "model.safetensors", "modules.json"],
        ),
        (
            ["modules.json", "pytorch_model.bin", "2_Dense/pytorch_model.bin"],
            ["2_Dense/pytorch_model.bin", "modules.json", "pytorch_model.bin"],
        ),
    ],
)
def test_hub_fetches_only_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: list[str], expected: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    hub = FakeHub(tmp_path / "cache", COMMON + OTHERS + weights)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    checkpoint = open_checkpoint("owner/name", revision="v1", cache_folder=tmp_path, local_files_only=True, token="t")
    assert checkpoint.path == hub.cache
    assert hub.fetched() == sorted(COMMON + expected)
    options = {"revision": "v1", "cache_dir": str(tmp_path), "local_files_only": True, "token": "t"}
    assert all(call == ("owner/name", options) for call in hub.calls)


def test_hub_failure_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = (
        r"'owner/name' is not a local folder, and the Hugging Face hub did not provide it at revision 'v1': .+\. "
        r"Check the name and the connection .* HF_HUB_OFFLINE .* or pass the path of a downloaded folder\.$"
    )
    with pytest.raises(OSError, match=message) as caught:
        open_checkpoint("owner/name", revision="v1", cache_folder=tmp_path, local_files_only=True)
    assert "\n" not in str(caught.value)
    with pytest.raises(OSError, match=r"'a b' is not a local folder.*Repo id must use alphanumeric"):
        open_checkpoint("a b", cache_folder=tmp_path, local_files_only=True)


def test_opening_imports_no_framework(folder: Path) -> None:
    import subprocess

    code = (
        "import sys; from fastrerank.checkpoints.checkpoint import open_checkpoint; c = open_checkpoint(sys.argv[1]);"
        "early = {'safetensors', 'huggingface_hub', 'tokenizers'} & set(sys.modules);"
        "t = c.tensors(); sys.exit(str(early | {'torch', 'transformers'} & set(sys.modules) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert done.stderr.strip() == ""


@pytest.mark.parametrize("value", [{}, [512], "512", True])
@pytest.mark.parametrize(
    ("name", "key"), [("tokenizer_config.json", "model_max_length"), ("sentence_bert_config.json", "max_seq_length")]
)
def test_limits_that_are_no_numbers_are_refused(tmp_path: Path, name: str, key: str, value: Any) -> None:
    (tmp_path / name).write_text(json.dumps({key: value}))
    with pytest.raises(ValueError, match=rf"{name}: {key} must be a number of tokens, got"):
        max_length_of(tmp_path, {"model_type": "bert", "max_position_embeddings": 512})
