"""Pairs that come as chat messages, as sentence-transformers takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["as_conversation", "is_message"]

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


def _text(content: Any, name: str) -> str:
    if isinstance(content, (list, tuple)) and len(content) == 1 and isinstance(content[0], Mapping):
        content = content[0].get("text", content)
    if not isinstance(content, str):
        raise TypeError(f"{name} must be str or [{{'type': 'text', 'text': str}}], got {type(content).__name__}")
    return content
