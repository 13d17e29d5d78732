"""Values of a config.json, each checked by name before anything is allocated from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["MAX_POSITIONS", "MAX_SIZE", "InvalidConfig", "check_sizes", "flag", "number", "shown", "whole"]

Config = Mapping[str, Any]

# Published models are far below these bounds; a larger value is from a damaged file or one that is made to fill memory.
MAX_SIZE = 1 << 24
MAX_POSITIONS = 1 << 24
MAX_LAYERS = 1 << 12
MAX_HEADS = 1 << 16

# The names of sizes in transformers' families. None of them may be 0 or negative.
_SIZES = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_decoder_layers"), MAX_LAYERS),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_heads", "n_head", "n_heads"), MAX_HEADS),
    **dict.fromkeys(
        (
            "hidden_size",
            "intermediate_size",
            "embedding_size",
            "d_model",
            "d_ff",
            "d_inner",
            "d_kv",
            "n_embd",
            "dim",
            "hidden_dim",
            "head_dim",
        ),
        MAX_SIZE,
    ),
    "vocab_size": MAX_SIZE,
    "max_position_embeddings": MAX_POSITIONS,
}
_MISSING: Any = object()


class InvalidConfig(ValueError):
    """A value in config.json that no model of its family can have, whatever engine runs it."""


def shown(value: Any) -> str:
    """Return a value as a message shows it: its repr, cut to 100 characters.

    Example:
        >>> shown("x" * 200)[-3:]
        '...'
    """
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def whole(config: Config, key: str, default: Any = _MISSING, *, low: int = 1, high: int = MAX_SIZE) -> int:
    """Return the int under `key`, or `default` where config.json lacks the key.

    Raises KeyError for a key that is missing without a default, `InvalidConfig` for a value that is no int (true, 4.0
    and "4" are none) or outside [low, high].

    Example:
        >>> whole({"hidden_size": 384}, "hidden_size")
        384
    """
    value = config[key] if default is _MISSING else config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidConfig(f"{key} in config.json must be an int from {low} to {high}, got {shown(value)}")
    return value


def number(config: Config, key: str, default: float, *, high: float) -> float:
    """Return the number under `key`, above 0 and at most `high`, or `default` where config.json lacks the key.

    Raises `InvalidConfig` for anything else: a bool, a string, NaN, infinity.

    Example:
        >>> number({}, "layer_norm_eps", 1e-12, high=1)
        1e-12
    """
    value = config.get(key, default)
    right = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not right or not math.isfinite(value) or not 0 < value <= high:
        raise InvalidConfig(f"{key} in config.json must be a number above 0 and at most {high:g}, got {shown(value)}")
    return float(value)


def flag(config: Config, key: str, default: bool) -> bool:
    """Return the bool under `key`, or `default` where config.json lacks the key. Raises `InvalidConfig` otherwise.

    Example:
        >>> flag({"attention_bias": True}, "attention_bias", False)
        True
    """
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise InvalidConfig(f"{key} in config.json must be true or false, got {shown(value)}")
    return value


def check_sizes(config: Config) -> None:
    """Check the sizes that config.json states under the names of transformers' families, in nested configs too.

    Lists (a size per layer) and null are left to the family. Raises `InvalidConfig` naming the first that is wrong.

    Example:
        >>> check_sizes({"hidden_size": 384, "text_config": {"num_hidden_layers": 6}})
    """
    for key, high in _SIZES.items():
        value = config.get(key)
        if value is not None and not isinstance(value, (list, dict)):
            whole(config, key, high=high)
    for value in config.values():
        if isinstance(value, dict) and "model_type" in value:
            check_sizes(value)
