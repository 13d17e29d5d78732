"""Listwise rerankers: a model ranks windows, or scores groups, of documents that it sees together."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fastrerank.inputs.columns import as_column
from fastrerank.inputs.tokenizer import check_texts
from fastrerank.rerankers.base import Scores, Usage, check_threshold, check_top_k, order
from fastrerank.rerankers.call import NO_OPTIONS, CallOptions
from fastrerank.rerankers.generation import Generate
from fastrerank.rerankers.grouprank import Shuffles, score_groups
from fastrerank.rerankers.list_questions import ListReranker, Request, Texts
from fastrerank.rerankers.ranking_parser import answer_of, parse_permutation
from fastrerank.rerankers.schedules import check_windows, run_together, sliding_windows, untouched
from fastrerank.runtime.types import Algorithm, Hit, Readout, WindowRule

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastrerank.rerankers.call import Options

__all__ = ["ListwiseReranker"]

log = logging.getLogger("fastrerank")


class ListwiseReranker(ListReranker):
    """Ranks documents window by window from the tail, by the identifiers' logits (FIRST) or by a written ranking.

    FIRST reads the logits of all identifiers at the first position of the answer and sorts them, ties by position.
    Generative templates (RankGPT, RankZephyr, ReasonRank, DeAR, CodeRankLLM, InsertRank) write "[3] > [1] > ...".
    GroupRank scores documents in shuffled groups instead of windows.

    Args:
        model: hub id or local folder. With `generate`, only its tokenizer and chat template are used.
        template: "first", "first-rank_llm", "rankgpt", ..., or a template file of kind "listwise"; None for what the
            checkpoint was trained with, where it can be recognised, else "first".
        window, stride: documents in a prompt, and by how many places windows move on; None for half a window, which is
            10 of 20. `window` is also the group size.
        window_rule: "rank_llm" reads every document; "rankgpt" stops at the last whole window from the tail and leaves
            the documents before it where they are: counted in `last_usage["untouched"]`, with a warning.
        algorithm: "windows" or "groups"; None: what the template says, groups for GroupRank's.
        epochs, seed: of the groups; each query's shuffles depend on the seed and its text alone.
        readout, generate, max_new_tokens: see `ListReranker`. Logits name at most 26 documents by letters, 9 by digits.
        options: instruction, device, dtype, max_length, num_threads, memory_limit, share_prefixes, trust_remote_code,
            revision, cache_folder, local_files_only, token.

    `score` is the identifiers' logits if FIRST sees all documents in one window. With several windows, or a written
    ranking, it is N - rank (N for the best). With groups it is GroupRank's score, in [0, 1] unless `first_stage` is
    mixed in.

    Papers: FIRST, Reddy et al. 2024, arXiv 2406.15657; RankGPT, Sun et al. 2023, arXiv 2304.09542; RankZephyr, Pradeep
    et al. 2023, arXiv 2312.02724; ReasonRank, arXiv 2508.07050; DeAR, arXiv 2508.16998; CodeRankLLM (CoRNStack), arXiv
    2412.01007; InsertRank, arXiv 2506.14086; GroupRank, arXiv 2511.11653.

    Raises ValueError naming the argument for sizes, rules and templates that cannot rank.

    Example:
        >>> reranker = ListwiseReranker("rryisthebest/First_Model")           # doctest: +SKIP
        >>> reranker.rank("who?", ["the owl", "the cat"])[0]["corpus_id"]     # doctest: +SKIP
        0
    """

    method: ClassVar[str] = "listwise"
    independent: ClassVar[bool] = False
    kind: ClassVar[str] = "listwise"
    default_template: ClassVar[str] = "first"
    default_seq2seq: ClassVar[str] = "first"

    def __init__(
        self,
        model: str | Path,
        *,
        template: str | Path | None = None,
        window: int = 20,
        stride: int | None = None,
        window_rule: WindowRule = "rank_llm",
        algorithm: Algorithm | None = None,
        epochs: int = 2,
        seed: int = 0,
        readout: Readout | None = None,
        generate: Generate | None = None,
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> None:
        if algorithm not in (None, "windows", "groups"):
            raise ValueError(f"algorithm must be None, 'windows' or 'groups', got {algorithm!r}")
        if stride is None and isinstance(window, int):
            stride = max(window // 2, 1)
        check_windows(window, stride, window_rule)
        for name, value, least in (("epochs", epochs, 1), ("seed", seed, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")
        super().__init__(
            model,
            template=template,
            count=window,
            readout=readout,
            generate=generate,
            max_new_tokens=max_new_tokens,
            **options,
        )
        if algorithm is None:
            algorithm = "groups" if self.template.algorithm == "groups" else "windows"
        if algorithm == "groups" and self.readout == "logits":
            raise ValueError("algorithm 'groups' reads scores that a model writes: it needs readout='generation'")
        self.window, self.stride, self.window_rule = window, stride, window_rule
        self.algorithm, self.epochs, self.seed = algorithm, epochs, seed

    def score(
        self,
        query: str,
        documents: Sequence[str],
        *,
        first_stage: Sequence[float] | None = None,
        **options: Unpack[Options],
    ) -> Scores:
        """Return one score per document, float32 (N,), higher is better; see the class for what they are.

        Args:
            query: the query. documents: N str.
            first_stage: N finite scores of the first stage, for templates that print them (InsertRank: required) and
                for groups (GroupRank: the result is 0.6 * score + 0.4 * first_stage).
            options: as in `Reranker.score`.

        Raises TypeError for texts that are not str; ValueError for `first_stage` of another length, with values that
        are not finite, missing where the template prints it, or given where nothing reads it.

        Example:
            >>> reranker.score("who?", ["the owl", "the cat"], first_stage=[12.1, 9.7])  # doctest: +SKIP
        """
        call = self.check_options(**options)
        given = None if first_stage is None else [first_stage]
        (checked,) = check_texts([query], "query", scalar=True)
        texts = check_texts(documents, "documents")
        with self._call() as usage:
            return self._finite(self._rank_many([checked], [texts], given, usage, call))[0]

    def score_many(
        self,
        queries: Sequence[str],
        documents: Sequence[Sequence[str]],
        *,
        first_stage: Sequence[Sequence[float]] | None = None,
        **options: Unpack[Options],
    ) -> list[Scores]:
        """Return `[score(q, d) for q, d in zip(queries, documents)]`; each step's windows of all queries run together.

        `documents` and `first_stage` hold one list per query. Raises as `score`, and ValueError if lengths differ.
        """
        call = self.check_options(**options)
        checked, documents = check_texts(queries, "queries"), as_column(documents, "documents")
        if len(documents) != len(checked):
            raise ValueError(f"documents must hold one list per query: {len(checked)}, got {len(documents)}")
        texts = [check_texts(some, f"documents[{i}]") for i, some in enumerate(documents)]
        with self._call() as usage:
            return self._finite(self._rank_many(checked, texts, first_stage, usage, call))

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int | None = None,
        return_documents: bool = False,
        *,
        first_stage: Sequence[float] | None = None,
        raw: bool = False,
        score_threshold: float | None = None,
        **options: Unpack[Options],
    ) -> list[Hit]:
        """Return documents sorted by `score`, best first; ties keep the order they came in.

        Arguments and result as in `Reranker.rank`; `first_stage` as in `score`.
        """
        check_top_k(top_k)
        check_threshold(score_threshold)
        texts = check_texts(documents, "documents")
        scores = self.score(query, texts, first_stage=first_stage, **options)
        return self._ranked(scores, texts if return_documents else None, top_k, raw, score_threshold)

    def _score_many(
        self, queries: list[str], documents: list[list[str]], usage: Usage, call: CallOptions = NO_OPTIONS
    ) -> list[Scores]:
        return self._rank_many(queries, documents, None, usage, call)

    def _rank_many(
        self,
        queries: list[str],
        documents: list[list[str]],
        first_stage: Sequence[Sequence[float]] | None,
        usage: Usage,
        call: CallOptions,
    ) -> list[Scores]:
        first = self._checked(documents, first_stage)
        notes = None
        if self.template.uses_notes and first is not None:
            notes = [[f"{value:.3f}" for value in values] for values in first]
        texts = Texts(queries, documents, notes, call)
        if self.algorithm == "groups":
            shuffles = Shuffles(self.window, self.epochs, self.seed)
            results = score_groups(texts, first, shuffles, self._written, usage)
        else:
            results = self._rank_windows(texts, usage)
        self._report(usage)
        return results

    def _checked(
        self, documents: list[list[str]], first_stage: Sequence[Sequence[float]] | None
    ) -> list[list[float]] | None:
        if first_stage is None:
            if self.template.uses_notes:
                raise ValueError(
                    f"template {self.template.name!r} prints first-stage scores: pass first_stage=, one per document"
                )
            return None
        if not self.template.uses_notes and self.algorithm != "groups":
            raise ValueError(f"first_stage is given, but template {self.template.name!r} does not print scores")
        if len(first_stage) != len(documents):
            raise ValueError(f"first_stage must hold one list per query: {len(documents)}, got {len(first_stage)}")
        checked = []
        for query, (values, texts) in enumerate(zip(first_stage, documents, strict=True)):
            numbers = np.asarray(values, np.float64)
            if numbers.shape != (len(texts),) or not np.isfinite(numbers).all():
                raise ValueError(
                    f"first_stage of query {query} must be {len(texts)} finite numbers, one per document, got "
                    f"shape {numbers.shape}" + ("" if np.isfinite(numbers).all() else " with NaN or infinity")
                )
            checked.append([float(number) for number in numbers])
        return checked

    def _rank_windows(self, texts: Texts, usage: Usage) -> list[Scores]:
        counts = [len(documents) for documents in texts.documents]
        usage.untouched = sum(untouched(n, self.window, self.stride, self.window_rule) for n in counts)
        if usage.untouched:
            log.warning(
                "window_rule 'rankgpt' with window %d and stride %d reads no window over %d documents at the head of "
                "the lists; they keep their places (window_rule='rank_llm' reads them)",
                self.window,
                self.stride,
                usage.untouched,
            )
        alone: dict[int, Scores] = {}

        def ask(requests: list[Request]) -> list[list[int]]:
            if self.readout == "generation":
                return self._written_orders(texts, requests, usage)
            usage.comparisons += len(requests)
            logits = self._label_logits(texts, requests, usage)
            alone.update(
                (query, row) for (query, _), row in zip(requests, logits, strict=True) if counts[query] <= self.window
            )
            return [order(row).tolist() for row in logits]

        schedules = [sliding_windows(n, self.window, self.stride, self.window_rule) for n in counts]
        rankings, usage.steps = run_together(schedules, ask)
        return [alone[i] if i in alone else np.array(ranking.scores, np.float32) for i, ranking in enumerate(rankings)]

    def _written_orders(self, texts: Texts, requests: list[Request], usage: Usage) -> list[list[int]]:
        """Rankings as written; a window of one document needs none."""
        asked = [request for request in requests if len(request[1]) > 1]
        usage.comparisons += len(asked)
        answers = iter(self._written(texts, asked, usage))
        orders = []
        for _, shown in requests:
            if len(shown) == 1:
                orders.append([0])
                continue
            read, well_formed = parse_permutation(answer_of(next(answers))[0], len(shown), self.template.identifiers)
            usage.unparsed += not well_formed
            orders.append(read)
        return orders
