"""Tiny random models of the families that the torch engine serves, and transformers on one document at a time."""

from __future__ import annotations

import inspect
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
import transformers

WINDOW = 8
_COMMON = {"hidden_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 50}
_DECODER = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 50,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
_POSITIONS = {"max_position_embeddings": tiny.MAX_LENGTH, "type_vocab_size": 2, "pad_token_id": 0}
_SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "albert": ("Albert", _COMMON | _POSITIONS | {"embedding_size": 16, "classifier_dropout_prob": 0.0}),
    "gte": ("Gte", _COMMON | {"hidden_size": 48, "max_position_embeddings": 512, "type_vocab_size": 1}),
    "nomic": ("NomicBert", _COMMON | {"hidden_size": 48, "max_position_embeddings": 512}),
    "eurobert": ("EuroBert", _DECODER | {"num_key_value_heads": 4, "clf_pooling": "mean"}),
    "llama": ("Llama", _DECODER),
    "llama-without-pad": ("Llama", _DECODER | {"pad_token_id": None}),
    "mistral": ("Mistral", _DECODER | {"sliding_window": WINDOW}),
    "qwen2": ("Qwen2", _DECODER | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": ("Qwen3", _DECODER),
    "gemma2": ("Gemma2", _DECODER | {"sliding_window": WINDOW, "query_pre_attn_scalar": 8}),
    "deberta": (
        "DebertaV2",
        _COMMON
        | {
            "max_position_embeddings": tiny.MAX_LENGTH,
            "relative_attention": True,
            "position_buckets": 16,
            "pos_att_type": ["p2c", "c2p"],
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "type_vocab_size": 0,
            "position_biased_input": False,
            "pooler_hidden_size": 40,
        },
    ),
    "mpnet": ("MPNet", _COMMON | {"max_position_embeddings": tiny.MAX_LENGTH + 2, "pad_token_id": 1}),
    "xlnet": ("XLNet", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 50, "pad_token_id": 0}),
    "mobilebert": (
        "MobileBert",
        _COMMON
        | _POSITIONS
        | {
            "embedding_size": 16,
            "intra_bottleneck_size": 16,
            "true_hidden_size": 16,
            "num_feedforward_networks": 2,
        },
    ),
    "t5": (
        "T5",
        {
            "d_model": 32,
            "d_kv": 8,
            "num_heads": 4,
            "d_ff": 50,
            "num_layers": 2,
            "pad_token_id": 0,
            "eos_token_id": 3,
            "decoder_start_token_id": 0,
        },
    ),
}
KNOWN = tuple(name for name, (kind, _) in _SETTINGS.items() if hasattr(transformers, f"{kind}Config"))
DECODERS = ("llama", "llama-without-pad", "mistral", "qwen2", "qwen3", "gemma2")
PADDED = ("deberta", "mpnet", "xlnet", "mobilebert", "t5")
UNPADDED = ("xlnet", "mobilebert")  # padding changes what they compute
PACKED = (*tiny.FAMILIES, *(name for name in KNOWN if name not in PADDED))
WINDOWED = ("modernbert", "mistral", "qwen2", "gemma2")

# One token, around the window, and the most that the models take.
LENGTHS = (1, 2, WINDOW, WINDOW + 1, 17, 3, 64, tiny.MAX_LENGTH, 33, 5)


def build(family: str, labels: int = 3, seed: int = 0) -> torch.nn.Module:
    """A float32 sequence classification model in evaluation mode."""
    if family in tiny.FAMILIES:
        return tiny.build(family, labels, seed)
    name, settings = _SETTINGS[family]
    config = getattr(transformers, f"{name}Config")(vocab_size=tiny.VOCABULARY, num_labels=labels, **settings)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{name}ForSequenceClassification")(config)
    tiny.randomised(model, seed)
    return model.eval()


def save(folder: Path, family: str, labels: int = 3, dtype: str = "float32") -> Path:
    build(family, labels).to(getattr(torch, dtype)).save_pretrained(folder)
    tiny.save_tokenizer(folder, "roberta" if family == "mpnet" else family)
    return folder


def documents(family: str, lengths: Any = LENGTHS, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random ids, type ids and offsets of documents of the given lengths."""
    random = np.random.default_rng(seed)
    ids = random.integers(5, tiny.VOCABULARY, sum(lengths)).astype(np.int32)
    offsets = np.cumsum([0, *lengths])
    if family == "t5":  # its classifier reads the one end-of-text token
        ids[offsets[1:] - 1] = 3
    types = random.integers(0, 2, len(ids)).astype(np.int32)
    if tiny.is_roberta(family) or family in ("gte", "mpnet", "xlnet", *DECODERS):
        types[:] = 0
    return ids, types, offsets


def run(model: Any, ids: np.ndarray, types: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """(logits (N, labels), token vectors (T, D) or None) in float64, every document alone."""
    body = getattr(model, model.base_model_prefix)
    place = next(model.parameters()).device
    typed = "token_type_ids" in inspect.signature(body.forward).parameters and hasattr(model.config, "type_vocab_size")
    logits, tokens = [], []
    for begin, end in pairwise(offsets):
        inputs = {"input_ids": torch.from_numpy(ids[None, begin:end]).long().to(place)}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if typed:
            inputs["token_type_ids"] = torch.from_numpy(types[None, begin:end]).long().to(place)
        with torch.inference_mode():
            logits.append(model(**inputs).logits.double().cpu().numpy())
            if not model.config.is_encoder_decoder:
                tokens.append(body(**inputs)[0][0].double().cpu().numpy())
    return np.concatenate(logits), np.concatenate(tokens) if tokens else None


@cache
def results(family: str, dtype: str = "float32") -> Any:
    """`run` of the tiny model of seed 0 on `documents(family)`."""
    return run(build(family).to(getattr(torch, dtype)), *documents(family))
