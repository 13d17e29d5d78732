"""bge-reranker-v2-minicpm-layerwise: a MiniCPM with a scoring head after each upper layer, run as far as one of them.

MiniCPM (arXiv 2404.06395) is a Llama whose embeddings, residual branches and attention scores have constant factors.
That is also what Granite is, which transformers has; so no code of the checkpoint is run.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers

from fastrerank.checkpoints.checkpoint import Checkpoint, untrained
from fastrerank.engine.torch.causal import CausalScorer, Probes
from fastrerank.engine.torch.loading import cast_parameters, quiet

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastrerank.engine.torch.model import Where

__all__ = ["load_layerwise"]

# What the checkpoint's authors recommend.
_RECOMMENDED = 28


def load_layerwise(
    checkpoint: Checkpoint, cutoff_layers: int | None, *, share_prefixes: bool = True, **where: Unpack[Where]
) -> CausalScorer:
    """Return a scorer of one label: the head after `cutoff_layers` layers. Weights of layers above are never read.

    Raises ValueError for a cutoff without a head and for weights that are missing.
    """
    config = checkpoint.config
    layers, start = int(config["num_hidden_layers"]), int(config.get("start_layer", 8))
    if config.get("head_type", "simple") != "simple" or not config.get("head_multi", True):
        raise ValueError(
            f"{checkpoint.path}: head_type must be 'simple' with head_multi, got {config.get('head_type')!r} and "
            f"{config.get('head_multi')!r}"
        )
    cutoff = min(_RECOMMENDED, layers) if cutoff_layers is None else cutoff_layers
    if isinstance(cutoff, bool) or not isinstance(cutoff, int) or not start <= cutoff <= layers:
        raise ValueError(f"cutoff_layers must be {start} to {layers}, got {cutoff_layers!r}")
    granite = transformers.GraniteConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        num_hidden_layers=cutoff,
        intermediate_size=config["intermediate_size"],
        num_attention_heads=config["num_attention_heads"],
        num_key_value_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        max_position_embeddings=config["max_position_embeddings"],
        rms_norm_eps=config["rms_norm_eps"],
        hidden_act=config.get("hidden_act", "silu"),
        rope_parameters={"rope_type": "default", "rope_theta": config.get("rope_theta", 10000.0)},
        embedding_multiplier=config["scale_emb"],
        residual_multiplier=config["scale_depth"] / math.sqrt(layers),
        attention_multiplier=(config["hidden_size"] // config["num_attention_heads"]) ** -0.5,
        pad_token_id=config.get("pad_token_id"),
        bos_token_id=config.get("bos_token_id"),
        eos_token_id=config.get("eos_token_id"),
    )
    kind = getattr(torch, where.get("dtype", "float32"))
    with quiet(), torch.device("meta"):
        backbone: Any = transformers.GraniteModel(granite)
    head_name = f"lm_head.{cutoff - start}.linear_head.weight"
    with checkpoint.tensors() as tensors:
        if head_name not in tensors:
            raise untrained(checkpoint, head_name)

        def read(name: str) -> torch.Tensor:
            if name not in tensors:
                raise ValueError(f"{checkpoint.path}: the weights lack {name!r}")
            value = torch.from_numpy(np.array(tensors[name].float32()))
            if not torch.isfinite(value).all():
                raise ValueError(f"{checkpoint.path}: weight of {name} is NaN or infinite: the checkpoint is damaged")
            return value

        state = {name: read(f"model.{name}").to(kind) for name in backbone.state_dict()}
        head = read(head_name)
        tensors.check()
    backbone.load_state_dict(state, assign=True)
    backbone.rotary_emb = type(backbone.rotary_emb)(granite)
    cast_parameters(backbone.eval(), kind)
    probes = Probes(granite, 1)
    with torch.inference_mode():
        expected = np.stack([_score(backbone, head, ids) for ids in probes.prompts])
    return CausalScorer.build(backbone, head, None, probes, expected, share_prefixes=share_prefixes, **where)


def _score(backbone: Any, head: torch.Tensor, ids: Any) -> Any:
    tensor = torch.from_numpy(ids)[None]
    hidden = backbone(tensor, attention_mask=torch.ones_like(tensor), use_cache=False)[0]
    return (hidden[0, -1].float() @ head.T).double().numpy()
