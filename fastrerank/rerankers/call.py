"""What one call may ask of a reranker beside its texts: a label, an instruction, limits of the texts."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypedDict

from fastrerank.inputs.limits import NO_LIMITS, TextLimits
from fastrerank.runtime.types import TruncationSide

__all__ = ["LIMITS", "NO_OPTIONS", "CallOptions", "Options"]


class Options(TypedDict, total=False):
    """Keywords of `score`, `score_many` and `rank`. A method refuses those that it cannot honour."""

    label: str | int | None
    instruction: str | None
    max_length: int | None
    max_tokens_per_doc: int | None
    max_tokens_per_query: int | None
    truncation_side: TruncationSide | None
    truncate: bool


LIMITS = frozenset(field.name for field in fields(TextLimits))
_REASONS = {
    "label": "only a classification head has labels",
    "instruction": "its input has no place for an instruction",
}


@dataclass(frozen=True)
class CallOptions:
    """The options of one call; hashable, so that calls with equal options can share a batch.

    Attributes:
        label: name or number of the label whose score ranks; None for the reranker's own.
        instruction: text in place of the prompt's instruction; None for the reranker's own.
        limits: see `TextLimits`.
    """

    label: str | int | None = None
    instruction: str | None = None
    limits: TextLimits = NO_LIMITS

    @classmethod
    def of(cls, options: Mapping[str, Any], supported: Collection[str], method: str) -> CallOptions:
        """Return the checked options of a call.

        Args:
            options: keywords, names of `Options`; a value of None (True for `truncate`) is the same as none.
            supported: the names that the method can honour.
            method: its name, for messages.

        Raises TypeError for an unknown name or a value of a wrong type, ValueError for a value out of range and for an
        option that the method cannot honour, with the reason.
        """
        known = ("label", "instruction", *sorted(LIMITS))
        label, instruction = options.get("label"), options.get("instruction")
        if label is not None and (isinstance(label, bool) or not isinstance(label, (str, int))):
            raise TypeError(f"label must be a name (str), a number (int) or None, got {type(label).__name__}")
        if instruction is not None and not isinstance(instruction, str):
            raise TypeError(f"instruction must be str or None, got {type(instruction).__name__}")
        for name, value in options.items():
            if name not in known:
                raise TypeError(f"{name!r} is not an option of a call; there are {', '.join(known)}")
            given = value is not True if name == "truncate" else value is not None
            if given and name not in supported:
                reason = _REASONS.get(name, "it reads its texts in another way")
                can = ", ".join(sorted(supported)) or "none"
                raise ValueError(f"method {method!r} cannot honour {name}: {reason}; options that it takes: {can}")
        limits = TextLimits(**{name: value for name, value in options.items() if name in LIMITS})
        return cls(label, instruction, limits)

    def keywords(self) -> dict[str, Any]:
        """The options that differ from their defaults, as keywords of `score`, `score_many` and `rank`."""
        given: dict[str, Any] = {"label": self.label, "instruction": self.instruction}
        given |= {name: getattr(self.limits, name) for name in sorted(LIMITS - {"truncate"})}
        given = {name: value for name, value in given.items() if value is not None}
        return given if self.limits.truncate else given | {"truncate": False}


NO_OPTIONS = CallOptions()
