"""The keywords that `fastrerank.load` takes for a method, read from the classes."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from fastrerank.rerankers.registry import METHODS

__all__ = ["load_keywords", "other_keywords"]

# Parameters that take the checkpoint, and those that a method sets itself.
_NOT_OPTIONS = {"self", "model", "model_name_or_path", "count", "preset"}
_SHARED = "fastrerank.rerankers.attention", "AttentionReranker"  # behind the functions icr, qrhead and core


def load_keywords(method: str | None = None) -> list[str]:
    """Return the keywords of `fastrerank.load` for a method, or for any method, sorted.

    Keywords of other releases of sentence-transformers, which CrossEncoder takes too, are left out.

    Example:
        >>> "heads" in load_keywords("icr"), "heads" in load_keywords("embedding")
        (True, False)
    """
    names: set[str] = set()
    for known, entry in METHODS.items():
        if method in (None, known):
            found = entry.load()
            if not inspect.isclass(found):
                found = getattr(importlib.import_module(_SHARED[0]), _SHARED[1])
            names |= _keywords(found)
    return sorted(names - _NOT_OPTIONS)


def other_keywords(method: str) -> frozenset[str]:
    """Return the keywords of other releases of sentence-transformers that `fastrerank.load` takes for a method too.

    Example:
        >>> "default_activation_function" in other_keywords("cross-encoder"), len(other_keywords("icr"))
        (True, 0)
    """
    if method != "cross-encoder":
        return frozenset()
    from fastrerank.rerankers.compat import OTHER_KEYWORDS

    return OTHER_KEYWORDS


def _keywords(kind: type[Any]) -> set[str]:
    """Parameters of a class's constructor, and those of its bases while each passes further keywords on."""
    names: set[str] = set()
    for one in kind.__mro__:
        if "__init__" not in vars(one):
            continue
        parameters = inspect.signature(vars(one)["__init__"]).parameters.values()
        names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return names
