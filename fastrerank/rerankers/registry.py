"""The methods by name: those that ship, which are imported only when they are used, and those that others register."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

__all__ = ["METHODS", "Entry", "find_method", "list_methods", "register"]

_Kind = TypeVar("_Kind", bound=Callable[..., Any])
_GROUP = "fastrerank.methods"  # entry points of packages that bring methods


class Entry(NamedTuple):
    """A method: where its class is, and the papers that it comes from.

    Attributes:
        module, name: of the class, or the function that returns a reranker; it takes a checkpoint and keywords.
        papers: as `list_methods` shows them.
        registered: the class itself, for methods that do not ship.
    """

    module: str
    name: str
    papers: str
    registered: Callable[..., Any] | None = None

    def load(self) -> Callable[..., Any]:
        """Return the class or function."""
        if self.registered is not None:
            return self.registered
        found: Callable[..., Any] = getattr(importlib.import_module(self.module), self.name)
        return found


METHODS: dict[str, Entry] = {
    "cross-encoder": Entry(
        "fastrerank.rerankers.cross_encoder",
        "CrossEncoder",
        "Passage Re-ranking with BERT (Nogueira and Cho 2019, arXiv 1901.04085)",
    ),
    "late-interaction": Entry(
        "fastrerank.rerankers.late_interaction",
        "LateInteractionReranker",
        "ColBERT (Khattab and Zaharia 2020, arXiv 2004.12832)",
    ),
    "embedding": Entry(
        "fastrerank.rerankers.embedding",
        "EmbeddingReranker",
        "Sentence-BERT (Reimers and Gurevych 2019, arXiv 1908.10084)",
    ),
    "pointwise": Entry(
        "fastrerank.rerankers.pointwise",
        "PointwiseReranker",
        "monoT5 (Nogueira et al. 2020, arXiv 2003.06713), Qwen3 Embedding (Zhang et al. 2025, arXiv 2506.05176)",
    ),
    "listwise": Entry(
        "fastrerank.rerankers.listwise",
        "ListwiseReranker",
        "FIRST (Reddy et al. 2024, arXiv 2406.15657); RankGPT (Sun et al. 2023, arXiv 2304.09542)",
    ),
    "pairwise": Entry(
        "fastrerank.rerankers.pairwise",
        "PairwiseReranker",
        "Pairwise Ranking Prompting (Qin et al. 2023, arXiv 2306.17563)",
    ),
    "setwise": Entry(
        "fastrerank.rerankers.setwise",
        "SetwiseReranker",
        "Setwise prompting (Zhuang et al. 2023, arXiv 2310.09497); Rank-R1 (Zhuang et al. 2025, arXiv 2503.06034)",
    ),
    "icr": Entry(
        "fastrerank.rerankers.attention",
        "icr",
        "In-Context Reranking (Chen et al. 2024, arXiv 2410.02642)",
    ),
    "qrhead": Entry(
        "fastrerank.rerankers.attention",
        "qrhead",
        "Query-focused retrieval heads (Zhang et al. 2025, arXiv 2506.09944)",
    ),
    "core": Entry(
        "fastrerank.rerankers.attention",
        "core",
        "Contrastive retrieval heads (Tran et al. 2025, arXiv 2510.02219)",
    ),
}


def register(name: str, *, papers: str) -> Callable[[_Kind], _Kind]:
    """Make a class known as a method: `fastrerank.load(model, method=name)`, the command line and the server find it.

    Args:
        name: the value of `method=`; it must not be taken.
        papers: where the method comes from, for `list_methods`.

    A package that brings methods names its module in the entry points of the group "fastrerank.methods": the module is
    imported when a method is asked for that nobody registered. Raises ValueError for a name that is taken.

    Example:
        >>> @register("by-length", papers="none")  # doctest: +SKIP
        ... class ByLength(Reranker): ...
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"name must be a non-empty str, got {name!r}")

    def add(kind: _Kind) -> _Kind:
        held = METHODS.get(name)
        where = (kind.__module__, kind.__qualname__)
        if held is not None and (held.module, held.name) != where:  # a module that is run again may register again
            raise ValueError(f"method {name!r} is taken by {held.module}.{held.name}")
        METHODS[name] = Entry(*where, papers, kind)
        return kind

    return add


def find_method(name: str) -> Entry:
    """Return the method `name`; where nobody registered it, after importing packages that bring methods.

    Raises ValueError naming all methods.

    Example:
        >>> find_method("icr").name
        'icr'
    """
    if name not in METHODS:
        from importlib.metadata import entry_points  # takes some milliseconds and MiB that shipped methods do not need

        for package in entry_points(group=_GROUP):
            package.load()
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]


def list_methods() -> dict[str, str]:
    """Return the method names that `load` takes, each with the paper it comes from.

    Example:
        >>> list_methods()["icr"]
        'In-Context Reranking (Chen et al. 2024, arXiv 2410.02642)'
    """
    return {name: entry.papers for name, entry in METHODS.items()}
