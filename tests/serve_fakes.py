"""A reranker without a model for tests of batching: what it scores, what it was asked, and when it stops to wait."""

from __future__ import annotations

import threading
from typing import ClassVar

import numpy as np

from fastrerank.rerankers.base import Reranker, Scores, Usage


class Lengths(Reranker):
    """Scores a document by its length less the query's; a document `boom` raises, `nan` scores NaN.

    While `gate` is cleared, calls wait; `calls` lists the texts of each.
    """

    method: ClassVar[str] = "cross-encoder"

    def __init__(self, independent: bool = True) -> None:
        super().__init__()
        self.independent = independent  # type: ignore[misc]
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.calls: list[list[list[str]]] = []

    def _score_many(self, queries: list[str], documents: list[list[str]], usage: Usage) -> list[Scores]:
        self.calls.append(documents)
        self.entered.release()
        assert self.gate.wait(30)
        if any("boom" in texts for texts in documents):
            raise RuntimeError("boom")
        usage.tokens = sum(len(texts) for texts in documents)
        usage.query_tokens = [len(texts) for texts in documents]
        return [
            np.array([np.nan if t == "nan" else len(t) - len(q) for t in texts], np.float32)
            for q, texts in zip(queries, documents, strict=True)
        ]
