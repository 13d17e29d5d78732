"""A check for callers that score single pairs: they cannot use methods that compare a query's documents."""

from __future__ import annotations

from typing import Any

__all__ = ["check_independent"]


def check_independent(reranker: Any, what: str) -> None:
    """Raise ValueError if a document's score depends on the other documents; the message begins with `what`.

    An object without the attribute `independent` passes.

    Example:
        >>> check_independent(object(), "an index holds scores of single pairs")
    """
    if not getattr(reranker, "independent", True):
        method = getattr(reranker, "method", type(reranker).__name__)
        raise ValueError(
            f"{what}: method {method!r} compares a query's documents with each other, so that a pair has no score of "
            "its own; use its rank on whole lists"
        )
