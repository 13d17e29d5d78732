"""fastrerank: reranking inference that is fast and right.

    import fastrerank
    reranker = fastrerank.CrossEncoder("cross-encoder/ms-marco-MiniLM-L6-v2")
    reranker.rank("how long do fleas live", ["A flea lives up to a year.", "Fleas are insects."])

Importing this module imports neither torch nor transformers, and starts no thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import fastrerank._moved  # noqa: F401  (earlier names of modules)
from fastrerank.runtime.version import VERSION as __version__

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
    from fastrerank.search import CURIndex
    from fastrerank.serve.batching.batcher import AsyncReranker


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'fastrerank' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_NAMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_NAMES))
