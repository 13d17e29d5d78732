"""Whether the server can answer: what ended a model's worker makes the health check fail and the process end."""

from __future__ import annotations

from collections.abc import Mapping

from fastrerank.serve.batcher import AsyncReranker

__all__ = ["WorkerDied", "dead"]


class WorkerDied(RuntimeError):
    """A worker thread of a model has died: the process must be started anew."""


def dead(models: Mapping[str, AsyncReranker]) -> str | None:
    """Return what is wrong with the first model that has lost a worker; None where all are well.

    Example:
        >>> dead({})
    """
    for name, reranker in models.items():
        failure = reranker.failure
        if failure is not None:
            return f"a worker thread of {name!r} died of {type(failure).__name__}: start the server anew"
    return None
