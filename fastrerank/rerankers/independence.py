"""What asks for scores of single pairs, and so cannot take a method that compares a query's documents."""

from __future__ import annotations

from typing import Any

__all__ = ["check_independent"]


def check_independent(reranker: Any, what: str) -> None:
    """Raise ValueError, which begins with `what`, for a reranker whose scores depend on a query's other documents.

    An object that is no `Reranker`, and does not say whether they do, passes.

    Example:
        >>> check_independent(object(), "an index holds scores of single pairs")
    """
    if not getattr(reranker, "independent", True):
        method = getattr(reranker, "method", type(reranker).__name__)
        raise ValueError(
            f"{what}: method {method!r} compares a query's documents with each other, so that a pair has no score of "
            "its own; use its rank on whole lists"
        )
