"""Names for reprs and messages: one short line for a model and what runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["describe", "hub_id", "model_name", "shortened"]

_LONGEST = 100


def shortened(text: str) -> str:
    """The text, or dots and its end where it has more than 100 characters.

    Example:
        >>> shortened("/models/bge")
        '/models/bge'
    """
    return text if len(text) <= _LONGEST else "..." + text[3 - _LONGEST :]


def hub_id(path: Path) -> str | None:
    """The hub id of a folder in the hub's cache; None for any other folder.

    Example:
        >>> hub_id(Path("/cache/models--BAAI--bge-reranker-v2-m3/snapshots/953dc6f"))
        'BAAI/bge-reranker-v2-m3'
    """
    if path.parent.name != "snapshots" or not path.parents[1].name.startswith("models--"):
        return None
    return "/".join(path.parents[1].name.split("--")[1:])


def model_name(path: Path) -> str:
    """The hub id of a folder in the hub's cache, else the folder.

    Example:
        >>> model_name(Path("/cache/models--BAAI--bge-reranker-v2-m3/snapshots/953dc6f"))
        'BAAI/bge-reranker-v2-m3'
    """
    return shortened(hub_id(path) or str(path))


def describe(value: Any) -> str:
    """One line for a reranker: its class, model, method, engine, precision and device, as far as it has them."""
    checkpoint = getattr(value, "checkpoint", None)
    parts = [] if checkpoint is None else [repr(model_name(checkpoint.path))]
    runs = getattr(value, "engine", None)
    if runs is None:
        runs = getattr(value, "scorer", None)
    known = {
        "method": getattr(value, "method", None),
        "engine": None if runs is None else type(runs).__name__,
        "dtype": getattr(value, "dtype", None),
        "device": getattr(value, "device", None),
    }
    parts += [f"{name}={plain!r}" for name, plain in known.items() if plain is not None]
    return f"{type(value).__name__}({', '.join(parts)})"
