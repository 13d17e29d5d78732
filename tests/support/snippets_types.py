"""What a type checker says of calls: `tests/runtime/test_types.py` runs mypy on this file. It is never imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from typing_extensions import reveal_type

import fastrerank

if TYPE_CHECKING:
    reveal_type(fastrerank.load("m", "cross-encoder"))  # CrossEncoder
    reveal_type(fastrerank.load("m", method="late-interaction"))  # LateInteractionReranker
    reveal_type(fastrerank.load("m", method="embedding"))  # EmbeddingReranker
    reveal_type(fastrerank.load("m", method="pointwise"))  # PointwiseReranker
    reveal_type(fastrerank.load("m", method="listwise"))  # ListwiseReranker
    reveal_type(fastrerank.load("m", method="pairwise"))  # PairwiseReranker
    reveal_type(fastrerank.load("m", method="setwise"))  # SetwiseReranker
    reveal_type(fastrerank.load("m", method="icr"))  # AttentionReranker
    reveal_type(fastrerank.load("m"))  # Reranker
    model = fastrerank.CrossEncoder("m", dtype=torch.bfloat16, device="cpu", engine="native")
    reveal_type(model.predict([("q", "d")]))  # ndarray
    reveal_type(model.predict([("q", "d")], convert_to_tensor=True))  # Tensor
    reveal_type(model.predict([("q", "d")], convert_to_numpy=False))  # list[Tensor] | Tensor
    reveal_type(model.rank("q", ["d"]))  # list[TypedDict(Hit
    reveal_type(model.rank("q", ["d"])[0]["corpus_id"])  # int
    reveal_type(model.eval())  # CrossEncoder
    model.rank("q", ["d"])[0]["nonsense"]  # error: TypedDict "Hit" has no key "nonsense"
    fastrerank.CrossEncoder("m", dtype="float8")  # error: incompatible type
    fastrerank.CrossEncoder("m", engine="onnx")  # error: incompatible type
    fastrerank.ListwiseReranker("m", window_rule="every")  # error: incompatible type
    model.score("q", ["d"], truncation_side="middle")  # error: incompatible type
