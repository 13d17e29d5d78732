"""Adapters against their frameworks' own classes."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_tiny import save_tiny_cross_encoder
from serve_fakes import Lengths

import fastrerank

TEXTS = ["a", "cccc", "bbb"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(Path(save_tiny_cross_encoder(tmp_path_factory.mktemp("adapted"))))


def test_langchain_compressor() -> None:
    documents = pytest.importorskip("langchain_core.documents")
    from fastrerank.integrations.langchain import FastReranker

    given = [documents.Document(page_content=text, metadata={"at": i}, id=str(i)) for i, text in enumerate(TEXTS)]
    compressor = FastReranker(reranker=Lengths(), top_n=2)
    kept = compressor.compress_documents(given, "qq")
    assert [(d.id, d.page_content, d.metadata) for d in kept] == [
        ("1", "cccc", {"at": 1, "relevance_score": 2.0}), ("2", "bbb", {"at": 2, "relevance_score": 1.0}),
    ]  # fmt: skip
    assert given[1].metadata == {"at": 1}
    assert compressor.compress_documents([], "qq") == []

    async def both() -> Any:
        return await asyncio.gather(*(compressor.acompress_documents(given, "qq") for _ in range(2)))

    assert asyncio.run(both()) == [kept, kept]
    with pytest.raises(ValueError, match="model="):
        FastReranker()


def test_langchain_cross_encoder(checkpoint: str) -> None:
    pytest.importorskip("langchain_core")
    from langchain_core.cross_encoders import BaseCrossEncoder

    from fastrerank.integrations.langchain import FastRerankCrossEncoder, FastReranker

    model = FastRerankCrossEncoder(checkpoint, device="cpu")
    assert isinstance(model, BaseCrossEncoder)
    pairs = [("the owl", text) for text in TEXTS]
    assert model.score(pairs) == fastrerank.CrossEncoder(checkpoint, device="cpu").predict(pairs).tolist()
    assert FastReranker(model=checkpoint, options={"device": "cpu"}).compress_documents([], "q") == []


def test_llama_index() -> None:
    schema = pytest.importorskip("llama_index.core.schema")
    from fastrerank.integrations.llama_index import FastRerank

    nodes = [schema.NodeWithScore(node=schema.TextNode(text=text), score=0.5) for text in TEXTS]
    rerank = FastRerank(Lengths(), top_n=2, keep_retrieval_score=True)
    kept = rerank.postprocess_nodes(nodes, query_str="qq")
    assert [(node.text, node.score, node.metadata["retrieval_score"]) for node in kept] == [
        ("cccc", 2.0, 0.5), ("bbb", 1.0, 0.5),
    ]  # fmt: skip
    assert [(node.score, node.metadata) for node in nodes] == [(0.5, {})] * 3
    found = asyncio.run(rerank.apostprocess_nodes(nodes, query_str="qq"))
    assert [node.text for node in found] == ["cccc", "bbb"]
    assert rerank.postprocess_nodes([], query_str="qq") == []
    with pytest.raises(ValueError, match="query"):
        rerank.postprocess_nodes(nodes)


def test_haystack(checkpoint: str) -> None:
    os.environ.setdefault("HAYSTACK_TELEMETRY_ENABLED", "False")
    haystack = pytest.importorskip("haystack")
    from fastrerank.integrations.haystack import FastRanker

    ranker = FastRanker(checkpoint, options={"device": "cpu"}, meta_fields_to_embed=["title"], top_k=2)
    documents = [haystack.Document(content=text, meta={"title": f"t{i}"}) for i, text in enumerate(TEXTS)]
    pipeline = haystack.Pipeline()
    pipeline.add_component("ranker", ranker)
    found = pipeline.run({"ranker": {"query": "the owl", "documents": [*documents, documents[0]]}})["ranker"][
        "documents"
    ]
    model = fastrerank.CrossEncoder(checkpoint, device="cpu")
    hits = model.rank("the owl", [f"t{i}\n{text}" for i, text in enumerate(TEXTS)], top_k=2)
    assert [(d.content, d.score) for d in found] == [(TEXTS[hit["corpus_id"]], hit["score"]) for hit in hits]
    again = FastRanker.from_dict(ranker.to_dict())
    assert again.to_dict() == ranker.to_dict()
    assert again.run(query="the owl", documents=documents, score_threshold=found[0].score + 1)["documents"] == []
    assert again.run(query="the owl", documents=[]) == {"documents": []}
    with pytest.raises(ValueError, match="top_k"):
        again.run(query="q", documents=documents, top_k=0)


def test_rerankers() -> None:
    documents = pytest.importorskip("rerankers.documents")
    from fastrerank.integrations.rerankers import FastRanker

    ranker = FastRanker(Lengths())
    found = ranker.rank("qq", TEXTS, doc_ids=["x", "y", "z"])
    assert [(r.doc_id, r.score, r.rank) for r in found] == [("y", 2.0, 1), ("z", 1.0, 2), ("x", -1.0, 3)]
    assert found.get_score_by_docid("x") == -1.0
    assert ranker.score("qq", "bbb") == 1.0
    assert ranker.rank("qq", []).results == []
    assert ranker.rank("qq", [documents.Document(text="bbb", doc_id="own")]).results[0].doc_id == "own"


def test_flag_embedding(checkpoint: str) -> None:
    from fastrerank.integrations.flag_embedding import FlagReranker

    pairs = [("the owl", text) for text in TEXTS]
    model = fastrerank.CrossEncoder(checkpoint, device="cpu")
    flag = FlagReranker(checkpoint, devices="cpu", max_length=None)
    assert flag.compute_score(pairs) == model.predict(pairs, activation_fn="identity").tolist()
    assert flag.compute_score(pairs[0]) == flag.compute_score(pairs[:1])
    assert np.allclose(
        flag.compute_score(pairs, normalize=True), 1 / (1 + np.exp(-np.array(flag.compute_score(pairs))))
    )
    with pytest.raises(ValueError, match="max_length"):
        flag.compute_score(pairs, max_length=17)
