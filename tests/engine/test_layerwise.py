"""Layerwise MiniCPM rerankers against MiniCPM written out in float64."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")
import decoders
import torch
from safetensors.torch import load_file, save_file

from fastrerank.checkpoints.checkpoint import open_checkpoint
from fastrerank.engine.torch.layerwise import load_layerwise

LAYERS, START, HEADS, KEY_HEADS, WIDTH, INNER = 6, 2, 4, 2, 32, 50
CONFIG = {
    "architectures": ["LayerWiseMiniCPMForCausalLM"],
    "model_type": "minicpm",
    "vocab_size": decoders.VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_HEADS,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "scale_emb": 12,
    "scale_depth": 1.4,
    "dim_model_base": 16,
    "head_type": "simple",
    "head_multi": True,
    "start_layer": START,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPTIONS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "num_threads": 1, "memory_limit": None}


def save(folder: Path, vocabulary: int = decoders.VOCABULARY) -> Path:
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        noise = torch.randn(shape, generator=random)
        return noise * shape[1] ** -0.5 if len(shape) == 2 else 1 + 0.2 * noise

    size = WIDTH // HEADS
    tensors = {"model.embed_tokens.weight": draw(vocabulary, WIDTH), "model.norm.weight": draw(WIDTH)}
    for i in range(LAYERS):
        shapes = {
            "self_attn.q_proj": (WIDTH, WIDTH),
            "self_attn.k_proj": (KEY_HEADS * size, WIDTH),
            "self_attn.v_proj": (KEY_HEADS * size, WIDTH),
            "self_attn.o_proj": (WIDTH, WIDTH),
            "mlp.gate_proj": (INNER, WIDTH),
            "mlp.up_proj": (INNER, WIDTH),
            "mlp.down_proj": (WIDTH, INNER),
            "input_layernorm": (WIDTH,),
            "post_attention_layernorm": (WIDTH,),
        }
        tensors |= {f"model.layers.{i}.{name}.weight": draw(*shape) for name, shape in shapes.items()}
    tensors |= {f"lm_head.{i}.linear_head.weight": draw(1, WIDTH) for i in range(LAYERS - START + 1)}
    (folder / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": vocabulary}))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def score(tensors: dict[str, torch.Tensor], ids: np.ndarray, cutoff: int) -> float:
    """MiniCPM as its authors define it, with the head after `cutoff` layers, on one prompt."""
    weight = {name: value.double() for name, value in tensors.items()}
    size, tokens = WIDTH // HEADS, len(ids)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight[name]

    angles = torch.arange(tokens)[:, None] * 10000.0 ** (-torch.arange(0, size, 2).double() / size)
    cos, sin = (torch.cat([f(angles)] * 2, -1)[:, None] for f in (torch.cos, torch.sin))

    def rotate(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    x = 12 * weight["model.embed_tokens.weight"][torch.from_numpy(ids)]
    branch = 1.4 / math.sqrt(LAYERS)
    for i in range(cutoff):
        layer = f"model.layers.{i}."

        def linear(y: torch.Tensor, name: str, layer: str = layer) -> torch.Tensor:
            return y @ weight[f"{layer}{name}.weight"].T

        y = norm(x, f"{layer}input_layernorm.weight")
        q, k, v = (linear(y, f"self_attn.{n}_proj").view(tokens, -1, size) for n in "qkv")
        k, v = (z.repeat_interleave(HEADS // KEY_HEADS, 1) for z in (rotate(k), v))
        scores = torch.einsum("ihd,jhd->hij", rotate(q), k) / math.sqrt(size)
        scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -math.inf)
        mixed = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).reshape(tokens, WIDTH)
        x = x + branch * linear(mixed, "self_attn.o_proj")
        y = norm(x, f"{layer}post_attention_layernorm.weight")
        gate = torch.nn.functional.silu(linear(y, "mlp.gate_proj"))
        x = x + branch * linear(gate * linear(y, "mlp.up_proj"), "mlp.down_proj")
    last = norm(x, "model.norm.weight")[-1]
    return float(last @ weight[f"lm_head.{cutoff - START}.linear_head.weight"][0])


@pytest.mark.parametrize("cutoff", [2, 4, 6])
def test_scores_equal_the_definition(cutoff: int, tmp_path: Path) -> None:
    tensors = load_file(save(tmp_path) / "model.safetensors")
    prompts = decoders.prompts()
    engine = load_layerwise(open_checkpoint(tmp_path), cutoff, **OPTIONS)
    ours, cost = engine.label_logits(prompts, np.zeros(1, np.int64))
    expected = np.array([score(tensors, ids, cutoff) for ids in prompts])
    assert np.abs(ours[:, 0] - expected).max() <= 2e-5 * np.abs(expected).max()
    assert cost.prefix_tokens == 40
    assert len(engine.model.runner.backbone.layers) == cutoff


def test_layers_above_the_cutoff_need_not_be_there(tmp_path: Path) -> None:
    tensors = load_file(save(tmp_path) / "model.safetensors")
    whole, _ = load_layerwise(open_checkpoint(tmp_path), 3, **OPTIONS).label_logits(decoders.prompts(), np.array([0]))
    kept = {name: value for name, value in tensors.items() if not name.startswith(("model.layers.3", "model.layers.5"))}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    less, _ = load_layerwise(open_checkpoint(tmp_path), 3, **OPTIONS).label_logits(decoders.prompts(), np.array([0]))
    assert np.array_equal(whole, less)
    with pytest.raises(ValueError, match=r"lack 'layers.3|lack 'model.layers.3"):
        load_layerwise(open_checkpoint(tmp_path), 4, **OPTIONS)


@pytest.mark.parametrize("cutoff", [1, 7, "4", True])
def test_a_cutoff_without_a_head_is_refused(cutoff: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cutoff_layers must be 2 to 6"):
        load_layerwise(open_checkpoint(save(tmp_path)), cutoff, **OPTIONS)
