"""The protocol that every reranker follows, and `load`, which finds the method that a checkpoint serves."""

from __future__ import annotations

import difflib
import importlib
import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast, overload

import numpy as np
import numpy.typing as npt

from fastrerank.checkpoints.checkpoint import Checkpoint, open_checkpoint
from fastrerank.engine.usage import Cost
from fastrerank.inputs.columns import as_column
from fastrerank.inputs.tokenizer import TokenBatch, check_texts
from fastrerank.rerankers.call import NO_OPTIONS, CallOptions
from fastrerank.rerankers.recognise import method_of
from fastrerank.runtime.naming import describe

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastrerank.rerankers.attention import AttentionReranker
    from fastrerank.rerankers.call import Options
    from fastrerank.rerankers.cross_encoder import CrossEncoder
    from fastrerank.rerankers.embedding import EmbeddingReranker
    from fastrerank.rerankers.late_interaction import LateInteractionReranker
    from fastrerank.rerankers.listwise import ListwiseReranker
    from fastrerank.rerankers.pairwise import PairwiseReranker
    from fastrerank.rerankers.pointwise import PointwiseReranker
    from fastrerank.rerankers.setwise import SetwiseReranker
    from fastrerank.runtime.types import Hit, MethodName, ModelPath

__all__ = ["Reranker", "Usage", "list_methods", "load", "order"]

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
        self, query: str, documents: Sequence[str], top_k: int | None = None, return_documents: bool = False, *,
        raw: bool = False, score_threshold: float | None = None, **options: Unpack[Options],
    ) -> list[Hit]:  # fmt: skip
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
    positions: npt.NDArray[np.int64], scores: npt.NDArray[Any], documents: Sequence[str] | None, top_k: int | None,
    score_threshold: float | None = None,
) -> list[Hit]:  # fmt: skip
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


# Method -> (module, class, papers).
_METHODS = {
    "cross-encoder": (
        "fastrerank.rerankers.cross_encoder",
        "CrossEncoder",
        "Passage Re-ranking with BERT (Nogueira and Cho 2019, arXiv 1901.04085)",
    ),
    "late-interaction": (
        "fastrerank.rerankers.late_interaction",
        "LateInteractionReranker",
        "ColBERT (Khattab and Zaharia 2020, arXiv 2004.12832)",
    ),
    "embedding": (
        "fastrerank.rerankers.embedding",
        "EmbeddingReranker",
        "Sentence-BERT (Reimers and Gurevych 2019, arXiv 1908.10084)",
    ),
    "pointwise": (
        "fastrerank.rerankers.pointwise",
        "PointwiseReranker",
        "monoT5 (Nogueira et al. 2020, arXiv 2003.06713), Qwen3 Embedding (Zhang et al. 2025, arXiv 2506.05176)",
    ),
    "listwise": (
        "fastrerank.rerankers.listwise",
        "ListwiseReranker",
        "FIRST (Reddy et al. 2024, arXiv 2406.15657); RankGPT (Sun et al. 2023, arXiv 2304.09542)",
    ),
    "pairwise": (
        "fastrerank.rerankers.pairwise",
        "PairwiseReranker",
        "Pairwise Ranking Prompting (Qin et al. 2023, arXiv 2306.17563)",
    ),
    "setwise": (
        "fastrerank.rerankers.setwise",
        "SetwiseReranker",
        "Setwise prompting (Zhuang et al. 2023, arXiv 2310.09497); Rank-R1 (Zhuang et al. 2025, arXiv 2503.06034)",
    ),
    "icr": (
        "fastrerank.rerankers.attention",
        "icr",
        "In-Context Reranking (Chen et al. 2024, arXiv 2410.02642)",
    ),
    "qrhead": (
        "fastrerank.rerankers.attention",
        "qrhead",
        "Query-focused retrieval heads (Zhang et al. 2025, arXiv 2506.09944)",
    ),
    "core": (
        "fastrerank.rerankers.attention",
        "core",
        "Contrastive retrieval heads (Tran et al. 2025, arXiv 2510.02219)",
    ),
}


