"""fastrerank: reranking inference that is fast and right.

    import fastrerank
    reranker = fastrerank.CrossEncoder("cross-encoder/ms-marco-MiniLM-L6-v2")
    reranker.rank("how long do fleas live", ["A flea lives up to a year.", "Fleas are insects."])

Importing this module imports neither torch nor transformers, and starts no thread.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

# Public name -> module that defines it, imported on first use.
_NAMES = {
    "AsyncReranker": "fastrerank.serve.batching.batcher",
    "CURIndex": "fastrerank.search",
    "AttentionReranker": "fastrerank.rerankers.attention",
    "CrossEncoder": "fastrerank.rerankers.cross_encoder",
    "EmbeddingReranker": "fastrerank.rerankers.embedding",
    "LateInteractionReranker": "fastrerank.rerankers.late_interaction",
    "PointwiseReranker": "fastrerank.rerankers.pointwise",
    "ListwiseReranker": "fastrerank.rerankers.listwise",
    "PairwiseReranker": "fastrerank.rerankers.pairwise",
    "SetwiseReranker": "fastrerank.rerankers.setwise",
    "list_methods": "fastrerank.rerankers.registry",
    "load": "fastrerank.rerankers.loading",
    "register": "fastrerank.rerankers.registry",
    "set_num_threads": "fastrerank.ops",
}
__all__ = [
    "AsyncReranker",
    "AttentionReranker",
    "CURIndex",
    "CrossEncoder",
    "EmbeddingReranker",
    "LateInteractionReranker",
    "ListwiseReranker",
    "PairwiseReranker",
    "PointwiseReranker",
    "SetwiseReranker",
    "__version__",
    "list_methods",
    "load",
    "register",
    "set_num_threads",
]

if TYPE_CHECKING:
    from fastrerank.ops import set_num_threads
    from fastrerank.rerankers.attention import AttentionReranker
    from fastrerank.rerankers.cross_encoder import CrossEncoder
    from fastrerank.rerankers.embedding import EmbeddingReranker
    from fastrerank.rerankers.late_interaction import LateInteractionReranker
    from fastrerank.rerankers.listwise import ListwiseReranker
    from fastrerank.rerankers.loading import load
    from fastrerank.rerankers.pairwise import PairwiseReranker
    from fastrerank.rerankers.pointwise import PointwiseReranker
    from fastrerank.rerankers.registry import list_methods, register
    from fastrerank.rerankers.setwise import SetwiseReranker
    from fastrerank.runtime.version import VERSION as __version__
    from fastrerank.search import CURIndex
    from fastrerank.serve.batching.batcher import AsyncReranker


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from fastrerank.runtime.version import VERSION

        return VERSION
    if name not in _NAMES:
        raise AttributeError(f"module 'fastrerank' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_NAMES[name]), name)
    globals()[name] = value
    return value


class _EarlierNames:
    """A finder of modules' earlier names; their table is imported with the first module of the package."""

    def find_spec(self, name: str, _path: Any = None, _target: Any = None) -> Any:
        if not name.startswith("fastrerank.") or name == "fastrerank._moved":
            return None
        from fastrerank._moved import find_spec

        return find_spec(name)


# Inserted before Python's own finders: they would import the modules of a moved package a second time.
sys.meta_path.insert(0, _EarlierNames())


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES, "__version__"})
