"""GroupRank: documents are scored in shuffled groups; a group's scores are written as JSON."""

from __future__ import annotations

import json
import math
import random
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastrerank.rerankers.base import Scores, Usage
from fastrerank.rerankers.list_questions import Request, Texts
from fastrerank.rerankers.ranking_parser import answer_of, identified
from fastrerank.rerankers.schedules import Ranking, Schedule, run_together

__all__ = ["Shuffles", "groups", "parse_scores", "score_groups"]

# Share of the group scores against first-stage scores, as published.
WEIGHT = 0.6
_FENCE = re.compile(r"```[ \t]*(?:json)?(.*?)```", re.DOTALL | re.IGNORECASE)

Documents = tuple[int, ...]
Write = Callable[[Texts, list[Request], Usage], list[str]]


class Shuffles(NamedTuple):
    """Documents in a group, how often all documents are shuffled and grouped, and the seed of the shuffles."""

    size: int
    epochs: int
    seed: int


def score_groups(
    texts: Texts, first_stage: list[list[float]] | None, shuffles: Shuffles, write: Write, usage: Usage
) -> list[Scores]:
    """Return one float32 (N,) per query: the groups' mean scores in [0, 1], with `first_stage` mixed in if given.

    `write` answers all groups of all queries in one call. Answers that are not well-formed count as unparsed.
    """

    def ask(requests: list[Request]) -> list[list[float | None]]:
        usage.comparisons += len(requests)
        found = []
        for (_, shown), answer in zip(requests, write(texts, requests, usage), strict=True):
            scores, well_formed = parse_scores(answer, len(shown))
            usage.unparsed += not well_formed
            found.append(scores)
        return found

    size, epochs, seed = shuffles
    schedules = [
        groups(
            len(texts.documents[i]), size, epochs, _seed(seed, query), None if first_stage is None else first_stage[i]
        )
        for i, query in enumerate(texts.queries)
    ]
    rankings, usage.steps = run_together(schedules, ask)
    return [np.array(ranking.scores, np.float32) for ranking in rankings]


def groups(
    n: int,
    size: int = 20,
    epochs: int = 2,
    seed: int = 0,
    first_stage: Sequence[float] | None = None,
    weight: float = WEIGHT,
) -> Schedule[Documents, Sequence[float | None]]:
    """Shuffle, cut into groups, score each group; all groups of all epochs are one batch.

    A question is the documents of a group; its answer holds a score for each, or None where it got none. A document's
    score is the mean over the epochs that scored it, 0.0 without any; with `first_stage` scores it is
    weight * mean + (1 - weight) * first_stage. Ties keep their order.
    Source: GroupRank, arXiv 2511.11653.
    """
    shuffle = random.Random(seed).shuffle
    asked: list[Documents] = []
    for _ in range(epochs):
        order = list(range(n))
        shuffle(order)
        asked += [tuple(order[begin : begin + size]) for begin in range(0, n, size)]
    answers = (yield asked) if asked else []
    found: list[list[float]] = [[] for _ in range(n)]
    for group, values in zip(asked, answers, strict=True):
        for document, value in zip(group, values, strict=True):
            if value is not None:
                found[document].append(value)
    scores = [sum(values) / len(values) if values else 0.0 for values in found]
    if first_stage is not None:
        scores = [weight * score + (1.0 - weight) * first for score, first in zip(scores, first_stage, strict=True)]
    return Ranking(sorted(range(n), key=lambda i: (-scores[i], i)), scores)


def parse_scores(text: str, n: int, scale: float = 10.0) -> tuple[list[float | None], bool]:
    """Read GroupRank's JSON {"[1]": 5, ...} as one score in [0, 1] per document, None for those it does not name.

    The JSON stands in <answer> tags, in a ``` fence, or bare. Every document gets 0.0 if there is no JSON object;
    values that are no number are left out, numbers outside 0..scale are cut to it. Well-formed: each document has one.
    Source: GroupRank, arXiv 2511.11653.

    Example:
        >>> parse_scores('<answer>```json {"[1]": 5, "[2]": 10}```</answer>', 3)
        ([0.5, 1.0, None], False)
    """
    answer, _ = answer_of(text)
    fence = _FENCE.search(answer)
    body = fence.group(1) if fence else answer[max(answer.find("{"), 0) : answer.rfind("}") + 1]
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):  # what a model wrote may be anything; the caller counts it
        found = None
    if not isinstance(found, dict):
        return [0.0] * n, False
    scores: list[float | None] = [None] * n
    right = len(found) == n
    for key, value in found.items():
        named = identified(key, n, "numeric")
        number = _number(value)
        if len(named) != 1 or not 0 <= named[0] < n or number is None:
            right = False
            continue
        right &= scores[named[0]] is None and 0.0 <= number <= scale
        scores[named[0]] = min(max(number, 0.0), scale) / scale
    return scores, right and None not in scores


def _seed(seed: int, query: str) -> int:
    """A seed of its own for each query text, so that a result does not depend on the queries before it."""
    return zlib.crc32(query.encode("utf-8", "surrogatepass"), seed & 0xFFFFFFFF)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
