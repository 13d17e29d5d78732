"""What the native encoder needs to know of each model family: its numbers, its weights' names, its classification head.

A family is a function from config.json to a `Family`. Adding one means adding a function and its `model_type` names
to `FAMILIES`; the engine itself has no branch on a family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fastrerank.checkpoints.config_values import InvalidConfig, flag, number, shown, whole

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
    """A head step: activation(W x + b), weights under `name`; `bias` says whether there is a b."""

    name: str
    activation: str = "identity"
    bias: bool = True


@dataclass(frozen=True)
class HeadNorm:
    """A head step: layer norm, weights under `name`; `bias` says whether it has a beta."""

    name: str
    eps: float
    bias: bool = True


@dataclass(frozen=True)
class Family:
    """One checkpoint's architecture.

    `base` is the name that the body's weights carry inside a task model ("bert."); in a bare body they have none.
    `layer` holds, per slot of the encoder, the weight's name with "{}" for the layer's number, or a `Fused` part.
    `head` is the sequence classification head, whose weights never carry `base` unless `head_in_base` lists them.
    `attention_bias`, `mlp_bias` and `norm_bias` say which layers have biases: a tensor that they name is required, one
    that they rule out is refused. `ruled_out` are further modules that this config.json says are not there.
    `vocabulary` and `labels` are None where config.json does not state them.
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
    attention_bias: bool = True
    mlp_bias: bool = True
    norm_bias: bool = True
    ruled_out: tuple[str, ...] = ()
    vocabulary: int | None = None
    labels: int | None = None

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads


def _activation(config: Config, key: str, default: str = "gelu") -> str:
    name = config.get(key, default)
    if not isinstance(name, str):
        raise InvalidConfig(f"{key} in config.json must be the name of an activation, got {shown(name)}")
    if name not in _ACTIVATIONS:
        raise ValueError(
            f"{key} = {shown(name)} in config.json is not one that the native encoder computes: "
            f"{', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


def _refuse(config: Config, key: str, allowed: tuple[Any, ...]) -> None:
    if config.get(key, allowed[0]) not in allowed:
        raise ValueError(
            f"{key} = {shown(config[key])} in config.json is not supported by the native encoder "
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


# Rotary tables are as long as config.json says, with no tensor to compare: a bound of their own, 64 MiB at 64 columns.
_MAX_ROTARY_POSITIONS = 1 << 18


def _stated_labels(config: Config) -> int | None:
    """How many labels config.json states; None where it leaves that to transformers' default."""
    names = config.get("id2label")
    if names is not None and not isinstance(names, Mapping):
        raise InvalidConfig(f"id2label in config.json must be an object of label names, got {shown(names)}")
    if names:
        return len(names)
    return None if config.get("num_labels") is None else whole(config, "num_labels")


def _bert_like(config: Config, base: str, head: tuple[Dense | HeadNorm, ...], **changes: Any) -> Family:
    _refuse(config, "position_embedding_type", ("absolute", None))
    _refuse(config, "is_decoder", (False,))
    _refuse(config, "add_cross_attention", (False, None))
    settings: dict[str, Any] = {
        "model_type": config["model_type"],
        "base": base,
        "hidden": whole(config, "hidden_size"),
        "layers": whole(config, "num_hidden_layers"),
        "heads": whole(config, "num_attention_heads"),
        "intermediate": whole(config, "intermediate_size"),
        "positions": whole(config, "max_position_embeddings"),
        "types": whole(config, "type_vocab_size", 2),
        "eps": number(config, "layer_norm_eps", 1e-12, high=0.1),
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
    embedding = whole(config, "embedding_size", 128)
    projected = embedding != config["hidden_size"]
    return _bert_like(
        config,
        "electra.",
        head,
        embedding=embedding,
        projection="embeddings_project" if projected else None,
        ruled_out=() if projected else ("embeddings_project",),
    )


def _roberta(config: Config) -> Family:
    # Positions are numbered from padding_idx + 1, and a padding token inside a text takes position padding_idx.
    head = (Dense("classifier.dense", "tanh"), Dense("classifier.out_proj"))
    most = whole(config, "max_position_embeddings") - 2  # at least one position is left for a token
    pad = whole(config, "pad_token_id", 1, low=0, high=max(most, 0))
    return _bert_like(config, "roberta.", head, position_offset=pad + 1, pad_id=pad)


def _distilbert(config: Config) -> Family:
    prefix = "transformer.layer.{}."
    return Family(
        model_type="distilbert",
        base="distilbert.",
        hidden=whole(config, "dim"),
        layers=whole(config, "n_layers"),
        heads=whole(config, "n_heads"),
        intermediate=whole(config, "hidden_dim"),
        positions=whole(config, "max_position_embeddings"),
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
        ruled_out=("embeddings.token_type_embeddings",),
    )


def _modernbert(config: Config) -> Family:
    layers = whole(config, "num_hidden_layers")
    eps = number(config, "norm_eps", 1e-5, high=0.1)
    layer: dict[str, str | Fused] = {
        slot: Fused("layers.{}.attn.Wqkv", index, 3) for index, slot in enumerate(("q", "k", "v"))
    }
    layer |= {
        "o": "layers.{}.attn.Wo",
        "up": Fused("layers.{}.mlp.Wi", 0, 2),
        "gate": Fused("layers.{}.mlp.Wi", 1, 2),
        "down": "layers.{}.mlp.Wo",
    }
    norm_bias, head_bias = flag(config, "norm_bias", False), flag(config, "classifier_bias", False)
    head_activation = _activation(config, "classifier_activation")
    pooling = config.get("classifier_pooling", "cls")
    if pooling not in ("cls", "mean"):
        raise InvalidConfig(f"classifier_pooling in config.json must be 'cls' or 'mean', got {shown(pooling)}")
    return Family(
        model_type="modernbert",
        base="model.",
        hidden=whole(config, "hidden_size"),
        layers=layers,
        heads=whole(config, "num_attention_heads"),
        intermediate=whole(config, "intermediate_size"),
        positions=whole(config, "max_position_embeddings", high=_MAX_ROTARY_POSITIONS),
        eps=eps,
        activation=_activation(config, "hidden_activation"),
        word="embeddings.tok_embeddings.weight",
        embedding_norm="embeddings.norm",
        layer=layer,
        norms={"attention": "layers.{}.attn_norm", "output": "layers.{}.mlp_norm"},
        head=(
            Dense("head.dense", head_activation, head_bias),
            HeadNorm("head.norm", eps, norm_bias),
            Dense("classifier"),
        ),
        pre_norm=True,
        gated=True,
        final_norm="final_norm",
        first_norm=False,  # the embedding's norm already stands before layer 0
        rope_theta=_modernbert_theta(config),
        layer_types=_modernbert_layer_types(config, layers),
        window=whole(config, "local_attention", 128, low=2) // 2,
        pooling="first" if pooling == "cls" else "mean",
        attention_bias=flag(config, "attention_bias", False),
        mlp_bias=flag(config, "mlp_bias", False),
        norm_bias=norm_bias,
    )


def _modernbert_layer_types(config: Config, layers: int) -> tuple[str, ...]:
    """What each layer attends to: "full_attention" or "sliding_attention"."""
    kinds = config.get("layer_types")
    if kinds is None:
        every = whole(config, "global_attn_every_n_layers", 3)
        return tuple("sliding_attention" if i % every else "full_attention" for i in range(layers))
    if not isinstance(kinds, list) or len(kinds) != layers:
        count = f"{len(kinds)} entries" if isinstance(kinds, list) else shown(kinds)
        raise InvalidConfig(f"layer_types in config.json must list {layers} layers (num_hidden_layers), got {count}")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise InvalidConfig(
                f"layer_types in config.json must hold 'full_attention' or 'sliding_attention', got {shown(kind)}"
            )
    return tuple(kinds)


def _modernbert_theta(config: Config) -> dict[str, float]:
    """The base of the rotary frequencies for each kind of layer."""
    theta = {
        "full_attention": number(config, "global_rope_theta", 160_000.0, high=1e12),
        # releases before rope_parameters wrote null for "as in the global layers"
        "sliding_attention": number(config, "local_rope_theta", 10_000.0, high=1e12)
        if config.get("local_rope_theta", 0) is not None
        else number(config, "global_rope_theta", 160_000.0, high=1e12),
    }
    rope = _object(config, "rope_parameters")
    for kind in theta:
        parameters = _object(rope, kind)
        theta[kind] = number(parameters, "rope_theta", theta[kind], high=1e12)
        _check_rope_type(parameters)
    _check_rope_type(_object(config, "rope_scaling"))
    return theta


def _check_rope_type(parameters: Config) -> None:
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise ValueError(f"rope_type {shown(kind)} in config.json is not supported by the native encoder")


def _object(config: Config, key: str) -> Config:
    value = config.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InvalidConfig(f"{key} in config.json must be an object, got {shown(value)}")
    return value


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

    Every value is checked here, before anything is allocated from it. Raises `InvalidConfig` for a value that no model
    of the family can have, ValueError for a model_type outside `FAMILIES`, a missing entry or a variant that the native
    encoder does not compute.

    Example:
        >>> import json, pathlib
        >>> family_of(json.loads(pathlib.Path("config.json").read_text())).layers  # doctest: +SKIP
        6
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(
            f"model_type {shown(kind)} is not a family of the native CPU encoder; it runs {', '.join(FAMILIES)}"
        )
    try:
        family = FAMILIES[kind](config)
    except KeyError as error:
        raise ValueError(f"config.json of this {kind} checkpoint lacks {error.args[0]!r}") from None
    if family.hidden % family.heads:
        raise InvalidConfig(f"hidden size {family.hidden} in config.json is not a multiple of {family.heads} heads")
    if family.rope_theta and family.head_size % 2:
        raise InvalidConfig(
            f"hidden size {family.hidden} and {family.heads} heads in config.json make heads of {family.head_size} "
            "columns; rotary positions turn pairs of columns, so the number must be even"
        )
    vocabulary = None if config.get("vocab_size") is None else whole(config, "vocab_size")
    if vocabulary is not None and family.pad_id >= vocabulary:
        raise InvalidConfig(f"pad_token_id in config.json must be below vocab_size, {vocabulary}, got {family.pad_id}")
    return replace(family, vocabulary=vocabulary, labels=_stated_labels(config))
