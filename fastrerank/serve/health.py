"""Whether the server can answer. After the death of a worker the health check fails and the process ends."""

from __future__ import annotations

from collections.abc import Mapping

from fastrerank.serve.batching.batcher import AsyncReranker

__all__ = ["WorkerDied", "dead"]


class WorkerDied(RuntimeError):
    """A worker thread of a model has died; the process must be restarted."""


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
