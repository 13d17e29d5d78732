"""The language models and prompts of the LLM comparison: published shapes, weights and tokenizer made here."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.harness import data, models
from bench.harness.data import Pairs

SEED = models.SEED
# Qwen3-Reranker's prompt, as its model card and the Qwen3-Embedding repository print it.
PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    "<Instruct>: Given a web search query, retrieve relevant passages that answer the query\n<Query>: "
)
MIDDLE = "\n<Document>: "
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
# How Qwen2 and Qwen3 split text before byte pairs are merged.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_MERGED = 30000
_SPECIALS = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "<think>": 24, "</think>": 25}
_PAD = "<|endoftext|>"
_LABELS = ("yes", "no")


@dataclass(frozen=True)
class Shape:
    """A decoder's configuration: `kind` is its model_type, `first_special` the id of its first special token."""

    name: str
    kind: str
    settings: dict[str, Any]
    first_special: int
    note: str

    def linear(self) -> int:
        """Equals the weights of one layer's products."""
        s = self.settings
        hidden, width = s["hidden_size"], s["head_dim"]
        heads, kv = s["num_attention_heads"] * width, s["num_key_value_heads"] * width
        return int(hidden * (2 * heads + 2 * kv) + 3 * hidden * s["intermediate_size"])

    def flop(self, lengths: NDArray[np.int64], rows: int) -> float:
        """Equals 2 x the multiply-accumulates of all layers on prompts of these lengths, and `rows` of the head.

        Only keys that causal attention sees count; padding, element-wise operations and the softmax do not. The head
        is at one position per prompt.

        Examples
        --------
        >>> round(SHAPES["qwen3-0.6b"].flop(np.array([100, 100]), 2) / 1e9)
        178
        """
        s, sizes = self.settings, lengths.astype(np.float64)
        wide = s["num_attention_heads"] * s["head_dim"]
        layer = float(sizes.sum()) * self.linear() + 2 * wide * float((sizes * (sizes + 1) / 2).sum())
        return 2 * (s["num_hidden_layers"] * layer + len(sizes) * rows * s["hidden_size"])

    def shared_flop(self, groups: Sequence[tuple[int, NDArray[np.int64]]]) -> float:
        """Equals the same where prefixes pass once and the last layer's keys and values alone are for all tokens.

        `groups`: (tokens of the prefix, whole lengths of its prompts); two rows of the head.
        """
        s = self.settings
        hidden, wide = s["hidden_size"], s["num_attention_heads"] * s["head_dim"]
        keys = 2 * hidden * s["num_key_value_heads"] * s["head_dim"]
        total = 0.0
        for prefix, lengths in groups:
            own = lengths.astype(np.float64) - prefix
            tokens = prefix + float(own.sum())
            pairs = prefix * (prefix + 1) / 2 + float((prefix * own + own * (own + 1) / 2).sum())
            whole = tokens * self.linear() + 2 * wide * pairs
            last = tokens * keys + len(lengths) * (self.linear() - keys) + 2 * wide * float(lengths.sum())
            total += (s["num_hidden_layers"] - 1) * whole + last + len(lengths) * 2 * hidden
        return 2 * total


def _qwen3(name: str, note: str, **settings: int) -> Shape:
    given = {
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 40960,
        "head_dim": 128,
        "num_key_value_heads": 8,
    }
    return Shape(name, "qwen3", given | settings, 151643, note)


_WEIGHTS = "random weights"
CPU_SHAPE = _qwen3(
    "qwen3-8x512",
    f"a Qwen3 shape of 8 layers, 512 wide, 8 heads, 4 key-value heads, tied embeddings: {_WEIGHTS}",
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
)
SHAPES = {
    shape.name: shape
    for shape in (
        _qwen3(
            "qwen3-0.6b",
            f"Qwen3-0.6B's shape (28 layers, 1024 wide): {_WEIGHTS}",
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=28,
            num_attention_heads=16,
        ),
        _qwen3(
            "qwen3-4b",
            f"Qwen3-4B's shape (36 layers, 2560 wide): {_WEIGHTS}",
            hidden_size=2560,
            intermediate_size=9728,
            num_hidden_layers=36,
            num_attention_heads=32,
        ),
        Shape(
            "llama-3.1-8b",
            "llama",
            {
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "vocab_size": 128256,
                "tie_word_embeddings": False,
                "rms_norm_eps": 1e-5,
                "max_position_embeddings": 131072,
                "rope_theta": 5e5,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
            },
            128000,
            f"Llama-3.1-8B's shape (32 layers, 4096 wide): {_WEIGHTS}, Qwen3-Reranker's prompt",
        ),
    )
}
_TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def tiny(shape: Shape) -> Shape:
    """Equals a model of the same family that runs in milliseconds."""
    settings = shape.settings | _TINY | {"vocab_size": _MERGED + 32}
    return Shape(f"{shape.name}-tiny", shape.kind, settings, _MERGED, f"a tiny model in the place of {shape.note}")


