"""Haystack: a ranker component."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from haystack import Document, component, default_from_dict, default_to_dict

from fastrerank.integrations.loading import call_options, load_reranker
from fastrerank.rerankers.activations import sigmoid
from fastrerank.rerankers.base import Reranker, Scores, check_threshold, order, ranked

__all__ = ["FastRanker"]


@component
class FastRanker:
    """Ranks documents by a query; the best `top_k` come back as copies with their scores.

    Args:
        model: hub id or local folder.
        method, options: as in `fastrerank.load`.
        top_k: how many documents to return.
        query_prefix, query_suffix, document_prefix, document_suffix: texts put around what is scored.
        meta_fields_to_embed: fields of `meta` that are put before a document's content, joined by
            `embedding_separator`; a field that is missing or None is left out.
        scale_score: False shows raw scores, True their sigmoid; None shows them activated, as `rank` does, which is the
            sigmoid too but for a checkpoint that saved another activation.
        score_threshold: documents with a lower score are left out.
        label: the label that ranks where the head has several, by name or number.
        raw: whether scores are raw: the same as scale_score=False.
        batch_size: changes nothing: work is split by tokens.

    Raises ValueError for `top_k` or `batch_size` below 1 and for raw=True with scale_score=True; `warm_up` for a head
    with several labels where nothing tells which one ranks, and for scale_score=True with a method whose raw score is
    no logit.

    Example:
        >>> ranker = FastRanker("BAAI/bge-reranker-base")                                    # doctest: +SKIP
        >>> ranker.run(query="who?", documents=documents)["documents"]                       # doctest: +SKIP
    """

    def __init__(
        self,
        model: str,
        *,
        method: str | None = None,
        top_k: int = 10,
        query_prefix: str = "",
        query_suffix: str = "",
        document_prefix: str = "",
        document_suffix: str = "",
        meta_fields_to_embed: list[str] | None = None,
        embedding_separator: str = "\n",
        scale_score: bool | None = None,
        score_threshold: float | None = None,
        label: str | int | None = None,
        raw: bool = False,
        batch_size: int = 16,
        options: dict[str, Any] | None = None,
    ) -> None:
        _check("top_k", top_k)
        _check("batch_size", batch_size)
        check_threshold(score_threshold)
        if raw and scale_score:
            raise ValueError("raw=True and scale_score=True contradict each other: give one of them")
        self.model, self.method, self.top_k, self.options = model, method, top_k, options or {}
        self.query_prefix, self.query_suffix = query_prefix, query_suffix
        self.document_prefix, self.document_suffix = document_prefix, document_suffix
        self.meta_fields_to_embed, self.embedding_separator = meta_fields_to_embed or [], embedding_separator
        self.scale_score, self.raw = (False if raw else scale_score), raw
        self.score_threshold, self.label, self.batch_size = score_threshold, label, batch_size
        self._reranker: Reranker | None = None

    def __repr__(self) -> str:
        return f"FastRanker({self._reranker or self.model!r})"

    def warm_up(self) -> None:
        """Load the model; `run` does where nobody did."""
        if self._reranker is None:
            reranker = load_reranker(self.model, self.method, self.options, self.label)
            _check_scale(reranker, self.scale_score)
            self._reranker = reranker

    def to_dict(self) -> dict[str, Any]:
        """Return what `from_dict` makes the same component of."""
        names = (
            "model",
            "method",
            "top_k",
            "query_prefix",
            "query_suffix",
            "document_prefix",
            "document_suffix",
            "meta_fields_to_embed",
            "embedding_separator",
            "scale_score",
            "score_threshold",
            "label",
            "raw",
            "batch_size",
            "options",
        )
        return dict(default_to_dict(self, **{name: getattr(self, name) for name in names}))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> FastRanker:
        """Make a component of what `to_dict` returned."""
        made: FastRanker = default_from_dict(cls, data)
        return made

    @component.output_types(documents=list[Document])
    def run(
        self,
        query: str,
        documents: list[Document],
        top_k: int | None = None,
        scale_score: bool | None = None,
        score_threshold: float | None = None,
    ) -> dict[str, list[Document]]:
        """Return {"documents": best first}. Among documents with the same id, the highest incoming score wins.

        `top_k`, `scale_score` and `score_threshold` are for this call; None for the component's own.
        """
        top_k = self.top_k if top_k is None else top_k
        _check("top_k", top_k)
        check_threshold(score_threshold)
        threshold = self.score_threshold if score_threshold is None else score_threshold
        scale = self.scale_score if scale_score is None else scale_score
        self.warm_up()
        assert self._reranker is not None
        _check_scale(self._reranker, scale)
        distinct: dict[str, Document] = {}
        for document in documents:
            known = distinct.get(document.id)
            if known is None or _so_far(document) > _so_far(known):
                distinct[document.id] = document
        chosen = list(distinct.values())
        texts = [self._text(document) for document in chosen]
        asked = self.query_prefix + query + self.query_suffix
        scores = self._reranker.score(asked, texts, **call_options(self.label))
        shown = _scaled(self._reranker, scores, scale)
        positions = self._reranker._positions(scores, shown) if scale is None else order(scores)
        hits = ranked(positions, shown, None, top_k, threshold)
        return {"documents": [replace(chosen[hit["corpus_id"]], score=hit["score"]) for hit in hits]}

    def _text(self, document: Document) -> str:
        values = [document.meta.get(name) for name in self.meta_fields_to_embed]
        fields = [str(value) for value in values if value is not None]
        text = self.embedding_separator.join([*fields, document.content or ""])
        return self.document_prefix + text + self.document_suffix


def _check(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _check_scale(reranker: Reranker, scale_score: bool | None) -> None:
    if scale_score and not reranker.raw_is_logit:
        raise ValueError(
            f"scale_score=True is the sigmoid of a logit, and the score of method {reranker.method!r} is none: leave "
            "scale_score out"
        )


def _scaled(reranker: Reranker, scores: Scores, scale_score: bool | None) -> Scores:
    if scale_score is None:
        return reranker.activated(scores)
    return sigmoid(scores) if scale_score else scores


def _so_far(document: Document) -> float:
    return float("-inf") if document.score is None else document.score
