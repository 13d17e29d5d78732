"""An option that a checkpoint cannot honour: the reason, and apart from it the advice for callers in Python."""

from __future__ import annotations

__all__ = ["OptionRefused"]


class OptionRefused(ValueError):
    """A call has an option that the checkpoint cannot honour, or lacks one that it needs.

    Args:
        option: its name, as in `fastrerank.rerankers.call.Options`.
        reason: what is wrong, in words that also fit the command line and the server.
        advice: what a caller in Python can do; the command line and the server replace it by their own.

    Example:
        >>> str(OptionRefused("label", "nothing tells which label ranks", "give label="))
        'nothing tells which label ranks: give label='
    """

    def __init__(self, option: str, reason: str, advice: str) -> None:
        super().__init__(option, reason, advice)
        self.option, self.reason, self.advice = option, reason, advice

    def __str__(self) -> str:
        return f"{self.reason}: {self.advice}"
