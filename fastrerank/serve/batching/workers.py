"""The threads that compute batches: how they wait, how they end, and what the end of the process waits for."""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from fastrerank.serve.batching.outcome import deadline_error
from fastrerank.serve.batching.queue import Piece, Request

__all__ = ["Step", "make_workers", "start"]

# Seconds that the end of the process waits for a batch that is being computed.
EXIT_SECONDS = 60.0


@dataclass(frozen=True)
class Step:
    """What a worker does next: compute `pieces`, tell the `late`, end (`over`), or `wait`, None for any time."""

    pieces: Sequence[Piece] = ()
    late: Sequence[Request] = ()
    over: bool = False
    wait: float | None = None


class Owner(Protocol):
    """What workers see of an `AsyncReranker`."""

    _threads: list[threading.Thread]

    def _next(self) -> Step: ...

    def _compute(self, pieces: list[Piece]) -> None: ...

    def _fail(self, error: BaseException) -> None: ...

    def _drop(self, reason: str) -> None: ...


def make_workers(owner: Owner, changed: threading.Condition, count: int) -> list[threading.Thread]:
    """Return `count` threads, not started, that compute the batches of `owner` until it is closed or freed.

    Waiting threads hold no reference to `owner`. When nobody else holds one, they end and its model is freed.
    """
    gone = threading.Event()
    weakref.finalize(owner, _wake, changed, gone).atexit = False
    names = (f"fastrerank-batch-{i}" for i in range(count))
    arguments = (weakref.ref(owner), changed, gone)
    return [threading.Thread(target=_work, args=arguments, name=name, daemon=True) for name in names]


def start(owner: Owner) -> None:
    """Start the threads of `owner`, and let the end of the process wait for their batches."""
    for thread in owner._threads:
        thread.start()
    OPEN.add(owner)


def _work(reference: weakref.ref[Owner], changed: threading.Condition, gone: threading.Event) -> None:
    """Compute batches of an `AsyncReranker` until it is closed, or nobody holds it (`gone`)."""
    while True:
        with changed:
            owner = reference()
            if owner is None:
                return
            try:
                step = owner._next()
            except BaseException as error:
                owner._fail(error)
                return
            if not (step.pieces or step.late or step.over):
                del owner
                if gone.is_set():
                    return
                changed.wait(step.wait)
                continue
        for request in step.late:
            request.end(deadline_error(request))
        if step.over:
            return
        if step.pieces:
            try:
                owner._compute(list(step.pieces))
            except BaseException as error:
                owner._fail(error)
                return
        del owner, step


def _wake(changed: threading.Condition, gone: threading.Event) -> None:
    """End the threads of an `AsyncReranker` that was freed."""
    gone.set()
    with changed:
        changed.notify_all()


# Rerankers whose threads may compute. A thread that returns from torch while the interpreter ends kills the process by
# a signal, so no batch may outlast `_at_exit`.
OPEN: weakref.WeakSet[Owner] = weakref.WeakSet()


def _at_exit() -> None:
    """Take no more requests, end those that wait, and wait for the batches that are being computed."""
    everyone = list(OPEN)
    for one in everyone:
        one._drop("the process ends")
    end = time.monotonic() + EXIT_SECONDS
    for one in everyone:
        for thread in one._threads:
            thread.join(max(0.0, end - time.monotonic()))


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    # A child process has none of the threads, and the locks that they held stay locked there.
    os.register_at_fork(after_in_child=OPEN.clear)
