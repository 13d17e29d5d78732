"""What `predict` takes as pairs: texts, arrays, columns, and chat messages as sentence-transformers has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastrerank.inputs.columns import pairs_of_columns
from fastrerank.inputs.tokenizer import check_texts

__all__ = ["as_conversation", "as_pairs", "is_message"]

_ROLES = (["query", "document"], ["system", "query", "document"])


def is_message(value: Any) -> bool:
    """Whether a value is one chat message: a dict with a role and a content."""
    return isinstance(value, Mapping) and "role" in value and "content" in value


def as_conversation(messages: Any, name: str) -> tuple[tuple[str, str], str]:
    """Return the (query, document) pair of a conversation, and its system text, "" without one.

    Args:
        messages: [{"role": "query", "content": ...}, {"role": "document", "content": ...}], with a "system" message
            before them or without. A content is a str, or [{"type": "text", "text": ...}].
        name: what it is called in messages of errors.

    Raises ValueError for other roles, TypeError for contents that are no text.
    """
    roles = [message["role"] if is_message(message) else None for message in messages]
    if roles not in _ROLES:
        raise ValueError(
            f"{name} must be a pair, or messages of the roles 'query' and 'document' in this order, behind a 'system' "
            f"message or none; got {roles}"
        )
    texts = [_text(message["content"], f"{name}[{i}]['content']") for i, message in enumerate(messages)]
    return (texts[-2], texts[-1]), texts[0] if len(texts) == 3 else ""


def as_pairs(inputs: Any) -> tuple[list[tuple[str, str]], list[str] | None, bool]:
    """Return (checked pairs, their system texts or None where none came as messages, whether it was one pair)."""
    inputs = pairs_of_columns(inputs, "inputs")
    if isinstance(inputs, np.ndarray):
        if inputs.ndim not in (1, 2):
            raise TypeError(f"inputs must be one pair (1-D) or pairs (2-D), got an array of {inputs.ndim} dimensions")
        inputs = inputs.tolist()
    elif isinstance(inputs, (str, bytes, dict, set)) or not hasattr(inputs, "__iter__"):
        raise TypeError(f"inputs must be a sequence of (query, document) pairs, got {type(inputs).__name__}")
    pairs = list(inputs)
    if pairs and is_message(pairs[0]):
        pair, system = as_conversation(pairs, "inputs")
        return [pair], [system], True
    if pairs and isinstance(pairs[0], str):
        return [_as_pair(pairs, "inputs")], None, True
    if not any(isinstance(pair, list) and pair and is_message(pair[0]) for pair in pairs):
        return [_as_pair(pair, f"inputs[{position}]") for position, pair in enumerate(pairs)], None, False
    found = []
    for position, pair in enumerate(pairs):
        name, messages = f"inputs[{position}]", isinstance(pair, list) and pair and is_message(pair[0])
        found.append(as_conversation(pair, name) if messages else (_as_pair(pair, name), ""))
    return [pair for pair, _ in found], [system for _, system in found], False


def _as_pair(pair: Any, name: str) -> tuple[str, str]:
    if not isinstance(pair, (list, tuple, np.ndarray)):
        raise TypeError(f"{name} must be a (query, document) pair, got {type(pair).__name__}")
    if len(pair) != 2:
        raise TypeError(f"{name} must be a (query, document) pair, got {len(pair)} items")
    query, text = check_texts(pair, name)
    return query, text


def _text(content: Any, name: str) -> str:
    if isinstance(content, (list, tuple)) and len(content) == 1 and isinstance(content[0], Mapping):
        content = content[0].get("text", content)
    if not isinstance(content, str):
        raise TypeError(f"{name} must be str or [{{'type': 'text', 'text': str}}], got {type(content).__name__}")
    return content
