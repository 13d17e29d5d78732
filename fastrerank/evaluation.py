"""The measures of the field: rerank a judged data set and score the ranking; data sets come from `fastrerank.datasets`.

The measures come from the `ir_measures` package (`pip install 'fastrerank[eval]'`), so they are trec_eval's.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from .datasets import Candidate, JudgedQuery, Run, judged_query, load_dataset, read_trec_run, write_trec_run

__all__ = [
    "Candidate",
    "Evaluation",
    "JudgedQuery",
    "evaluate",
    "judged_query",
    "load_dataset",
    "measure",
    "read_trec_run",
    "write_trec_run",
]


class Ranker(Protocol):
    """What `evaluate` needs of a reranker: the `rank` that every class behind `fastrerank.load` has."""

    def rank(self, query: str, documents: Sequence[str]) -> list[dict[str, Any]]: ...


@dataclass
class Evaluation:
    """What `evaluate` found.

    Attributes:
        metrics: measure name ("nDCG@10", "MRR@10", "Recall@10", ...) -> mean over the judged queries, reranked.
        first_stage: the same measures of the candidates' own order.
        per_query: query id -> measure name -> value, reranked, for judged queries.
        latencies: float64 (Q,), seconds of each query's `rank` call, text in, ranking out, in the data set's order.
        run: query id -> (document id, score) pairs, best first; what `write_trec_run` writes.
        judged: how many of the Q queries have judgements.
    """

    metrics: dict[str, float]
    first_stage: dict[str, float]
    per_query: dict[str, dict[str, float]]
    latencies: np.ndarray
    run: Run = field(repr=False)
    judged: int

    @property
    def latency_p50(self) -> float:
        """Median seconds per query."""
        return float(np.percentile(self.latencies, 50))

    @property
    def latency_p95(self) -> float:
        """95th percentile of the seconds per query."""
        return float(np.percentile(self.latencies, 95))


def evaluate(
    reranker: Ranker,
    dataset: str | os.PathLike[str] | Sequence[JudgedQuery],
    *,
    top_k: int | None = None,
    recall_at: Sequence[int] = (10, 100),
    min_relevance: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Equal to trec_eval (and MS MARCO's MRR) on the run that reranking every query's candidates gives.

    The measures see the order that `reranker.rank` returns, also where scores tie. One warm-up call on the first query
    is made before the clock starts, so latencies are those of a process that is already running.

    Args:
        reranker: anything with `rank(query, documents) -> [{"corpus_id", "score"}, ...]`.
        dataset: `JudgedQuery` objects, or a path that `load_dataset` reads.
        top_k: rerank only the first `top_k` candidates of each query; the rest follow in first-stage order. None: all.
        recall_at: the cut-offs of Recall.
        min_relevance: smallest grade that counts as relevant for MRR and Recall (TREC Deep Learning uses 2).
        progress: called with (queries done, queries in all) after every query.

    Raises:
        ValueError: no queries, no judgements, a cut-off below 1, or a ranking that is not one of the candidates given.
        ImportError: `ir_measures` is not installed.

    Example:
        >>> import fastrerank
        >>> from fastrerank.evaluation import evaluate
        >>> result = evaluate(fastrerank.load("path/to/model"), "dl19.jsonl.gz")        # doctest: +SKIP
        >>> print(result.metrics["nDCG@10"], 1e3 * result.latency_p50)                  # doctest: +SKIP
    """
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1 (or None for all candidates), got {top_k}")
    _import_ir_measures()  # before the work, not after it
    queries = load_dataset(dataset) if isinstance(dataset, (str, os.PathLike)) else list(dataset)
    if not queries:
        raise ValueError("dataset holds no queries")
    if not any(query.judgements for query in queries):
        raise ValueError('dataset holds no relevance judgements: candidates need "rel", or pass qrels')

    twice, count = Counter(query.qid for query in queries).most_common(1)[0]
    if count > 1:
        raise ValueError(f"query id {twice!r} is {count} times in the dataset")

    first, run = {}, {}
    latencies = np.zeros(len(queries))
    _rank(reranker, queries[0], top_k)
    for done, query in enumerate(queries):
        first[query.qid] = [(c.docid, float(-rank)) for rank, c in enumerate(query.candidates)]
        start = time.perf_counter()
        run[query.qid] = _rank(reranker, query, top_k)
        latencies[done] = time.perf_counter() - start
        if progress is not None:
            progress(done + 1, len(queries))

    judgements = {query.qid: query.judgements for query in queries if query.judgements}
    per_query = measure(run, judgements, recall_at=recall_at, min_relevance=min_relevance)
    before = measure(first, judgements, recall_at=recall_at, min_relevance=min_relevance)
    return Evaluation(_means(per_query), _means(before), per_query, latencies, run, judged=len(judgements))