def list_methods() -> dict[str, str]:
    """Return the method names that `load` takes, each with the paper it comes from.

    Example:
        >>> list_methods()["icr"]
        'In-Context Reranking (Chen et al. 2024, arXiv 2410.02642)'
    """
    return {name: paper for name, (_, _, paper) in _METHODS.items()}


@overload
def load(model: ModelPath, method: Literal["cross-encoder"], **options: Any) -> CrossEncoder: ...


@overload
def load(model: ModelPath, method: Literal["late-interaction"], **options: Any) -> LateInteractionReranker: ...


@overload
def load(model: ModelPath, method: Literal["embedding"], **options: Any) -> EmbeddingReranker: ...


@overload
def load(model: ModelPath, method: Literal["pointwise"], **options: Any) -> PointwiseReranker: ...


@overload
def load(model: ModelPath, method: Literal["listwise"], **options: Any) -> ListwiseReranker: ...


@overload
def load(model: ModelPath, method: Literal["pairwise"], **options: Any) -> PairwiseReranker: ...


@overload
def load(model: ModelPath, method: Literal["setwise"], **options: Any) -> SetwiseReranker: ...


@overload
def load(model: ModelPath, method: Literal["icr", "qrhead", "core"], **options: Any) -> AttentionReranker: ...


@overload
def load(model: ModelPath, method: str | None = None, **options: Any) -> Reranker: ...


def load(model: ModelPath, method: MethodName | str | None = None, **options: Any) -> Reranker:
    """Load a checkpoint as a reranker.

    Args:
        model: hub id or local folder.
        method: one of `list_methods()`; None finds it: a published LLM reranker by its name or files, a sequence
            classification head is a cross-encoder, a sentence-transformers model with Pooling is an embedding model.
        options: the class's own keywords (device, dtype, max_length, num_threads, revision, token, ...).

    Raises ValueError for an unknown method, and for a checkpoint that the method, or every method, must refuse;
    TypeError for a keyword that the method does not have, with those that it has.

    Example:
        >>> load("path/to/all-MiniLM-L6-v2", method="late-interaction")  # doctest: +SKIP
    """
    if method is not None and method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(_METHODS)}, got {method!r}")
    if method is None:
        hub = ("revision", "cache_folder", "local_files_only", "token", "trust_remote_code")
        method = _method_of(open_checkpoint(model, **{key: options[key] for key in hub if key in options}))
    _check_keywords(method, options)
    module, name, _ = _METHODS[method]
    reranker = getattr(importlib.import_module(module), name)(model, **options)
    return cast("Reranker", reranker)


def _check_keywords(method: str, options: dict[str, Any]) -> None:
    from fastrerank.rerankers.options import load_keywords, other_keywords

    known = load_keywords(method)
    unknown = [name for name in options if name not in known and name not in other_keywords(method)]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, 1)
        meant = f" (did you mean {near[0]!r}?)" if near else ""
        raise TypeError(
            f"load() got an unexpected keyword argument {unknown[0]!r}{meant}: method {method!r} takes "
            f"{', '.join(known)}"
        )


def _method_of(checkpoint: Checkpoint) -> str:
    found = method_of(checkpoint)
    if found is not None:
        return found
    architectures = checkpoint.config.get("architectures") or []
    kinds = [module.type for module in checkpoint.modules]
    if checkpoint.st_config.get("model_type") == "CrossEncoder" or (
        not kinds and any(name.endswith("ForSequenceClassification") for name in architectures)
    ):
        return "cross-encoder"
    if "Pooling" in kinds:
        return "embedding"
    if any(name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for name in architectures):
        raise ValueError(
            f"{checkpoint.path} is a language model ({', '.join(architectures)}) of a name that tells no method: say "
            "method='pointwise', 'listwise', 'pairwise' or 'setwise', and template= where it was trained with one; or "
            "method='icr', which needs no training but a decoder"
        )
    raise ValueError(
        f"{checkpoint.path}: cannot tell which method this checkpoint is for (architectures {architectures}, no "
        "pooling modules); say method='late-interaction' or method='embedding' to use its token vectors"
    )
