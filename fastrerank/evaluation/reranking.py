"""One reranker on one judged data set, in this process: the run, its measures, and the seconds of each query."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fastrerank.data.datasets import JudgedQuery, Run, load_dataset
from fastrerank.evaluation.measures import PerQuery, import_ir_measures, means, measure
from fastrerank.rerankers.base import Reranker

__all__ = ["Evaluation", "Ranker", "check_queries", "evaluate", "first_stage", "rerank"]


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
        run: query id -> (document id, score) pairs, best first; what `write_trec_run` writes. Scores are raw.
        judged: how many of the Q queries have judgements.
    """

    metrics: dict[str, float]
    first_stage: dict[str, float]
    per_query: PerQuery
    latencies: npt.NDArray[np.float64]
    run: Run = field(repr=False)
    judged: int

    def __repr__(self) -> str:
        found = ", ".join(f"{name} {value:.4f}" for name, value in self.metrics.items())
        return f"Evaluation({found}; {self.judged} judged queries, p50 {1000 * self.latency_p50:.1f} ms)"

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
    warmup: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Equal to trec_eval (and MS MARCO's MRR) on the run that reranking every query's candidates gives.

    The measures see the order that `reranker.rank` returns, also where scores tie. A warm-up call on the first query is
    made before the clock starts, so latencies are those of a process that is already running.

    Args:
        reranker: anything with `rank(query, documents) -> [{"corpus_id", "score"}, ...]`.
        dataset: `JudgedQuery` objects, or a path that `load_dataset` reads.
        top_k: rerank only the first `top_k` candidates of each query; the rest follow in first-stage order. None: all.
        recall_at: the cut-offs of Recall.
        min_relevance: smallest grade that counts as relevant for MRR and Recall (TREC Deep Learning uses 2).
        warmup: how many queries are ranked before the clock starts.
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
    import_ir_measures()  # fails before the work, not after it
    queries = load_dataset(dataset) if isinstance(dataset, (str, os.PathLike)) else list(dataset)
    check_queries(queries)
    run, latencies = rerank(reranker, queries, top_k=top_k, warmup=warmup, progress=progress)
    judgements = {query.qid: query.judgements for query in queries if query.judgements}
    per_query = measure(run, judgements, recall_at=recall_at, min_relevance=min_relevance)
    before = measure(first_stage(queries), judgements, recall_at=recall_at, min_relevance=min_relevance)
    return Evaluation(means(per_query), means(before), per_query, latencies, run, judged=len(judgements))


def check_queries(queries: Sequence[JudgedQuery]) -> None:
    """Raise ValueError for no queries, no judgements, and a query id that is there twice."""
    if not queries:
        raise ValueError("dataset holds no queries")
    if not any(query.judgements for query in queries):
        raise ValueError('dataset holds no relevance judgements: candidates need "rel", or pass qrels')
    twice, count = Counter(query.qid for query in queries).most_common(1)[0]
    if count > 1:
        raise ValueError(f"query id {twice!r} is {count} times in the dataset")


def first_stage(queries: Sequence[JudgedQuery]) -> Run:
    """Return the candidates' own order as a run, whose scores are the ranks from 0, negated."""
    return {query.qid: [(c.docid, float(-rank)) for rank, c in enumerate(query.candidates)] for query in queries}


def rerank(
    reranker: Ranker,
    queries: Sequence[JudgedQuery],
    *,
    top_k: int | None = None,
    warmup: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Run, npt.NDArray[np.float64]]:
    """Return the run that reranking every query's candidates gives, and each query's seconds, float64 (Q,).

    Scores of the library's own rerankers are raw. The first `warmup` queries are ranked once more before the clock
    starts. See `evaluate` for the arguments.
    """
    for query in queries[:warmup]:
        _rank(reranker, query, top_k)
    run, latencies = {}, np.zeros(len(queries))
    for done, query in enumerate(queries):
        start = time.perf_counter()
        run[query.qid] = _rank(reranker, query, top_k)
        latencies[done] = time.perf_counter() - start
        if progress is not None:
            progress(done + 1, len(queries))
    return run, latencies


def _rank(reranker: Ranker, query: JudgedQuery, top_k: int | None) -> list[tuple[str, float]]:
    head = query.candidates[:top_k]
    if not head:
        return []
    texts = [candidate.text for candidate in head]
    # An activation may saturate to one value where raw scores still differ.
    hits: Sequence[Mapping[str, Any]]
    if isinstance(reranker, Reranker):
        hits = reranker.rank(query.query, texts, raw=True)
    else:
        hits = reranker.rank(query.query, texts)
    order = [int(hit["corpus_id"]) for hit in hits]
    if sorted(order) != list(range(len(head))):
        raise ValueError(
            f"query {query.qid!r}: rank() returned {len(order)} ids that are not a permutation of 0..{len(head) - 1}"
        )
    ranked = [(head[i].docid, float(hit["score"])) for i, hit in zip(order, hits, strict=True)]
    tail = query.candidates[len(head) :]
    floor = ranked[-1][1]
    return ranked + [(candidate.docid, floor - rank) for rank, candidate in enumerate(tail, start=1)]
