"""Pairwise ranking prompting: which of two documents answers the query better, asked in both orders."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fastrerank.rerankers.base import Scores, Usage
from fastrerank.rerankers.call import NO_OPTIONS, CallOptions
from fastrerank.rerankers.list_questions import ListReranker, Texts
from fastrerank.rerankers.schedules import Schedule, all_pairs, heapsort, run_together, sliding
from fastrerank.runtime.types import PairwiseAlgorithm

__all__ = ["PairwiseReranker"]

ALGORITHMS = ("heapsort", "allpair", "sliding")


class PairwiseReranker(ListReranker):
    """Ranks by comparisons of two documents, each read as the logits of the template's two labels, in both orders.

    Document i beats j if the model prefers i shown first and i shown second; otherwise they tie. With `soft`, the
    comparison is p = (P(first | i, j) + P(second | j, i)) / 2, P the softmax of the two labels' logits.

    Args:
        model: hub id or local folder.
        template: "prp", ..., or a template file of kind "pairwise"; None for what the checkpoint was trained with,
            where it can be recognised, else "prp".
        algorithm: "heapsort": a max-heap whose top_k are extracted, ties as the heap gives them; "allpair": all
            N(N-1)/2 pairs, a win is 1, a tie 1/2, or p with `soft`; "sliding": `passes` bubble passes from the bottom.
        top_k: how many places heapsort decides; documents after them keep their order. The other algorithms use it
            only as the default of `passes`.
        passes: bubble passes of "sliding", each decides one place; None for top_k.
        soft: compare by p instead of by agreement of both orders.
        options: instruction, device, dtype, max_length, num_threads, memory_limit, share_prefixes, trust_remote_code,
            revision, cache_folder, local_files_only, token.

    `score` is what a document won with allpair, ties in their order, and N - rank (N for the best) with the others.
    `last_usage` counts pairs as "comparisons" (two prompts each) and batches that wait for each other as "steps".

    Paper: Qin et al. 2023, arXiv 2306.17563.

    Raises ValueError naming the argument for unknown algorithms and sizes below 1.

    Example:
        >>> reranker = PairwiseReranker("path/to/llama", algorithm="heapsort", top_k=10)  # doctest: +SKIP
        >>> reranker.rank("who?", ["the owl", "the cat"])                                 # doctest: +SKIP
    """

    method: ClassVar[str] = "pairwise"
    independent: ClassVar[bool] = False
    kind: ClassVar[str] = "pairwise"
    default_template: ClassVar[str] = "prp"
    default_seq2seq: ClassVar[str] = "prp-t5"

    def __init__(
        self,
        model: str | Path,
        *,
        template: str | Path | None = None,
        algorithm: PairwiseAlgorithm = "heapsort",
        top_k: int = 10,
        passes: int | None = None,
        soft: bool = False,
        **options: Any,
    ) -> None:
        if algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm must be one of {', '.join(map(repr, ALGORITHMS))}, got {algorithm!r}")
        check_count("top_k", top_k, 1)
        if passes is not None:
            check_count("passes", passes, 1)
            if algorithm != "sliding":
                raise ValueError(f"passes is for algorithm 'sliding', got {passes!r} with {algorithm!r}")
        super().__init__(model, template=template, count=2, readout="logits", **options)
        self.algorithm, self.top_k, self.soft = algorithm, top_k, soft
        self.passes = top_k if passes is None else passes

    def _score_many(
        self, queries: list[str], documents: list[list[str]], usage: Usage, call: CallOptions = NO_OPTIONS
    ) -> list[Scores]:
        texts = Texts(queries, documents, call=call)
        schedules = [self._schedule(len(some)) for some in documents]
        rankings, usage.steps = run_together(schedules, lambda pairs: self._compare(texts, pairs, usage))
        return [np.array(ranking.scores, np.float32) for ranking in rankings]

    def _schedule(self, n: int) -> Schedule[tuple[int, int], float]:
        if self.algorithm == "allpair":
            return all_pairs(n)
        return heapsort(n, self.top_k) if self.algorithm == "heapsort" else sliding(n, self.passes)

    def _compare(self, texts: Texts, pairs: list[tuple[int, tuple[int, int]]], usage: Usage) -> list[float]:
        """What the first of each pair wins: 1, 0 or 1/2, or p. Prompts with the same left document stand together."""
        usage.comparisons += len(pairs)
        both = sorted((query, shown) for query, (i, j) in pairs for shown in ((i, j), (j, i)))
        logits = dict(zip(both, self._label_logits(texts, both, usage), strict=True))
        won = []
        for query, (i, j) in pairs:
            ahead, behind = (float(row[0]) - float(row[1]) for row in (logits[query, (i, j)], logits[query, (j, i)]))
            if self.soft:
                won.append((_sigmoid(ahead) + _sigmoid(-behind)) / 2)
            else:
                won.append(1.0 if ahead > 0 > behind else 0.0 if ahead < 0 < behind else 0.5)
        return won


def check_count(name: str, value: Any, least: int) -> None:
    """Raise ValueError naming the argument unless it is an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")


def _sigmoid(x: float) -> float:
    """The softmax of two logits whose difference is x; the symmetric form keeps sigmoid(x) + sigmoid(-x) at 1."""
    return 0.5 * (1.0 + float(np.tanh(0.5 * x)))
