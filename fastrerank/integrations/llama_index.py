"""LlamaIndex: a node postprocessor."""

from __future__ import annotations

from typing import Any

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle

from fastrerank.integrations.loading import call_options, load_reranker, name_of, shared_by
from fastrerank.rerankers.base import Reranker
from fastrerank.runtime.types import Hit
from fastrerank.serve.batching.batcher import AsyncReranker

__all__ = ["FastRerank"]

dispatcher = get_dispatcher(__name__)


class FastRerank(BaseNodePostprocessor):  # type: ignore[misc]
    """Keeps the `top_n` best nodes, by the content that embedding models see; nodes are copied, not changed.

    Async calls of one object share batches (`fastrerank.AsyncReranker`); their scores are those of the other calls.

    Args:
        model: hub id or local folder, or a loaded reranker of any method.
        top_n: how many nodes to keep.
        keep_retrieval_score: whether the score that a node came with is kept in `metadata["retrieval_score"]`.
        label: the label that ranks where the head has several, by name or number.
        raw: whether scores are raw; else activated, as `rank` shows them.
        method, options: as in `fastrerank.load`.

    Raises ValueError for a head with several labels where nothing tells which one ranks.

    Example:
        >>> index.as_query_engine(node_postprocessors=[FastRerank("BAAI/bge-reranker-base")])   # doctest: +SKIP
    """

    model: str = Field(description="Checkpoint of the reranker.")
    top_n: int = Field(description="Number of nodes to return.")
    keep_retrieval_score: bool = Field(default=False, description="Whether to keep the score that a node came with.")
    label: str | int | None = Field(default=None, description="The label that ranks, of a head with several.")
    raw: bool = Field(default=False, description="Whether scores are raw, not activated.")
    _reranker: Reranker = PrivateAttr()
    _shared: AsyncReranker | None = PrivateAttr(default=None)

    def __init__(
        self,
        model: Any,
        top_n: int = 2,
        *,
        method: str | None = None,
        keep_retrieval_score: bool = False,
        label: str | int | None = None,
        raw: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            model=name_of(model), top_n=top_n, keep_retrieval_score=keep_retrieval_score, label=label, raw=raw
        )
        self._reranker = load_reranker(model, method, options, label)

    @classmethod
    def class_name(cls) -> str:
        """Return the name that LlamaIndex stores."""
        return "FastRerank"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        query = self._begin(nodes, query_bundle)
        hits = self._reranker.rank(query, _texts(nodes), **self._options())
        return self._end(nodes, hits)

    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        query = self._begin(nodes, query_bundle)
        hits = await shared_by(self, self._reranker).rank(query, _texts(nodes), **self._options())
        return self._end(nodes, hits)

    def _options(self) -> dict[str, Any]:
        return {"top_k": self.top_n, "raw": self.raw, **call_options(self.label)}

    def _begin(self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None) -> str:
        if query_bundle is None:
            raise ValueError("FastRerank needs a query: pass query_bundle or query_str")
        dispatcher.event(ReRankStartEvent(query=query_bundle, nodes=nodes, top_n=self.top_n, model_name=self.model))
        return str(query_bundle.query_str)

    def _end(self, nodes: list[NodeWithScore], hits: list[Hit]) -> list[NodeWithScore]:
        kept = []
        for hit in hits:
            old = nodes[hit["corpus_id"]]
            node = old.node
            if self.keep_retrieval_score:
                node = node.model_copy(update={"metadata": {**node.metadata, "retrieval_score": old.score}})
            kept.append(NodeWithScore(node=node, score=hit["score"]))
        dispatcher.event(ReRankEndEvent(nodes=kept))
        return kept


def _texts(nodes: list[NodeWithScore]) -> list[str]:
    return [node.node.get_content(metadata_mode=MetadataMode.EMBED) for node in nodes]
