"""How a request ends: its scores and what they cost, or the error that its caller gets."""

from __future__ import annotations

import asyncio
from concurrent import futures
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastrerank.serve.batching.queue import Request

__all__ = [
    "Closed",
    "DeadlineExceeded",
    "Scored",
    "Scores",
    "ScoringFailed",
    "deadline_error",
    "for_callers",
    "scored_of",
]

Scores = npt.NDArray[np.float32]


class ScoringFailed(RuntimeError):
    """The reranker raised an error that callers must not get as it is, such as a panic in native code: `__cause__`."""


class DeadlineExceeded(TimeoutError):
    """The request's time was over before all of its documents were scored."""


class Closed(RuntimeError):
    """The reranker takes no more requests, or ended before this one was done."""


@dataclass(frozen=True)
class Scored:
    """A request's scores, float32 (N,), and what it cost.

    `tokens` of its pairs; where the method does not count them, `exact` is False and a batch's tokens are divided by
    bytes. Seconds: it `waited` for a batch, the batches took (`compute`), and tokenising took of that (`tokenized`, 0
    where the method does not say). `explained`: each document's tokens with their scores, if they were asked for.
    """

    scores: Scores
    tokens: int
    exact: bool
    waited: float
    compute: float
    explained: list[list[tuple[str, float]]] | None = None
    tokenized: float = 0.0


def for_callers(error: BaseException) -> Exception:
    """`error`, or `ScoringFailed` for one that a future, an event loop or a thread would take as its own signal."""
    own = (TimeoutError, asyncio.TimeoutError, futures.TimeoutError, futures.CancelledError, StopIteration)
    if isinstance(error, Exception) and not isinstance(error, own):
        return error
    failed = ScoringFailed(f"{type(error).__name__}: {error}")
    failed.__cause__ = error
    return failed


def deadline_error(request: Request) -> DeadlineExceeded:
    """The error of a request whose time is over."""
    done = len(request.documents) - request.missing
    return DeadlineExceeded(f"the deadline came when {done} of {len(request.documents)} documents were scored")


def scored_of(request: Request) -> Scored:
    """The scores of a request that has ended, and what it cost."""
    waited = 0.0 if request.started is None else request.started - request.arrived
    return Scored(
        request.scores, request.tokens, request.exact, waited, request.compute, request.explained, request.tokenized
    )
