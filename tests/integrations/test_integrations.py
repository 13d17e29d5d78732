"""Adapters against their frameworks' own classes."""

from __future__ import annotations

import asyncio
import os
import re
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
        ("1", "cccc", {"at": 1, "relevance_score": 2.0}),
        ("2", "bbb", {"at": 2, "relevance_score": 1.0}),
    ]
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
        ("cccc", 2.0, 0.5),
        ("bbb", 1.0, 0.5),
    ]
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
    with pytest.raises(ValueError, match="batch_size"):
        FastRanker(checkpoint, batch_size=0)
    with pytest.raises(ValueError, match="contradict"):
        FastRanker(checkpoint, raw=True, scale_score=True)
    with pytest.warns(UserWarning, match="trained as"), pytest.raises(ValueError, match="'embedding' is none"):
        FastRanker(checkpoint, method="embedding", scale_score=True, options={"device": "cpu"}).warm_up()


def test_haystack_loads_a_pipeline_that_is_allowed(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    haystack = pytest.importorskip("haystack")
    serialization = pytest.importorskip("haystack.core.serialization")
    if not hasattr(serialization, "allow_deserialization_module"):
        pytest.skip("this Haystack loads every module")
    from haystack.core import serialization_security
    from haystack.core.errors import DeserializationError

    from fastrerank.integrations.haystack import FastRanker

    pipeline = haystack.Pipeline()
    pipeline.add_component("ranker", FastRanker(checkpoint, label=0, scale_score=True, batch_size=4, top_k=2))
    text = pipeline.dumps()
    with pytest.raises(DeserializationError, match="fastrerank"):
        haystack.Pipeline.loads(text)
    assert haystack.Pipeline.loads(text, allowed_modules=["fastrerank.*"]).dumps() == text
    (line,) = re.findall(r"^allow_deserialization_module\(.*\)$", PAGE.read_text("utf-8"), re.MULTILINE)
    monkeypatch.setattr(serialization_security, "_extra_allowed_modules", [])
    exec(line, {"allow_deserialization_module": serialization.allow_deserialization_module})
    assert haystack.Pipeline.loads(text).get_component("ranker").batch_size == 4


def test_haystack_keeps_what_is_zero_or_false() -> None:
    haystack = pytest.importorskip("haystack")
    from fastrerank.integrations.haystack import FastRanker

    ranker = FastRanker("none", meta_fields_to_embed=["number", "flag", "gone", "absent"], scale_score=False)
    ranker._reranker = reranker = Lengths()
    meta = {"number": 0, "flag": False, "gone": None}
    # Two documents have one id: the higher score counts, and 0.0 is a score.
    pair = [haystack.Document(id="x", content="old", score=-1.0), haystack.Document(id="x", content="new", score=0.0)]
    ranker.run(query="q", documents=[haystack.Document(content="text", meta=meta), *pair, pair[0]])
    assert reranker.calls == [[["0\nFalse\ntext", "new"]]]


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
    assert (
        flag.compute_score(pairs, max_length=5)
        == model.score_many(["the owl"], [TEXTS], max_length=5, max_tokens_per_query=3)[0].tolist()
    )


def test_pyterrier_without_java() -> None:
    pytest.importorskip("pyterrier")
    import pandas as pd
    import pyterrier as pt

    from fastrerank.integrations.pyterrier import FastReRanker

    rows = [
        ("q2", "zz", "x", "a", 9.0, 0),
        ("q1", "q", "y", "cccc", 8.0, 0),
        ("q2", "zz", "z", "ddd", 7.0, 1),
        ("q1", "q", "v", "bb", 6.0, 1),
        ("q2", "zz", "w", "eee", 5.0, 2),
    ]
    frame = pd.DataFrame(rows, columns=["qid", "query", "docno", "body", "score", "rank"])
    reranker = Lengths()
    transformer = FastReRanker(reranker, text_field="body")
    found = transformer(frame)
    assert reranker.calls == [[["a", "ddd", "eee"], ["cccc", "bb"]]]
    assert found["docno"].tolist() == frame["docno"].tolist()
    assert found["score"].tolist() == [-1.0, 3.0, 1.0, 1.0, 1.0]
    assert found["rank"].tolist() == [2, 0, 0, 1, 1]  # ties keep the order they came in
    assert frame["score"].tolist() == [9.0, 8.0, 7.0, 6.0, 5.0]
    none = transformer(frame[:0])
    assert len(none) == 0
    assert set(none.columns) == set(frame.columns)
    with pytest.raises(KeyError, match="body"):
        transformer(frame.drop(columns=["body"]))

    qrels = pd.DataFrame({"qid": ["q1", "q2"], "docno": ["v", "z"], "label": [1, 1]})
    pipelines = [pt.Transformer.from_df(frame), pt.Transformer.from_df(frame) >> transformer]
    topics = frame[["qid", "query"]].drop_duplicates()
    measured = pt.Experiment(pipelines, topics, qrels, ["recip_rank"], names=["before", "after"])
    assert measured["recip_rank"].tolist() == [0.5, 0.75]
    assert not pt.java.started()


def test_pyterrier_inspects_the_transformer() -> None:
    pt = pytest.importorskip("pyterrier")
    from fastrerank.integrations.pyterrier import FastReRanker

    reranker = Lengths()
    transformer = FastReRanker(reranker, text_field="body")
    columns = ["qid", "query", "docno", "body", "score", "rank"]
    (needed,) = pt.inspect.transformer_inputs(transformer)
    assert set(needed) == set(columns[:4])
    assert sorted(pt.inspect.transformer_outputs(transformer, columns)) == sorted(columns)
    found = {item.name: item.value for item in pt.inspect.transformer_attributes(transformer)}
    assert found == {"model": reranker, "method": None, "text_field": "body", "label": None, "raw": True, "options": {}}
    changed = pt.inspect.transformer_apply_attributes(transformer, text_field="title", raw=False)
    assert (changed.text_field, changed.raw, transformer.text_field) == ("title", False, "body")
    assert changed.reranker is reranker
    other = Lengths()
    assert pt.inspect.transformer_apply_attributes(transformer, model=other).reranker is other
    with pytest.raises(TypeError, match="no depth"):
        transformer.apply_attributes(depth=3)


def test_pyterrier_refuses_two_queries_of_one_qid() -> None:
    pytest.importorskip("pyterrier")
    import pandas as pd

    from fastrerank.integrations.pyterrier import FastReRanker

    rows = [("1", "a", "x", "t", 0.0, 0), ("1", "b", "y", "t", 0.0, 1)]
    frame = pd.DataFrame(rows, columns=["qid", "query", "docno", "text", "score", "rank"])
    with pytest.raises(ValueError, match="qid '1' has several queries"):
        FastReRanker(Lengths())(frame)


def test_beir(checkpoint: str) -> None:
    rerank = pytest.importorskip("beir.reranking.rerank")
    from fastrerank.integrations.beir import FastReranker

    corpus = {str(i): {"title": "fleas", "text": text} for i, text in enumerate(TEXTS)}
    queries = {"q1": "the owl", "q2": "a flea"}
    results = {"q1": {"0": 3.0, "1": 2.0, "2": 1.0}, "q2": {"2": 1.0}}
    found = rerank.Rerank(FastReranker(checkpoint, device="cpu")).rerank(corpus, queries, results, top_k=2)
    model = fastrerank.CrossEncoder(checkpoint, device="cpu")
    first = model.score("the owl", ["fleas a", "fleas cccc"]).tolist()
    assert found == {"q1": dict(zip("01", first, strict=True)), "q2": {"2": model.score("a flea", ["fleas bbb"])[0]}}
    whole = Lengths(independent=False)
    rerank.Rerank(FastReranker(whole)).rerank(corpus, queries, results, top_k=3)
    assert whole.calls == [[["fleas a", "fleas cccc", "fleas bbb"], ["fleas bbb"]]]


def test_mteb(checkpoint: str) -> None:
    mteb = pytest.importorskip("mteb")
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.models import CrossEncoderProtocol

    from fastrerank.integrations.mteb import FastReranker

    texts = {"d0": "cats sleep all day", "d1": "a flea lives up to a year", "d2": "fleas", "d3": "the year"}
    queries = {"q0": "how long do fleas live", "q1": "how long do cats sleep"}

    class Task(AbsTaskRetrieval):
        metadata = TaskMetadata(
            type="Reranking",
            name="Fleas",
            main_score="ndcg_at_10",
            description="A task in memory.",
            dataset={"path": "memory", "revision": "1"},
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            modalities=["text"],
            category="t2t",
            date=("2026-01-01", "2026-01-01"),
            dialect=[],
            domains=[],
            task_subtypes=[],
            license="cc0-1.0",
            annotations_creators="derived",
            sample_creation="created",
            bibtex_citation="",
            reference="https://example.org",
        )

        def load_data(self, **_: Any) -> None:
            split = {
                "queries": Dataset.from_list([{"id": name, "text": text} for name, text in queries.items()]),
                "corpus": Dataset.from_list([{"id": n, "title": "", "text": text} for n, text in texts.items()]),
                "relevant_docs": {"q0": {"d1": 1}, "q1": {"d0": 1}},
                "top_ranked": {name: list(texts) for name in queries},
            }
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    model = FastReranker(checkpoint, device="cpu", name="tests/tiny")
    assert isinstance(model, CrossEncoderProtocol)
    found = mteb.evaluate(model, Task(), cache=None, show_progress_bar=False, co2_tracker=False)
    assert found.model_name == "tests/tiny"
    cross_encoder = fastrerank.CrossEncoder(checkpoint, device="cpu")
    gains = []
    for query, wanted in (("q0", 1), ("q1", 0)):
        order = [hit["corpus_id"] for hit in cross_encoder.rank(queries[query], list(texts.values()))]
        gains.append(1 / np.log2(2 + order.index(wanted)))
    assert found.task_results[0].scores["test"][0]["ndcg_at_10"] == pytest.approx(np.mean(gains), abs=1e-5)
    assert FastReranker(Lengths()).mteb_model_meta.name == "fastrerank/Lengths"
    alone = mteb.evaluate(cross_encoder, Task(), cache=None, show_progress_bar=False, co2_tracker=False)
    assert alone.model_name == f"fastrerank/{Path(checkpoint).name}"
    assert alone.task_results[0].scores["test"][0]["ndcg_at_10"] == pytest.approx(np.mean(gains), abs=1e-5)
    texts_of = {"inputs1": [{"text": ["a flea"]}], "inputs2": [{"text": ["the year"]}]}
    asked = {"task_metadata": None, "hf_split": "test", "hf_subset": "default", "batch_size": 8}
    short = model.predict(**texts_of, **asked, max_length=5)
    assert short == cross_encoder.score("a flea", ["the year"], max_length=5)
    for one in (model, cross_encoder):
        with pytest.raises(TypeError, match="precision"):
            one.predict(**texts_of, **asked, precision="int8")
    with pytest.raises(ValueError, match="inputs have image"):
        model.predict([{"image": []}], [], task_metadata=None, hf_split="test", hf_subset="default")


PAGE = Path(__file__).resolve().parents[2] / "docs" / "howto" / "integrations.md"
BLOCKS = re.findall(
    r"^## (\S+)\n(?:(?!^## ).*\n)*?```python\n((?:(?!^```).*\n)*)```", PAGE.read_text("utf-8"), re.MULTILINE
)
PACKAGES = {
    "LangChain": "langchain_core",
    "LlamaIndex": "llama_index.core",
    "BEIR": "beir",
    "FlagEmbedding": "fastrerank",
}


def test_every_framework_has_an_example() -> None:
    names = [name for name, _ in BLOCKS]
    expected = ["LangChain", "LlamaIndex", "Haystack", "PyTerrier", "MTEB", "BEIR", "rerankers", "FlagEmbedding"]
    assert names == expected


@pytest.mark.parametrize(("name", "block"), BLOCKS, ids=[name for name, _ in BLOCKS])
def test_examples_of_the_page_run(name: str, block: str, checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(PACKAGES.get(name, name.lower()))
    assert "BAAI/bge-reranker-base" in block
    exec(compile(block.replace("BAAI/bge-reranker-base", checkpoint), f"{PAGE}: {name}", "exec"), {})
    assert capsys.readouterr().out.strip()
