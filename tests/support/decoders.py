"""Tiny random language models of many families on disk, and transformers' full logits one prompt at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

VOCABULARY = 120
WINDOW = 8
_BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 50,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _BASE),
    "llama-tied": ("Llama", _BASE | {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", _BASE | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": ("Qwen3", _BASE | {"head_dim": 16, "tie_word_embeddings": True}),
    "mistral": ("Mistral", _BASE | {"sliding_window": WINDOW}),
    "gemma": ("Gemma", _BASE | {"head_dim": 8}),
    "gemma2": (
        "Gemma2",
        _BASE
        | {
            "head_dim": 8,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 8,
            "final_logit_softcapping": 1.5,
            "attn_logit_softcapping": 2.0,
        },
    ),
    "gemma3": ("Gemma3Text", _BASE | {"head_dim": 8, "sliding_window": WINDOW, "query_pre_attn_scalar": 8}),
    "phi3": ("Phi3", _BASE),
    "granite": (
        "Granite",
        _BASE
        | {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.2,
            "logits_scaling": 2.5,
        },
    ),
    "cohere": ("Cohere", _BASE | {"logit_scale": 0.3}),
    "olmo2": ("Olmo2", _BASE),
    "smollm3": ("SmolLM3", _BASE),
    "gpt-neox": ("GPTNeoX", _BASE | {"intermediate_size": 64, "rotary_pct": 0.5}),
    "phi": ("Phi", _BASE | {"partial_rotary_factor": 0.5}),  # its head has a bias
    "gpt2": (
        "GPT2",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 512,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "opt": (
        "OPT",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "ffn_dim": 50,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            "word_embed_proj_dim": 32,
        },
    ),
    "bloom": ("Bloom", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
}
FAMILIES = tuple(_SETTINGS)
PADDED = ("bloom",)  # ALiBi: positions are in the scores
WHOLE = ("opt",)  # packed, but for its layers, which stand where they are not found


def build(family: str, seed: int = 0, **changes: Any) -> Any:
    """A float32 causal language model in evaluation mode, its weights large enough that logits spread."""
    name, settings = _SETTINGS[family]
    kind = getattr(transformers, f"{name.removesuffix('Text')}TextConfig" if name.endswith("Text") else f"{name}Config")
    config = kind(**(settings | changes))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    return randomise(model, seed)


def build_classifier(family: str, labels: int = 1, seed: int = 0) -> Any:
    """A float32 sequence classifier in evaluation mode."""
    name, settings = _SETTINGS[family]
    config = getattr(transformers, f"{name}Config")(**settings, num_labels=labels)
    config._attn_implementation = "eager"
    return randomise(getattr(transformers, f"{name}ForSequenceClassification")(config), seed)


def randomise(model: Any, seed: int) -> Any:
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=random)
            parameter.copy_(noise * (1.5 * parameter.shape[1] ** -0.5) if parameter.ndim == 2 else 1 + noise * 0.2)
    return model.eval()


def save(folder: Path, family: str, seed: int = 0, dtype: str = "float32", **changes: Any) -> Path:
    build(family, seed, **changes).to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def prompts(seed: int = 0, shared: int = 40, lengths: Any = (1, 3, WINDOW, 9, 33, 60)) -> list[np.ndarray]:
    """Prompts that begin alike, one of them twice, and two that begin otherwise."""
    random = np.random.default_rng(seed)
    prefix = random.integers(3, VOCABULARY, shared)
    made = [np.concatenate([prefix, random.integers(3, VOCABULARY, n)]) for n in lengths]
    made += [random.integers(3, VOCABULARY, n) for n in (1, 25)]
    return [*made, made[2].copy()]


def full_logits(model: Any, some: list[np.ndarray], labels: np.ndarray) -> np.ndarray:
    """float64 (N, K): the model's own logits at the last token of each prompt alone."""
    rows = []
    for ids in some:
        tensor = torch.from_numpy(ids)[None]
        with torch.inference_mode():
            logits = model(tensor, attention_mask=torch.ones_like(tensor)).logits
        rows.append((logits[0, -1] if logits.ndim == 3 else logits[0])[torch.from_numpy(labels)].double().numpy())
    return np.stack(rows)