def _rank(reranker: Ranker, query: JudgedQuery, top_k: int | None) -> list[tuple[str, float]]:
    head = query.candidates[:top_k]
    if not head:
        return []
    hits = reranker.rank(query.query, [candidate.text for candidate in head])
    order = [int(hit["corpus_id"]) for hit in hits]
    if sorted(order) != list(range(len(head))):
        raise ValueError(
            f"query {query.qid!r}: rank() returned {len(order)} ids that are not a permutation of 0..{len(head) - 1}"
        )
    ranked = [(head[i].docid, float(hit["score"])) for i, hit in zip(order, hits, strict=True)]
    tail = query.candidates[len(head) :]
    floor = ranked[-1][1]
    return ranked + [(candidate.docid, floor - rank) for rank, candidate in enumerate(tail, start=1)]


def measure(
    run: Run,
    judgements: Mapping[str, Mapping[str, int]],
    *,
    recall_at: Sequence[int] = (10, 100),
    min_relevance: int = 1,
) -> dict[str, dict[str, float]]:
    """Equal to `ir_measures.iter_calc` of nDCG@10, RR@10 and R@k, with a document's place in the list as its rank.

    Args:
        run: query id -> (document id, score) pairs, best first; the scores are not looked at.
        judgements: query id -> document id -> grade. Every judged query gets values, zeros where the run lacks it.
        recall_at: cut-offs of Recall, each at least 1.
        min_relevance: smallest grade that counts as relevant for MRR and Recall, at least 1.

    Returns:
        query id -> {"nDCG@10", "MRR@10", "Recall@k"...} -> value.

    Raises:
        ValueError: a cut-off or `min_relevance` below 1.
        ImportError: `ir_measures` is not installed.

    Example:
        >>> measure({"q": [("b", 2.0), ("a", 1.0)]}, {"q": {"a": 1}}, recall_at=(1,))["q"]["MRR@10"]
        0.5
    """
    if min_relevance < 1 or any(k < 1 for k in recall_at):
        raise ValueError(f"min_relevance and recall_at must be at least 1, got {min_relevance} and {tuple(recall_at)}")
    ir_measures = _import_ir_measures()
    names = {ir_measures.nDCG @ 10: "nDCG@10", ir_measures.RR(rel=min_relevance) @ 10: "MRR@10"}
    names |= {ir_measures.R(rel=min_relevance) @ k: f"Recall@{k}" for k in recall_at}
    # trec_eval sorts by score and breaks ties by document id; strictly decreasing scores keep the list's order instead.
    by_rank = {qid: {docid: float(-rank) for rank, (docid, _) in enumerate(hits)} for qid, hits in run.items()}
    values = {qid: dict.fromkeys(names.values(), 0.0) for qid in judgements}
    for value in ir_measures.iter_calc(list(names), {qid: dict(rels) for qid, rels in judgements.items()}, by_rank):
        values[value.query_id][names[value.measure]] = float(value.value)
    return values


def _means(per_query: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    names = next(iter(per_query.values()))
    return {name: float(np.mean([values[name] for values in per_query.values()])) for name in names}


def _import_ir_measures() -> Any:
    try:
        import ir_measures
    except ImportError as error:
        message = f"evaluation needs the ir_measures package ({error}): pip install 'fastrerank[eval]'"
        raise ImportError(message) from error
    return ir_measures
