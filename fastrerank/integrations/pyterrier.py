"""PyTerrier: a transformer that ranks results anew. It runs without Java."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pandas as pd
import pyterrier as pt

from fastrerank.integrations.loading import call_options, load_reranker, name_of
from fastrerank.rerankers.pairs import shown

__all__ = ["FastReRanker"]

# Attributes that a copy may change without reloading the model.
_LIGHT = frozenset({"text_field", "label", "raw"})


class FastReRanker(pt.Transformer):
    """Gives each result (qid, query, docno, text) the method's score, and ranks within each query from 0.

    Args:
        model: hub id, local folder, or a loaded reranker of any method.
        method, options: as in `fastrerank.load`.
        text_field: column of the documents' texts; other columns are kept.
        label: the label that ranks where the head has several, by name or number.
        raw: whether scores are raw, as a run of an evaluation wants them; else activated, as `rank` shows them.

    Raises ValueError for a head with several labels where nothing tells which one ranks.

    Example:
        >>> bm25 % 100 >> pt.get.get_text(dataset) >> FastReRanker("BAAI/bge-reranker-base")  # doctest: +SKIP
    """

    def __init__(
        self,
        model: Any,
        *,
        method: str | None = None,
        text_field: str = "text",
        label: str | int | None = None,
        raw: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        # PyTerrier's inspection finds every argument under its own name.
        self.model, self.method, self.text_field = model, method, text_field
        self.label, self.raw, self.options = label, raw, options
        self.name = name_of(model)
        self.reranker = load_reranker(model, method, options, label)

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Return the rows with `score` and `rank`; no rows give none. All queries are scored in one pass.

        Raises ValueError naming a qid whose rows have several queries.
        """
        pt.validate.result_frame(inp, extra_columns=["query", self.text_field], context=self)
        out = inp.drop(columns=["score", "rank"], errors="ignore")
        # where each query's rows are, in the order of the frame
        groups = out.groupby("qid", sort=False).indices
        texts, queries = out[self.text_field].tolist(), out["query"].tolist()
        for qid, rows in groups.items():
            if any(queries[i] != queries[rows[0]] for i in rows):
                raise ValueError(f"qid {qid!r} has several queries: a query's documents are ranked by one")
        places = list(groups.values())
        found = self.reranker.score_many(
            [queries[rows[0]] for rows in places],
            [[texts[i] for i in rows] for rows in places],
            **call_options(self.label),
        )
        scores = np.zeros(len(out), np.float32)
        for rows, values in zip(places, found, strict=True):
            scores[rows] = shown(self.reranker, values, self.raw)
        return pt.model.add_ranks(out.assign(score=scores))

    def apply_attributes(self, **attributes: Any) -> FastReRanker:
        """Return a transformer with other arguments; the model is shared where they do not concern it.

        Raises TypeError for a name that is no argument.
        """
        known = {item.name: item.value for item in pt.inspect.transformer_attributes(self)}
        unknown = [name for name in attributes if name not in known]
        if unknown:
            raise TypeError(f"FastReRanker has no {', '.join(unknown)}; there are {', '.join(known)}")
        if attributes.keys() <= _LIGHT:
            changed = copy.copy(self)
            vars(changed).update(attributes)
            changed.reranker.check_options(**call_options(changed.label))
            return changed
        given = known | attributes
        return FastReRanker(given.pop("model"), **given.pop("options"), **given)

    def __repr__(self) -> str:
        return f"FastReRanker({self.name!r})"
