"""Data sets, measures and TREC runs: against trec_eval, against published values, and on damaged files."""

from __future__ import annotations

import gzip
import json
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from fastrerank.evaluation import (
    Candidate,
    JudgedQuery,
    evaluate,
    judged_query,
    load_dataset,
    measure,
    read_trec_run,
    write_trec_run,
)

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


class KeepOrder:
    def rank(self, _query, documents):
        return [{"corpus_id": i, "score": float(-i)} for i in range(len(documents))]


class LongestFirst:
    def rank(self, _query, documents):
        order = sorted(range(len(documents)), key=lambda i: (-len(documents[i]), i))
        return [{"corpus_id": i, "score": float(len(documents[i]))} for i in order]


def row(**changes):
    candidates = [
        {"docid": "a", "text": "one", "rel": 0},
        {"docid": "b", "text": "three", "rel": 2},
        {"docid": "c", "text": "thirteen", "rel": 1},
    ]
    return {"qid": "q1", "query": "number", "candidates": candidates, "ideal_rels": [3, 2, 1]} | changes


def write_rows(path: Path, *rows) -> Path:
    path.write_text("\n".join(json.dumps(r) for r in rows) + "\n")
    return path


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("dl19-passage-bm25-top100", 0.5058),
        ("dl19-passage-spladepp-top100", 0.7308),
        ("musique-distractor20", 0.5691),
        ("noveleval-2306-top20", 0.7091),
    ],
)
def test_first_stage_ndcg_is_the_published_one(name, published):
    path = DATA / f"{name}.jsonl.gz"
    if not path.exists():
        pytest.skip("the evaluation data is not beside this clone")
    result = evaluate(KeepOrder(), path)
    assert result.first_stage == result.metrics
    assert round(result.first_stage["nDCG@10"], 4) == published


def test_measures_by_hand():
    result = evaluate(LongestFirst(), [judged_query(row())], recall_at=(1, 3))
    dcg = 1 / np.log2(2) + 2 / np.log2(3)
    ideal = 3 / np.log2(2) + 2 / np.log2(3) + 1 / np.log2(4)
    assert result.metrics == pytest.approx(
        {"nDCG@10": dcg / ideal, "MRR@10": 1.0, "Recall@1": 1 / 3, "Recall@3": 2 / 3}
    )
    assert result.first_stage["MRR@10"] == 0.5
    assert [docid for docid, _ in result.run["q1"]] == ["c", "b", "a"]
    assert result.latencies.shape == (1,)
    assert 0 < result.latency_p50 <= result.latency_p95


def test_min_relevance_counts_for_mrr_and_recall_only():
    queries = [judged_query(row())]
    strict = evaluate(LongestFirst(), queries, min_relevance=2, recall_at=(3,)).metrics
    plain = evaluate(LongestFirst(), queries, recall_at=(3,)).metrics
    assert (strict["MRR@10"], strict["Recall@3"]) == (0.5, 0.5)
    assert strict["nDCG@10"] == plain["nDCG@10"]


def test_ties_keep_the_order_of_the_ranking():
    tied = {"q": [(name, 1.0) for name in "abc"]}
    judgements = {"q": {"a": 1}}
    assert measure(tied, judgements)["q"]["MRR@10"] == 1.0  # trec_eval alone would put c first


def test_judged_query_without_results_counts_as_zero():
    values = measure({"q1": [("a", 1.0)]}, {"q1": {"a": 1}, "q2": {"b": 1}})
    assert values["q1"]["nDCG@10"] == 1.0
    assert set(values["q2"].values()) == {0.0}


def test_queries_without_judgements_are_ranked_but_not_averaged():
    unjudged = JudgedQuery("q2", "number", (Candidate("x", "y"),), {})
    both = evaluate(LongestFirst(), [judged_query(row()), unjudged])
    assert both.metrics == evaluate(LongestFirst(), [judged_query(row())]).metrics
    assert (both.judged, len(both.latencies), list(both.run)) == (1, 2, ["q1", "q2"])


def test_top_k_reranks_the_head_and_keeps_the_tail():
    result = evaluate(LongestFirst(), [judged_query(row())], top_k=2)
    hits = result.run["q1"]
    assert [docid for docid, _ in hits] == ["b", "a", "c"]
    assert all(before > after for (_, before), (_, after) in pairwise(hits))


def test_progress_counts_every_query():
    calls = []
    queries = [judged_query(row(qid=str(number))) for number in range(3)]
    evaluate(KeepOrder(), queries, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("queries", "options", "message"),
    [
        ([], {}, "no queries"),
        ([JudgedQuery("q", "text", (), {})], {}, "no relevance judgements"),
        ([judged_query(row()), judged_query(row())], {}, "'q1' is 2 times"),
        ([judged_query(row())], {"top_k": 0}, "top_k"),
        ([judged_query(row())], {"recall_at": (0,)}, "at least 1"),
    ],
)
def test_evaluate_refuses(queries, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(KeepOrder(), queries, **options)


def test_evaluate_refuses_a_ranking_that_lost_a_document():
    class Loses(KeepOrder):
        def rank(self, _query, documents):
            return super().rank(_query, documents)[1:]

    with pytest.raises(ValueError, match="permutation"):
        evaluate(Loses(), [judged_query(row())])


def test_missing_ir_measures_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ir_measures", None)
    with pytest.raises(ImportError, match=r"pip install 'fastrerank\[eval\]'"):
        evaluate(KeepOrder(), [judged_query(row())])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qid": None}, "'qid' is NoneType"),
        ({"query": ["x"]}, "'query' is list"),
        ({"candidates": [{"docid": "a"}]}, "no 'text'"),
        ({"candidates": [{"docid": "a", "text": "t", "rel": "high"}]}, "'rel' is str"),
        ({"candidates": [{"docid": "a", "text": "t"}] * 2}, "'a' is more than once"),
    ],
)
def test_damaged_rows_are_named_by_file_and_line(tmp_path, changes, message):
    path = write_rows(tmp_path / "rows.jsonl", row(), row(**changes))
    with pytest.raises(ValueError, match=message) as caught:
        load_dataset(path)
    assert str(caught.value).startswith(f"{path}:2:")


