"""The protocol that every reranker follows."""

from __future__ import annotations

import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from fastrerank.engine.usage import Cost
from fastrerank.inputs.columns import as_column
from fastrerank.inputs.tokenizer import TokenBatch, check_texts
from fastrerank.rerankers.call import NO_OPTIONS, CallOptions
from fastrerank.runtime.naming import describe

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastrerank.rerankers.call import Options
    from fastrerank.runtime.types import Hit

__all__ = ["Reranker", "Usage", "order"]

Scores = npt.NDArray[np.float32]


@dataclass
class Usage:
    """What one call cost: forwards, tokens, cut texts, and seconds per stage.

    Methods that ask a model about several documents at a time count `comparisons` (windows, pairs, sets or groups that
    were asked about) and `steps` (batches of them, one after the other); `unparsed`: written answers that were
    malformed or incomplete; `untouched`: documents that the window rule never reads. `query_tokens`: tokens of each
    query's pairs, [] where a method does not tell them apart.
    """

    forwards: int = 0
    tokens: int = 0
    prefix_tokens: int = 0
    truncated: int = 0
    query_truncated: bool = False
    steps: int = 0
    comparisons: int = 0
    unparsed: int = 0
    untouched: int = 0
    query_tokens: list[int] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def add(self, cost: Cost) -> None:
        """Count the forwards and tokens of an engine's call."""
        self.forwards += cost.forwards
        self.tokens += cost.tokens
        self.prefix_tokens += cost.prefix_tokens

    def count(self, batch: TokenBatch, cost: Cost | None = None) -> None:
        """Count a batch and what it cost: one forward of all its tokens, where nothing else is said."""
        self.add(Cost(1, len(batch.ids), 0) if cost is None else cost)
        self.truncated += int(batch.truncated.sum())
        self.query_truncated |= batch.query_truncated


class Reranker(ABC):
    """Scores documents for a query. One object may be called from many threads at once.

    A method states three things about itself:

    method: its name, as `load` takes it.
    independent: whether a document's score is the same whatever other documents there are; there is no default. Where
        it is not, a request is never split: batches, pairs without their list, and files of pairs take it whole or
        refuse it.
    call_options: names of `Options` that its `_score_many` honours; all others are refused.
    """

    method: ClassVar[str]
    independent: ClassVar[bool]
    call_options: ClassVar[frozenset[str]] = frozenset()

    def __init__(self) -> None:
        self._local = threading.local()

    @property
    def raw_is_logit(self) -> bool:
        """Whether a raw score is a logit, whose sigmoid is a probability: here False."""
        return False

    @property
    def last_usage(self) -> dict[str, Any]:
        """What this thread's last call cost.

        {"forwards", "tokens", "prefix_tokens", "truncated": documents that were cut, "query_truncated": bool,
        "steps", "comparisons", "unparsed", "untouched": see `Usage`, 0 for methods that score documents one by one,
        "query_tokens": tokens of each query's pairs, [] where the method does not tell them apart,
        "seconds": {stage: seconds}}; {} before the first call.
        """
        usage: Usage | None = getattr(self._local, "usage", None)
        return {} if usage is None else dict(vars(usage))

    @abstractmethod
    def _score_many(
        self, queries: list[str], documents: list[list[str]], usage: Usage, call: CallOptions = NO_OPTIONS
    ) -> list[Scores]:
        """Raw scores of checked texts, one array per query. `call` has only options of `call_options`."""

    def _scored(self, queries: list[str], documents: list[list[str]], usage: Usage, call: CallOptions) -> list[Scores]:
        """`_score_many`, whose last argument is for methods that have `call_options`."""
        return self._score_many(queries, documents, usage, *(() if call == NO_OPTIONS else (call,)))

    @property
    def honoured_options(self) -> frozenset[str]:
        """Those of `call_options` that this checkpoint honours: here all."""
        return self.call_options

    def check_options(self, **options: Any) -> CallOptions:
        """Return the options of a call, checked as `score` checks them, before anything runs.

        Raises TypeError for an unknown option or a wrong type, ValueError for one that this method or checkpoint cannot
        honour.

        Example:
            >>> reranker.check_options(max_tokens_per_doc=256).keywords()  # doctest: +SKIP
            {'max_tokens_per_doc': 256}
        """
        return CallOptions.of(options, self.honoured_options, self.method)

    def activated(self, scores: Scores) -> Scores:
        """Return what `rank` shows for raw scores, float32 of the same shape: here the scores themselves.

        Methods whose raw score is a logit return probabilities, cross-encoders what their activation makes of it.
        """
        return scores

    def _positions(self, scores: Scores, shown: npt.NDArray[Any]) -> npt.NDArray[np.int64]:  # noqa: ARG002
        """Positions best first, of raw scores and of what is shown for them: here in the order of the raw scores.

        Whatever ranks by this object takes its order from here, so that all ways to it give one order.
        """
        return order(scores)

    def score(self, query: str, documents: Sequence[str], **options: Unpack[Options]) -> Scores:
        """Return the raw ranking score of each document, float32 (N,), higher is better.

        Args:
            query: the query. documents: N str.
            options: `label`, `instruction`, `max_length`, `max_tokens_per_doc`, `max_tokens_per_query`,
                `truncation_side`, `truncate`, for this call alone; see `CallOptions` and `TextLimits`. Those that the
                method cannot honour raise ValueError with the reason.

        Raises TypeError naming the position of a query or document that is not a str; `TooLong`, a ValueError, with
        `truncate=False` where a text would be cut.

        Example:
            >>> reranker.score("who?", ["the owl", "the cat"])  # doctest: +SKIP
        """
        call = self.check_options(**options)
        (checked,) = check_texts([query], "query", scalar=True)
        texts = check_texts(documents, "documents")
        with self._call() as usage:
            return self._finite(self._scored([checked], [texts], usage, call))[0]

    def score_many(
        self, queries: Sequence[str], documents: Sequence[Sequence[str]], **options: Unpack[Options]
    ) -> list[Scores]:
        """Return `[score(q, d, **options) for q, d in zip(queries, documents)]`, computed in one pass over all pairs.

        `documents` holds one list per query. Raises as `score`, and ValueError if the lengths differ.
        """
        call = self.check_options(**options)
        checked, documents = check_texts(queries, "queries"), as_column(documents, "documents")
        if len(documents) != len(checked):
            raise ValueError(f"documents must hold one list per query: {len(checked)}, got {len(documents)}")
        texts = [check_texts(some, f"documents[{i}]") for i, some in enumerate(documents)]
        with self._call() as usage:
            return self._finite(self._scored(checked, texts, usage, call))

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int | None = None,
        return_documents: bool = False,
        *,
        raw: bool = False,
        score_threshold: float | None = None,
        **options: Unpack[Options],
    ) -> list[Hit]:
        """Return documents sorted by `score`, best first; ties keep the order they came in.

        Args:
            query: the query. documents: N str.
            top_k: how many to return; None for all.
            return_documents: whether each entry carries its "text".
            raw: whether "score" is the raw score; else it is `activated`, such as a probability.
            score_threshold: leaves out documents whose "score" is lower.
            options: as in `score`.

        Returns [{"corpus_id": position in documents, "score": float, "text"?: str}, ...].
        Raises TypeError for texts that are not str and a score_threshold that is no number, ValueError for a negative
        top_k and a threshold that is not finite.

        Example:
            >>> reranker.rank("who?", ["the owl", "the cat"], top_k=1)  # doctest: +SKIP
            [{'corpus_id': 0, 'score': 0.41}]
        """
        check_top_k(top_k)
        check_threshold(score_threshold)
        texts = check_texts(documents, "documents")
        scores = self.score(query, texts, **options)
        return self._ranked(scores, texts if return_documents else None, top_k, raw, score_threshold)

    def _ranked(
        self, scores: Scores, texts: list[str] | None, top_k: int | None, raw: bool, score_threshold: float | None
    ) -> list[Hit]:
        """Rows of raw scores, best first, which show them activated unless `raw`."""
        shown = scores if raw else self.activated(scores)
        return ranked(self._positions(scores, shown), shown, texts, top_k, score_threshold)

    @contextmanager
    def _call(self) -> Iterator[Usage]:
        usage = Usage()
        with usage.stage("total"):
            yield usage
        self._local.usage = usage

    def _finite(self, results: list[Scores]) -> list[Scores]:
        for i, scores in enumerate(results):
            finite = np.isfinite(scores)
            if not finite.all():
                bad = np.argwhere(~finite)[0]
                where = f"document {bad[0]}" + (f" of query {i}" if len(results) > 1 else "")
                raise FloatingPointError(
                    f"the model's score of {where} is NaN or infinite, so it cannot be ranked: "
                    "the weights are damaged or overflow in this precision (try dtype='float32')"
                )
        return results

    def __repr__(self) -> str:
        return describe(self)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            f"{type(self).__name__} cannot be pickled: its weights are packed for this CPU; load the checkpoint anew "
            "in the other process"
        )


