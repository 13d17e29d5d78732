"""Types of arguments and results, for editors and type checkers. Importing it imports neither NumPy nor torch."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, TypedDict

if TYPE_CHECKING:
    import torch
    from typing_extensions import NotRequired

__all__ = [
    "Algorithm",
    "DeviceLike",
    "DtypeLike",
    "DtypeName",
    "EngineName",
    "Hit",
    "MethodName",
    "ModelPath",
    "PairwiseAlgorithm",
    "Readout",
    "TruncationSide",
    "WindowRule",
]

MethodName = Literal[
    "cross-encoder",
    "late-interaction",
    "embedding",
    "pointwise",
    "listwise",
    "pairwise",
    "setwise",
    "icr",
    "qrhead",
    "core",
]
EngineName = Literal["native", "torch", "padded"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16", "int8"]
TruncationSide = Literal["right", "left"]
WindowRule = Literal["rank_llm", "rankgpt"]
Readout = Literal["logits", "generation"]
Algorithm = Literal["windows", "groups"]
PairwiseAlgorithm = Literal["heapsort", "allpair", "sliding"]

ModelPath = str | PathLike[str]
if TYPE_CHECKING:
    DtypeLike = DtypeName | torch.dtype
    DeviceLike = str | int | torch.device | Sequence[str | int | torch.device]
else:  # names at run time; type checkers see those above
    DtypeLike = DeviceLike = Any


class Hit(TypedDict):
    """One row of `rank`.

    corpus_id: the document's position in the list that came in. text: with `return_documents`. tokens: with `explain`,
    each token's text and what it gets of the score.
    """

    corpus_id: int
    score: float
    text: NotRequired[str]
    tokens: NotRequired[list[tuple[str, float]]]
