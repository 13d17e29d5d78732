"""What the native encoder needs to know of each model family: its numbers, its weights' names, its classification head.

A family is a function from config.json to a `Family`. Adding one means adding a function and its `model_type` names
to `FAMILIES`; the engine itself has no branch on a family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["FAMILIES", "Dense", "Family", "Fused", "HeadNorm", "family_of"]

Config = Mapping[str, Any]

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}


@dataclass(frozen=True)
class Fused:
    """Part `index` of `parts` equal row blocks of one stored matrix, such as the queries of a fused QKV."""

    name: str
    index: int
    parts: int


@dataclass(frozen=True)
class Dense:
    """A head step: activation(W x + b), weights under `name`."""

    name: str
    activation: str = "identity"


@dataclass(frozen=True)
class HeadNorm:
    """A head step: layer norm, weights under `name`."""

    name: str
    eps: float


@dataclass(frozen=True)
class Family:
    """One checkpoint's architecture.

    `base` is the name that the body's weights carry inside a task model ("bert."); in a bare body they have none.
    `layer` holds, per slot of the encoder, the weight's name with "{}" for the layer's number, or a `Fused` part.
    `head` is the sequence classification head, whose weights never carry `base` unless `head_in_base` lists them.
    """

    model_type: str
    base: str
    hidden: int
    layers: int
    heads: int
    intermediate: int
    positions: int
    eps: float
    activation: str
    word: str
    layer: Mapping[str, str | Fused]
    norms: Mapping[str, str]
    embedding_norm: str
    head: tuple[Dense | HeadNorm, ...]
    embedding: int = 0
    position: str | None = None
    type: str | None = None
    types: int = 0
    projection: str | None = None
    position_offset: int = 0
    pad_id: int = -1
    pre_norm: bool = False
    gated: bool = False
    final_norm: str | None = None
    first_norm: bool = True
    rope_theta: Mapping[str, float] = field(default_factory=dict)
    layer_types: tuple[str, ...] = ()
    window: int = -1
    pooling: str = "first"
    head_in_base: tuple[str, ...] = ()

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads


def _activation(config: Config, key: str, default: str = "gelu") -> str:
    name = config.get(key, default)
    if name not in _ACTIVATIONS:
        raise ValueError(
            f"{key} = {name!r} in config.json is not one that the native encoder computes: {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


def _refuse(config: Config, key: str, allowed: tuple[Any, ...]) -> None:
    if config.get(key, allowed[0]) not in allowed:
        raise ValueError(
            f"{key} = {config[key]!r} in config.json is not supported by the native encoder "
            f"(supported: {', '.join(map(repr, allowed))})"
        )


_BERT_LAYER = {
    "q": "encoder.layer.{}.attention.self.query",
    "k": "encoder.layer.{}.attention.self.key",
    "v": "encoder.layer.{}.attention.self.value",
    "o": "encoder.layer.{}.attention.output.dense",
    "up": "encoder.layer.{}.intermediate.dense",
    "down": "encoder.layer.{}.output.dense",
}
_BERT_NORMS = {
    "attention": "encoder.layer.{}.attention.output.LayerNorm",
    "output": "encoder.layer.{}.output.LayerNorm",
}


def _bert_like(config: Config, base: str, head: tuple[Dense | HeadNorm, ...], **changes: Any) -> Family:
    _refuse(config, "position_embedding_type", ("absolute", None))
    _refuse(config, "is_decoder", (False,))
    settings: dict[str, Any] = {
        "model_type": config["model_type"],
        "base": base,
        "hidden": config["hidden_size"],
        "layers": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "intermediate": config["intermediate_size"],
        "positions": config["max_position_embeddings"],
        "types": config.get("type_vocab_size", 2),
        "eps": config.get("layer_norm_eps", 1e-12),
        "activation": _activation(config, "hidden_act"),
        "word": "embeddings.word_embeddings.weight",
        "position": "embeddings.position_embeddings.weight",
        "type": "embeddings.token_type_embeddings.weight",
        "embedding_norm": "embeddings.LayerNorm",
        "layer": _BERT_LAYER,
        "norms": _BERT_NORMS,
        "head": head,
    }
    return Family(**(settings | changes))


def _bert(config: Config) -> Family:
    head = (Dense("pooler.dense", "tanh"), Dense("classifier"))
    return _bert_like(config, "bert.", head, head_in_base=("pooler.dense",))


def _electra(config: Config) -> Family:
    head = (Dense("classifier.dense", "gelu"), Dense("classifier.out_proj"))
    embedding = config.get("embedding_size", config["hidden_size"])
    projection = "embeddings_project" if embedding != config["hidden_size"] else None
    return _bert_like(config, "electra.", head, embedding=embedding, projection=projection)


def _roberta(config: Config) -> Family:
    # Positions are numbered from padding_idx + 1, and a padding token inside a text takes position padding_idx.
    pad = config.get("pad_token_id", 1)
    head = (Dense("classifier.dense", "tanh"), Dense("classifier.out_proj"))
    return _bert_like(config, "roberta.", head, position_offset=pad + 1, pad_id=pad)


def _distilbert(config: Config) -> Family:
    prefix = "transformer.layer.{}."
    return Family(
        model_type="distilbert",
        base="distilbert.",
        hidden=config["dim"],
        layers=config["n_layers"],
        heads=config["n_heads"],
        intermediate=config["hidden_dim"],
        positions=config["max_position_embeddings"],
        eps=1e-12,
        activation=_activation(config, "activation"),
        word="embeddings.word_embeddings.weight",
        position="embeddings.position_embeddings.weight",
        embedding_norm="embeddings.LayerNorm",
        layer={
            "q": prefix + "attention.q_lin",
            "k": prefix + "attention.k_lin",
            "v": prefix + "attention.v_lin",
            "o": prefix + "attention.out_lin",
            "up": prefix + "ffn.lin1",
            "down": prefix + "ffn.lin2",
        },
        norms={"attention": prefix + "sa_layer_norm", "output": prefix + "output_layer_norm"},
        head=(Dense("pre_classifier", "relu"), Dense("classifier")),
    )


def _modernbert(config: Config) -> Family:
    layers = config["num_hidden_layers"]
    every = config.get("global_attn_every_n_layers", 3)
    types = config.get("layer_types") or ["sliding_attention" if i % every else "full_attention" for i in range(layers)]
    rope = config.get("rope_parameters") or {}
    theta = {
        "full_attention": config.get("global_rope_theta", 160_000.0),
        "sliding_attention": config.get("local_rope_theta") or config.get("global_rope_theta", 10_000.0),
    }
    for kind in theta:
        parameters = rope.get(kind) or {}
        if parameters.get("rope_type", "default") != "default":
            raise ValueError(
                f"rope_type {parameters['rope_type']!r} in config.json is not supported by the native encoder"
            )
        theta[kind] = parameters.get("rope_theta", theta[kind])
    eps = config.get("norm_eps", 1e-5)
    layer: dict[str, str | Fused] = {
        slot: Fused("layers.{}.attn.Wqkv", index, 3) for index, slot in enumerate(("q", "k", "v"))
    }
    layer |= {
        "o": "layers.{}.attn.Wo",
        "up": Fused("layers.{}.mlp.Wi", 0, 2),
        "gate": Fused("layers.{}.mlp.Wi", 1, 2),
        "down": "layers.{}.mlp.Wo",
    }
    head_activation = _activation(config, "classifier_activation")
    return Family(
        model_type="modernbert",
        base="model.",
        hidden=config["hidden_size"],
        layers=layers,
        heads=config["num_attention_heads"],
        intermediate=config["intermediate_size"],
        positions=config["max_position_embeddings"],
        eps=eps,
        activation=_activation(config, "hidden_activation"),
        word="embeddings.tok_embeddings.weight",
        embedding_norm="embeddings.norm",
        layer=layer,
        norms={"attention": "layers.{}.attn_norm", "output": "layers.{}.mlp_norm"},
        head=(Dense("head.dense", head_activation), HeadNorm("head.norm", eps), Dense("classifier")),
        pre_norm=True,
        gated=True,
        final_norm="final_norm",
        first_norm=False,  # the embedding's norm already stands before layer 0
        rope_theta=theta,
        layer_types=tuple(types),
        window=config.get("local_attention", 128) // 2,
        pooling={"cls": "first", "mean": "mean"}[config.get("classifier_pooling", "cls")],
    )


FAMILIES: dict[str, Callable[[Config], Family]] = {
    "bert": _bert,
    "electra": _electra,
    "roberta": _roberta,
    "xlm-roberta": _roberta,
    "camembert": _roberta,
    "distilbert": _distilbert,
    "modernbert": _modernbert,
}


def family_of(config: Config) -> Family:
    """Return the `Family` that config.json describes.

    Raises ValueError for a model_type outside `FAMILIES`, a missing entry or a variant that the native encoder does not
    compute.

    Example:
        >>> import json, pathlib
        >>> family_of(json.loads(pathlib.Path("config.json").read_text())).layers  # doctest: +SKIP
        6
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(
            f"model_type {kind!r} is not a family of the native CPU encoder; it runs {', '.join(FAMILIES)}"
        )
    try:
        family = FAMILIES[kind](config)
    except KeyError as error:
        raise ValueError(f"config.json of this {kind} checkpoint lacks {error.args[0]!r}") from None
    if family.layers < 1:
        raise ValueError(
            f"config.json of this {kind} checkpoint has {family.layers} layers; there must be at least one"
        )
    if family.hidden % family.heads:
        raise ValueError(f"hidden size {family.hidden} in config.json is not a multiple of {family.heads} heads")
    return family
