"""Limits of one call: how many tokens its texts may have, and at which end a document is cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["NO_LIMITS", "SIDES", "TextLimits", "TooLong"]

SIDES = ("right", "left")


class TooLong(ValueError):
    """A text does not fit, and the call said `truncate=False`.

    Attributes:
        tokens: tokens of the input; it may have more, as a long text is not tokenised to its end.
        limit: tokens that it may have. Both count in the error's `unit`, which may be words or characters.
    """

    def __init__(self, what: str, tokens: int, limit: int, unit: str = "tokens") -> None:
        super().__init__(
            f"{what} has at least {tokens} {unit}, the limit is {limit}, and truncate=False refuses to cut it: shorten "
            "the text or allow truncation"
        )
        self.tokens, self.limit = tokens, limit
        self._given = (what, tokens, limit, unit)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._given, self.__dict__  # by default unpickling would pass the message alone


@dataclass(frozen=True)
class TextLimits:
    """Limits of one call; the defaults change nothing.

    Attributes:
        max_length: tokens of a whole input (pair, prompt or single text), special tokens included; None for the
            reranker's own limit.
        max_tokens_per_doc, max_tokens_per_query: tokens of a document's or a query's own text; None for no limit.
        truncation_side: the end at which a document is cut, "right" or "left"; None for the checkpoint's.
        truncate: False raises `TooLong` where a text would be cut.

    Raises TypeError or ValueError naming the field that is out of its range.
    """

    max_length: int | None = None
    max_tokens_per_doc: int | None = None
    max_tokens_per_query: int | None = None
    truncation_side: str | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        for name in ("max_length", "max_tokens_per_doc", "max_tokens_per_query"):
            _check_count(name, getattr(self, name))
        if self.truncation_side is not None and self.truncation_side not in SIDES:
            raise ValueError(f"truncation_side must be 'right', 'left' or None, got {self.truncation_side!r}")
        if not isinstance(self.truncate, bool):
            raise TypeError(f"truncate must be True or False, got {type(self.truncate).__name__}")

    def cut_left(self, default: bool = False) -> bool:
        """Whether a document loses its beginning; `default` where the call does not say."""
        return default if self.truncation_side is None else self.truncation_side == "left"


def _check_count(name: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an int or None, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


NO_LIMITS = TextLimits()