def check_top_k(top_k: int | None) -> None:
    """Raise ValueError unless `top_k` is None or an int >= 0."""
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, (int, np.integer)) or top_k < 0):
        raise ValueError(f"top_k must be None or an int of at least 0, got {top_k!r}")


def check_threshold(score_threshold: float | None) -> None:
    """Raise TypeError unless `score_threshold` is None or a number, ValueError unless it is finite."""
    check_number("score_threshold", score_threshold, none=True)
    if score_threshold is not None and not math.isfinite(score_threshold):
        raise ValueError(f"score_threshold must be a finite number or None, got {score_threshold!r}")


def check_number(name: str, value: float | None, *, none: bool = False) -> None:
    """Raise TypeError naming the argument unless it is a number, or with `none` None."""
    if value is None and none:
        return
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        wanted = "a number or None" if none else "a number"
        raise TypeError(f"{name} must be {wanted}, got {type(value).__name__} {value!r}")


def order(*keys: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Return positions sorted by the first key descending, ties by the next, the last ties by position."""
    positions = np.arange(len(keys[0]))
    return np.lexsort((positions, *(-key for key in reversed(keys))))


def ranked(
    positions: npt.NDArray[np.int64],
    scores: npt.NDArray[Any],
    documents: Sequence[str] | None,
    top_k: int | None,
    score_threshold: float | None = None,
) -> list[Hit]:
    """Return the result rows for `positions` in order, with texts where `documents` is given.

    Rows whose score is below `score_threshold` are left out; see `check_threshold`.
    """
    check_threshold(score_threshold)
    if score_threshold is not None:
        positions = positions[np.asarray(scores)[positions] >= score_threshold]
    rows: list[Hit] = [{"corpus_id": int(i), "score": float(scores[i])} for i in positions[:top_k]]
    if documents is not None:
        for row in rows:
            row["text"] = documents[row["corpus_id"]]
    return rows
