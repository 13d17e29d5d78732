"""Measures of a run by the `ir_measures` package, which asks trec_eval; a document's place in the list is its rank."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastrerank.data.datasets import Run

__all__ = ["DEFAULT_MEASURES", "import_ir_measures", "known_measures", "means", "measure"]

DEFAULT_MEASURES = ("nDCG@10", "MRR@10", "Recall@10", "Recall@100")
PerQuery = dict[str, dict[str, float]]
"""Query id -> measure -> value."""


def measure(
    run: Run,
    judgements: Mapping[str, Mapping[str, int]],
    *,
    recall_at: Sequence[int] = (10, 100),
    min_relevance: int = 1,
    measures: Sequence[str] | None = None,
) -> PerQuery:
    """Equal to `ir_measures.iter_calc` of nDCG@10, RR@10 and R@k, with a document's place in the list as its rank.

    Args:
        run: query id -> (document id, score) pairs, best first; the scores are not looked at.
        judgements: query id -> document id -> grade. Every judged query gets values, zeros where the run lacks it.
        recall_at: cut-offs of Recall, each at least 1; of no meaning with `measures`.
        min_relevance: smallest grade that counts as relevant, at least 1, for every measure that takes one (MRR,
            Recall, P, AP, ...) and does not say it, as `AP(rel=2)` does.
        measures: names that ir_measures knows, such as "nDCG@20", "P@5", "AP(rel=2)"; MRR and Recall are RR and R.

    Returns:
        query id -> {"nDCG@10", "MRR@10", "Recall@k"..., or the names in `measures`} -> value.

    Raises:
        ValueError: a cut-off or `min_relevance` below 1, or a measure that is unknown or cannot be computed here.
        ImportError: `ir_measures` is not installed.

    Example:
        >>> measure({"q": [("b", 2.0), ("a", 1.0)]}, {"q": {"a": 1}}, recall_at=(1,))["q"]["MRR@10"]
        0.5
    """
    if min_relevance < 1 or any(k < 1 for k in recall_at):
        raise ValueError(f"min_relevance and recall_at must be at least 1, got {min_relevance} and {tuple(recall_at)}")
    wanted = ["nDCG@10", "MRR@10", *(f"Recall@{k}" for k in recall_at)] if measures is None else measures
    names = known_measures(wanted, min_relevance)
    ir_measures = import_ir_measures()
    # trec_eval sorts by score and breaks ties by document id; strictly decreasing scores keep the list's order instead.
    by_rank = {qid: {docid: float(-rank) for rank, (docid, _) in enumerate(hits)} for qid, hits in run.items()}
    grades = {qid: dict(rels) for qid, rels in judgements.items()}
    values = {qid: dict.fromkeys(names, 0.0) for qid in judgements}
    found = {(v.query_id, v.measure): float(v.value) for v in ir_measures.iter_calc([*names.values()], grades, by_rank)}
    for qid, row in values.items():
        row.update({name: found[qid, parsed] for name, parsed in names.items() if (qid, parsed) in found})
    return values


def known_measures(names: Sequence[str], min_relevance: int = 1) -> dict[str, Any]:
    """Return {name: the ir_measures object of that name}, in order.

    Raises ValueError naming a measure that is unknown, is given twice, or needs a package that is not installed.

    Example:
        >>> known_measures(["MRR@10", "P@5"], min_relevance=2)
        {'MRR@10': RR(rel=2)@10, 'P@5': P(rel=2)@5}
    """
    ir_measures = import_ir_measures()
    found: dict[str, Any] = {}
    for name in names:
        if name in found:
            raise ValueError(f"measure {name!r} is given twice")
        try:
            parsed = ir_measures.parse_measure(re.sub(r"^MRR(?=$|[@(])", "RR", name.strip()))
        except (NameError, ValueError, SyntaxError, TypeError, KeyError, AssertionError) as error:
            example = "names are those of ir_measures, for example nDCG@10, RR(rel=2)@10, R@100, P@5, AP"
            raise ValueError(f"measure {name!r} is not known ({error}); {example}") from error
        if parsed.params.get("cutoff", 1) < 1:
            raise ValueError(f"measure {name!r}: its cut-off must be at least 1")
        relevance = parsed.SUPPORTED_PARAMS.get("rel")
        if relevance is not None and isinstance(relevance.default, int) and "rel" not in parsed.params:
            parsed = parsed(rel=min_relevance)
        if not ir_measures.DefaultPipeline.supports(parsed):
            raise ValueError(f"measure {name!r} needs a package that is not installed, see ir_measures' documentation")
        found[name] = parsed
    return found


def means(per_query: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return each measure's mean over the queries."""
    names = next(iter(per_query.values()))
    return {name: float(np.mean([values[name] for values in per_query.values()])) for name in names}


def import_ir_measures() -> Any:
    """Return the ir_measures module; an ImportError names the extra."""
    try:
        import ir_measures
    except ImportError as error:
        message = f"evaluation needs the ir_measures package ({error}): pip install 'fastrerank[eval]'"
        raise ImportError(message) from error
    return ir_measures
