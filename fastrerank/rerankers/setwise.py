"""Setwise prompting: which document of a set is the most relevant one, asked by a heap."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fastrerank.rerankers.base import Scores, Usage
from fastrerank.rerankers.call import NO_OPTIONS, CallOptions
from fastrerank.rerankers.generation import Generate
from fastrerank.rerankers.list_questions import ListReranker, Request, Texts
from fastrerank.rerankers.pairwise import check_count
from fastrerank.rerankers.ranking_parser import parse_label
from fastrerank.rerankers.schedules import run_together, setwise
from fastrerank.runtime.types import Readout

__all__ = ["SetwiseReranker"]


class SetwiseReranker(ListReranker):
    """Heapsort whose every comparison finds the best of a parent and its set_size - 1 children in one prompt.

    The best is the document whose label has the largest logit, the parent where labels tie; or the label that the
    model writes (Rank-R1), where an answer that cannot be read keeps the parent.

    Args:
        model: hub id or local folder. With `generate`, only its tokenizer and chat template are used.
        template: "setwise", "rank-r1", ..., or a template file of kind "setwise"; None for what the checkpoint was
            trained with, where it can be recognised, else "setwise".
        set_size: documents in a prompt, from 2; at most 26 with letters and 9 with digits where logits are read.
        top_k: how many places are decided; documents after them keep their order.
        readout, generate, max_new_tokens: see `ListReranker`.
        options: instruction, device, dtype, max_length, num_threads, memory_limit, share_prefixes, trust_remote_code,
            revision, cache_folder, local_files_only, token.

    `score` is N - rank (N for the best). `last_usage` counts prompts as "comparisons".

    Papers: Zhuang et al. 2023, arXiv 2310.09497; Rank-R1, Zhuang et al. 2025, arXiv 2503.06034.

    Raises ValueError naming the argument for sizes and templates that cannot rank.

    Example:
        >>> reranker = SetwiseReranker("path/to/llama", set_size=4)  # doctest: +SKIP
        >>> reranker.rank("who?", ["the owl", "the cat"])            # doctest: +SKIP
    """

    method: ClassVar[str] = "setwise"
    independent: ClassVar[bool] = False
    kind: ClassVar[str] = "setwise"
    default_template: ClassVar[str] = "setwise"
    default_seq2seq: ClassVar[str] = "setwise-t5"

    def __init__(
        self,
        model: str | Path,
        *,
        template: str | Path | None = None,
        set_size: int = 4,
        top_k: int = 10,
        readout: Readout | None = None,
        generate: Generate | None = None,
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> None:
        check_count("set_size", set_size, 2)
        check_count("top_k", top_k, 1)
        super().__init__(
            model,
            template=template,
            count=set_size,
            readout=readout,
            generate=generate,
            max_new_tokens=max_new_tokens,
            **options,
        )
        self.set_size, self.top_k = set_size, top_k

    def _score_many(
        self, queries: list[str], documents: list[list[str]], usage: Usage, call: CallOptions = NO_OPTIONS
    ) -> list[Scores]:
        texts = Texts(queries, documents, call=call)

        def ask(requests: list[Request]) -> list[int]:
            usage.comparisons += len(requests)
            if self.readout == "logits":
                return [int(np.argmax(row)) for row in self._label_logits(texts, requests, usage)]
            best = []
            for (_, shown), answer in zip(requests, self._written(texts, requests, usage), strict=True):
                position, well_formed = parse_label(answer, len(shown), self.template.identifiers)
                usage.unparsed += not well_formed
                best.append(position)
            return best

        schedules = [setwise(len(some), self.top_k, self.set_size) for some in documents]
        rankings, usage.steps = run_together(schedules, ask)
        self._report(usage)
        return [np.array(ranking.scores, np.float32) for ranking in rankings]
