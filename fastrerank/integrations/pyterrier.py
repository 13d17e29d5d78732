"""PyTerrier: a transformer that ranks results anew. It runs without Java."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyterrier as pt

import fastrerank
from fastrerank.rerankers.base import Reranker

__all__ = ["FastReRanker"]


class FastReRanker(pt.Transformer):
    """Gives each result (qid, query, docno, text) the method's raw score, and ranks within each query from 0.

    Args:
        model: hub id, local folder, or a loaded reranker of any method.
        method, options: as in `fastrerank.load`.
        text_field: column of the documents' texts; other columns are kept.

    Example:
        >>> bm25 % 100 >> pt.get.get_text(dataset) >> FastReRanker("BAAI/bge-reranker-base")  # doctest: +SKIP
    """

    def __init__(self, model: Any, *, method: str | None = None, text_field: str = "text", **options: Any) -> None:
        super().__init__()
        loaded = isinstance(model, Reranker)
        self.name = type(model).__name__ if loaded else str(model)
        self.reranker: Reranker = model if loaded else fastrerank.load(model, method=method, **options)
        self.text_field = text_field

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Return the rows with `score` and `rank`; no rows give none. All queries are scored in one pass."""
        pt.validate.result_frame(inp, extra_columns=["query", self.text_field], context=self)
        out = inp.drop(columns=["score", "rank"], errors="ignore")
        # where each query's rows are, in the order of the frame
        places = list(out.groupby("qid", sort=False).indices.values())
        texts, queries = out[self.text_field].tolist(), out["query"].tolist()
        found = self.reranker.score_many(
            [queries[rows[0]] for rows in places], [[texts[i] for i in rows] for rows in places]
        )
        scores = np.zeros(len(out), np.float32)
        for rows, values in zip(places, found, strict=True):
            scores[rows] = values
        return pt.model.add_ranks(out.assign(score=scores))

    def __repr__(self) -> str:
        return f"FastReRanker({self.name!r})"
