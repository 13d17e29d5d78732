"""Values as text for digests on the disk. The form is fixed, unlike that of a repr, which is for people."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

__all__ = ["fingerprint"]


def fingerprint(value: Any) -> str:
    """The text of a value: a dataclass's name and fields, whatever its own repr leaves out; else `repr`.

    The form is fixed, as digests of it are kept: that of the repr that dataclasses get by default.

    Example:
        >>> from fastrerank.inputs.prompts import Message
        >>> fingerprint(Message("user", "{query}"))
        "Message(role='user', content='{query}', repeat=False)"
    """
    if not is_dataclass(value) or isinstance(value, type):
        return repr(value)
    given = ", ".join(f"{field.name}={getattr(value, field.name)!r}" for field in fields(value) if field.repr)
    return f"{type(value).__qualname__}({given})"