def test_rows_from_gzip_and_numeric_ids(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(row(qid=7)).encode()))
    (query,) = load_dataset(path)
    assert (query.qid, len(query.candidates), sorted(query.judgements.values())) == ("7", 3, [0, 1, 2, 3])
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(ValueError, match=r"rows\.jsonl\.gz"):
        load_dataset(path)


def beir_folder(root: Path) -> Path:
    (root / "qrels").mkdir(parents=True)
    documents = [{"_id": "d1", "title": "T", "text": "first"}, {"_id": "d2", "title": "", "text": "second"}]
    write_rows(root / "corpus.jsonl", *documents, {"_id": "d3", "text": "not a candidate"})
    write_rows(root / "queries.jsonl", {"_id": "q1", "text": "which"})
    (root / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td2\t1\nq1\td3\t2\n")
    (root / "run.trec").write_text("q1 Q0 d2 2 1.5 bm25\nq1 Q0 d1 1 2.5 bm25\n")
    return root


def test_beir_folder(tmp_path):
    folder = beir_folder(tmp_path)
    (query,) = load_dataset(folder, run=folder / "run.trec")
    assert query == JudgedQuery(
        "q1", "which", (Candidate("d1", "T first"), Candidate("d2", "second")), {"d2": 1, "d3": 2}
    )
    with pytest.raises(ValueError, match="holds no candidates"):
        load_dataset(folder)


def test_trec_files(tmp_path):
    (tmp_path / "texts.tsv").write_text("d1\tfirst\nd2\tsecond\ttab\n")
    (tmp_path / "queries.tsv").write_text("q1\twhich\n")
    (tmp_path / "qrels.txt").write_text("q1 0 d2 1\nq1 0 d9 3\n")
    (tmp_path / "run.trec").write_text("q1 Q0 d1 1 2.5 bm25\nq1 Q0 d2 2 1.5 bm25\n")
    files = {"qrels": tmp_path / "qrels.txt", "queries": tmp_path / "queries.tsv"}
    (query,) = load_dataset(tmp_path / "texts.tsv", run=tmp_path / "run.trec", **files)
    assert query == JudgedQuery(
        "q1", "which", (Candidate("d1", "first"), Candidate("d2", "second\ttab")), {"d2": 1, "d9": 3}
    )
    with pytest.raises(ValueError, match="needs qrels"):
        load_dataset(tmp_path / "texts.tsv", run=tmp_path / "run.trec")
    with pytest.raises(ValueError, match="go with run"):
        load_dataset(tmp_path / "texts.tsv", **files)
    (tmp_path / "run.trec").write_text("q1 Q0 d1 1 2.5 bm25\nq1 Q0 d7 2 1.5 bm25\n")
    with pytest.raises(ValueError, match=r"1 documents of .* for example 'd7'"):
        load_dataset(tmp_path / "texts.tsv", run=tmp_path / "run.trec", **files)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q1 Q0 d1 1 2.5\n", "run.trec:1: a TREC run has 6 columns"),
        ("q1 Q0 d1 1 high t\n", "run.trec:1: could not convert"),
        ("q1 Q0 d1 1 2 t\nq1 Q0 d1 2 1 t\n", "'d1' 2 times"),
    ],
)
def test_damaged_runs(tmp_path, text, message):
    (tmp_path / "run.trec").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_trec_run(tmp_path / "run.trec")


def test_a_written_run_keeps_its_order_for_trec_eval(tmp_path):
    run = {"q1": [("a", 0.5), ("b", 0.5), ("c", 0.5), ("d", -1.25)], "q2": [("z", 3.0)]}
    write_trec_run(tmp_path / "run.trec", run, tag="mine")
    lines = (tmp_path / "run.trec").read_text().splitlines()
    assert lines[0] == "q1 Q0 a 1 0.5 mine"
    assert lines[3:] == ["q1 Q0 d 4 -1.25 mine", "q2 Q0 z 1 3.0 mine"]
    read = read_trec_run(tmp_path / "run.trec")
    scores = [np.float32(score) for _, score in read["q1"]]
    assert all(before > after for before, after in pairwise(scores))
    assert {qid: [d for d, _ in hits] for qid, hits in read.items()} == {"q1": list("abcd"), "q2": ["z"]}


@pytest.mark.parametrize(
    ("run", "message"),
    [({"q": [("a", float("nan"))]}, "NaN"), ({"q": [("a b", 1.0)]}, "'a b'"), ({"": [("a", 1.0)]}, "empty")],
)
def test_runs_that_cannot_be_written(tmp_path, run, message):
    with pytest.raises(ValueError, match=message):
        write_trec_run(tmp_path / "run.trec", run)
    assert not (tmp_path / "run.trec").exists()
