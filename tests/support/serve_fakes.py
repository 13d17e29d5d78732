"""A reranker without a model for tests of batching: what it scores, what it was asked, and when it stops to wait."""

from __future__ import annotations

import re
import threading
from concurrent.futures import Future
from typing import Any, ClassVar

import numpy as np

from fastrerank.inputs.limits import TextLimits, TooLong
from fastrerank.rerankers.base import Reranker, Scores, Usage
from fastrerank.rerankers.call import LIMITS, NO_OPTIONS, CallOptions
from fastrerank.rerankers.labels import resolve_label
from fastrerank.serve.batching.batcher import AsyncReranker


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


def held(reranker: Lengths, text: str = "a", **options: Any) -> tuple[AsyncReranker, Future[Any]]:
    """An `AsyncReranker` of one worker, whose first request (its future is returned) waits for `reranker.gate`."""
    reranker.gate.clear()
    shared = AsyncReranker(reranker, workers=1, **options)
    first = shared.submit("q", [text])
    assert reranker.entered.acquire(timeout=30)
    return shared, first


class Explaining(Lengths):
    """Reads attention, so to say: a word's mass is its length, but -1 for `not`."""

    method: ClassVar[str] = "icr"

    def __init__(self) -> None:
        super().__init__(independent=False)

    def _masses(self, text: str) -> list[tuple[str, float]]:
        words = re.findall(r"\s*\S+", text)
        return [(word, -1.0 if word.strip() == "not" else float(len(word.strip()))) for word in words]

    def _score_many(self, queries: list[str], documents: list[list[str]], usage: Usage) -> list[Scores]:
        super()._score_many(queries, documents, usage)
        usage.query_tokens = []
        return [np.array([sum(m for _, m in self._masses(t)) for t in texts], np.float32) for texts in documents]

    def token_masses(self, _query: str, documents: list[str]) -> list[Any]:
        return [np.array([m for _, m in self._masses(text)], np.float32) for text in documents]

    def rank(  # type: ignore[override]
        self,
        query: str,
        documents: Any,
        top_k: int | None = None,
        return_documents: bool = False,
        explain: bool = False,
        **options: Any,
    ) -> list[dict[str, Any]]:
        rows = super().rank(query, documents, top_k, return_documents, **options)
        for row in rows if explain else ():
            row["tokens"] = self._masses(documents[row["corpus_id"]])
        return rows


class Optioned(Lengths):
    """Honours every option: a token is a letter, a pair has at most `max_length` of them.

    What a document scores: see `value`; `saved` is what the checkpoint says that a raw score is shown as.
    """

    call_options: ClassVar[frozenset[str]] = frozenset({"label", "instruction"}) | LIMITS
    labels = ("no", "yes", "maybe")
    max_length = 40

    def __init__(self, *, saved: Any = None, options: frozenset[str] | None = None) -> None:
        super().__init__()
        self.saved = saved
        if options is not None:
            self.call_options = options  # type: ignore[misc]

    def check_options(self, **options: Any) -> CallOptions:
        call = super().check_options(**options)
        if call.label is not None:
            resolve_label(call.label, self.labels)
        return call

    def activated(self, scores: Scores) -> Scores:
        return scores if self.saved is None else np.asarray(self.saved(scores), np.float32)

    def value(self, query: str, text: str, call: CallOptions = NO_OPTIONS) -> float:
        """The sum of the document's letters (a is 0.01) less the query's length, and what label and instruction add."""
        if text == "nan":
            return float("nan")
        limits = call.limits
        query = _cut("the query", query, limits.max_tokens_per_query, limits)
        text = _cut("the document", text, limits.max_tokens_per_doc, limits)
        text = _cut("the document", text, max(0, (limits.max_length or self.max_length) - len(query)), limits)
        label = 0 if call.label is None else resolve_label(call.label, self.labels)
        return sum(ord(letter) - 96 for letter in text) / 100 - len(query) + label / 4 + len(call.instruction or "") / 8

    def _score_many(
        self, queries: list[str], documents: list[list[str]], usage: Usage, call: CallOptions = NO_OPTIONS
    ) -> list[Scores]:
        super()._score_many(queries, documents, usage)
        return [
            np.array([self.value(query, text, call) for text in texts], np.float32)
            for query, texts in zip(queries, documents, strict=True)
        ]


def _cut(what: str, text: str, most: int | None, limits: TextLimits) -> str:
    if most is None or len(text) <= most:
        return text
    if not limits.truncate:
        raise TooLong(what, len(text), most)
    return text[len(text) - most :] if limits.cut_left() else text[:most]