@dataclass(frozen=True)
class LlmModel:
    """A checkpoint folder, its shape and the ids of "yes" and "no"; `note` says what of it is not real."""

    shape: Shape
    path: Path
    labels: tuple[int, int]
    note: str

    def tokenizer(self) -> Any:
        """Equals the folder's `tokenizers.Tokenizer`."""
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self.path / "tokenizer.json"))

    def prompts(self, pairs: Pairs, tokenizer: Any) -> Pairs:
        """Equals the same query and documents with the ids of Qwen3-Reranker's prompts; never padded nor cut."""
        texts = [f"{PREFIX}{pairs.query}{MIDDLE}{document}{SUFFIX}" for document in pairs.documents]
        ids = [np.array(encoding.ids, np.int32) for encoding in tokenizer.encode_batch(texts)]
        return Pairs(pairs.query, pairs.documents, ids, [np.zeros_like(row) for row in ids])

    def workload(self, folder: Path, documents: int) -> Pairs:
        """Equals the prompts of the query that `bench.harness.data` chooses, with so many of its passages."""
        tokenizer = data.PairTokenizer(self.path)
        chosen = data.load(folder, tokenizer, documents=documents, length="natural").pairs
        return self.prompts(chosen, self.tokenizer())


def random_model(shape: Shape, device: str, dtype: str) -> Any:
    """Equals a transformers model whose matrices are drawn on `device`: N(0, 1 / columns), the same for a seed."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(shape.kind, **shape.settings)
    kind = getattr(torch, dtype)
    with torch.device(device), torch.no_grad():
        model = AutoModelForCausalLM.from_config(config, dtype=kind, attn_implementation="sdpa").eval()
        generator = torch.Generator(device).manual_seed(SEED)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
            if parameter.ndim == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
    return model


def build(shape: Shape, cache: Path, texts: Path, dtype: str, *, weights: bool = True) -> LlmModel:
    """Equals the shape as a sentence-transformers folder under `cache`, written when it is not there.

    `texts`: the folder with the DL19 file, on which the tokenizer is trained. `dtype`: what weights are stored in.
    Without `weights` the folder's model is a tiny one: it serves for its tokenizer, template and module files.
    """
    name = f"llm-{shape.name}-{SEED}-{texts.name}-{dtype if weights else 'no-weights'}"
    folder = cache / name / "checkpoint"
    if not (folder / "config.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as draft:  # complete or absent, also when two runs race
            work = Path(draft) / "checkpoint"
            model = random_model(shape if weights else tiny(shape), "cpu", "float32").to(_torch_dtype(dtype))
            model.save_pretrained(work)
            _write_tokenizer(work, texts / data.DL19, shape.first_special)
            _write_modules(work)
            work.rename(folder)
    stored = json.loads((folder / "1_LogitScore" / "config.json").read_text())
    note = (
        f"{shape.note}; a byte-level BPE tokenizer trained on the benchmark's own text, whose ids fall in the first "
        f"{_MERGED} of {shape.settings['vocab_size']} rows; labels yes and no"
    )
    return LlmModel(shape, folder, (stored["true_token_id"], stored["false_token_id"]), note)


def _torch_dtype(name: str) -> Any:
    import torch

    return getattr(torch, name)


def train_tokenizer(texts: Path, specials: Mapping[str, int], first_special: int, wording: Sequence[str] = ()) -> Any:
    """Equals a `tokenizers.Tokenizer`: byte-level BPE of a file like DL19's, and of `wording`, which is made common.

    `specials`: special tokens and their places behind `first_special`.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer

    with gzip.open(texts, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    corpus = [text for row in rows for text in (row["query"], *(one["text"] for one in row["candidates"]))]
    corpus += [*wording] * 100
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=_MERGED, min_frequency=2, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    stored = json.loads(tokenizer.to_str())
    stored["model"]["vocab"] |= {token: first_special + place for token, place in specials.items()}
    tokenizer = Tokenizer.from_str(json.dumps(stored))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return tokenizer


def _write_tokenizer(folder: Path, texts: Path, first_special: int) -> None:
    # Qwen's tokenizer has the prompt's words, bare labels and pairs of line ends as single tokens.
    wording = (PREFIX, MIDDLE, "assistant", "\n\n", *_LABELS)
    tokenizer = train_tokenizer(texts, _SPECIALS, first_special, wording)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = ["input_ids", "attention_mask"]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 8192, "model_input_names": names}
    special = {"pad_token": _PAD, "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | special))
    ids = [tokenizer.encode(label).ids for label in _LABELS]
    if any(len(one) != 1 for one in ids):
        raise RuntimeError(f"labels are not single tokens of the tokenizer made here: {ids}")
    head = {"true_token_id": ids[0][0], "false_token_id": ids[1][0], "module_input_name": "causal_logits"}
    (folder / "1_LogitScore").mkdir()
    (folder / "1_LogitScore" / "config.json").write_text(json.dumps(head))


def _write_modules(folder: Path) -> None:
    """What sentence-transformers reads: the two modules, and a chat template that renders the prompt from a pair."""
    package = "sentence_transformers"
    kinds = (
        ("", f"{package}.base.modules.transformer.Transformer"),
        ("1_LogitScore", f"{package}.cross_encoder.modules.logit_score.LogitScore"),
    )
    modules = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(modules))
    logits = {"method": "forward", "method_output_name": "logits"}
    config = {
        "transformer_task": "text-generation",
        "module_output_name": "causal_logits",
        "modality_config": {"text": logits, "message": logits | {"format": "flat"}},
    }
    (folder / "sentence_bert_config.json").write_text(json.dumps(config))
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"model_type": "CrossEncoder"}))
    role = '(messages | selectattr("role", "eq", "{}") | map(attribute="content") | first)'
    parts = [json.dumps(PREFIX), role.format("query"), json.dumps(MIDDLE), role.format("document"), json.dumps(SUFFIX)]
    (folder / "chat_template.jinja").write_text("{{ " + " + ".join(parts) + " }}")
