"""Names of precisions, which compare equal to torch's."""

from __future__ import annotations

from typing import Any

__all__ = ["Dtype"]


class Dtype(str):
    """The name of a precision, such as "bfloat16"; equal to that str and to the torch dtype of that name.

    Example:
        >>> Dtype("bfloat16") == "bfloat16"
        True
        >>> Dtype("bfloat16") == torch.bfloat16  # doctest: +SKIP
        True
    """

    __slots__ = ()

    @classmethod
    def of(cls, value: Any) -> Dtype:
        """The name of a str, a torch dtype or a NumPy type; what is none of these is named as it prints itself."""
        if isinstance(value, type):
            value = value.__name__  # numpy.float32
        return cls(str(value).removeprefix("torch."))

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, str(other).removeprefix("torch."))

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__
