"""What a forward cost: the numbers that `last_usage` reports."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Cost"]


@dataclass(frozen=True)
class Cost:
    """Forwards, tokens that passed through the network, and how many of these were prefixes that others shared.

    Example:
        >>> Cost(1, 100, 20) + Cost(1, 50)
        Cost(forwards=2, tokens=150, prefix_tokens=20)
    """

    forwards: int = 0
    tokens: int = 0
    prefix_tokens: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.forwards + other.forwards, self.tokens + other.tokens, self.prefix_tokens + other.prefix_tokens
        )
