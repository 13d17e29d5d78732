"""What a checkpoint cannot do of a call, told apart from the advice that only fits calls from Python."""

from __future__ import annotations

__all__ = ["OptionRefused"]


class OptionRefused(ValueError):
    """An option of a call that a checkpoint cannot honour, or lacks.

    Args:
        option: its name, of `fastrerank.rerankers.call.Options`.
        reason: what is wrong, for every way to the model.
        advice: what a caller in Python can do. The command line and the server put their own in its place.

    Example:
        >>> str(OptionRefused("label", "nothing tells which label ranks", "give label="))
        'nothing tells which label ranks: give label='
    """

    def __init__(self, option: str, reason: str, advice: str) -> None:
        super().__init__(option, reason, advice)
        self.option, self.reason, self.advice = option, reason, advice

    def __str__(self) -> str:
        return f"{self.reason}: {self.advice}"
