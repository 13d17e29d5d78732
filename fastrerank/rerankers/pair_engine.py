"""The engine of a cross-encoder: which one reads a checkpoint's pairs, and how it reads them block by block."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastrerank.checkpoints.checkpoint import Checkpoint, untrained
from fastrerank.engine.heads import Head
from fastrerank.engine.loading import Encoder, Plan, load_encoder, load_label_encoder
from fastrerank.inputs.files import template_of_pairs
from fastrerank.inputs.tokenizer import TokenBatch
from fastrerank.rerankers.base import Usage
from fastrerank.rerankers.recognise import is_classifier, is_yes_no, logit_score

if TYPE_CHECKING:
    from fastrerank.inputs.prompts.chat_pairs import ChatPairs

__all__ = ["chat_pairs", "forward_blocks", "load_pair_engine"]

log = logging.getLogger("fastrerank")

# Pairs that are tokenised and scored in one forward. It bounds the memory of token ids and is the progress bar's step.
BLOCK_PAIRS = 1024


def load_pair_engine(
    checkpoint: Checkpoint, head: Head | None, chosen: Plan, chat: ChatPairs | None, given: bool, **options: Any
) -> Encoder:
    """The engine of a plan: where prompts begin alike and a decoder reads them, one that computes that once."""
    labels = logit_score(checkpoint)
    if labels is None and is_yes_no(checkpoint, given):
        if chat is None:
            raise ValueError(
                f"{untrained(checkpoint)}. CrossEncoder reads its logits of 'yes' and 'no' where a chat template takes "
                "the roles query and document, which this checkpoint's does not: give one as chat_template="
            )
        labels = chat.token_ids("yes", "no")
    if labels is not None:
        return load_label_encoder(checkpoint, labels, chosen, **options)
    if chat is not None and head is None and chosen.engine is None and is_classifier(checkpoint):
        try:
            return load_label_encoder(checkpoint, None, chosen, **options)
        except ValueError as error:  # what is wrong with the checkpoint itself is said again below
            log.info("%s: prompts share no prefixes: %s", checkpoint.path, error)
    return load_encoder(checkpoint, head, chosen, **options)


def chat_pairs(checkpoint: Checkpoint, chat_template: str | dict[str, str] | None) -> ChatPairs | None:
    """What renders the checkpoint's pairs, None where its tokenizer joins them. Only the former needs transformers."""
    if template_of_pairs(checkpoint, chat_template) is None:
        return None
    from fastrerank.inputs.prompts.chat_pairs import ChatPairs

    return ChatPairs.load(checkpoint, chat_template=chat_template)


def forward_blocks(
    engine: Encoder,
    tokenize: Callable[[list[Any]], TokenBatch],
    items: list[Any],
    usage: Usage,
    progress: bool = False,
    lengths: list[npt.NDArray[np.int64]] | None = None,
) -> npt.NDArray[np.float32]:
    """Logits (N, num_labels) of all items; a block is tokenised while the engine computes the one before it.

    The items' numbers of tokens are appended to `lengths`.
    """
    blocks = [np.zeros((0, engine.width), np.float32)]
    batches = _ahead([partial(tokenize, items[i : i + BLOCK_PAIRS]) for i in range(0, len(items), BLOCK_PAIRS)])
    for _ in _steps(len(items), progress):
        with usage.stage("tokenize"):  # where there are several blocks, the time that compute waits for tokens
            batch = next(batches)
        if lengths is not None:
            lengths.append(np.diff(batch.offsets))
        with usage.stage("compute"):
            given = batch.ids, batch.type_ids, batch.offsets
            counted = getattr(engine, "counted", None)  # of engines that compute common beginnings once
            values, cost = (engine.forward(*given), None) if counted is None else counted(*given)
        usage.count(batch, cost)
        blocks.append(values)
    return np.concatenate(blocks)


def _ahead(jobs: list[Callable[[], TokenBatch]]) -> Iterator[TokenBatch]:
    """Results of jobs in order; while one is used, the next is made in another thread."""
    if len(jobs) < 2:
        yield from (job() for job in jobs)
        return
    pool = ThreadPoolExecutor(1)
    try:
        following = pool.submit(jobs[0])
        for job in jobs[1:]:
            batch = following.result()
            following = pool.submit(job)
            yield batch
        yield following.result()
    finally:
        # Ctrl-C and errors do not wait for a block that nobody will read.
        pool.shutdown(wait=False, cancel_futures=True)


def _steps(pairs: int, progress: bool) -> Iterator[int]:
    steps = range(0, pairs, BLOCK_PAIRS)
    if not progress:
        yield from steps
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(steps, description="Scoring", console=Console(file=sys.stderr), total=len(steps))
