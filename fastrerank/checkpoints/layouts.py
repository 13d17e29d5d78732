"""Checkpoint layouts of model families that fastrerank does not compute: every method refuses them by name.

Without its projection, its markers or its query padding, a ColBERT model's token vectors look right but rank wrongly.
Such a checkpoint is therefore not loaded as another kind of model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["TOKEN_PROJECTION", "marked_layout", "refuse_marked_layout", "refuse_token_projection"]

# BGE-M3's projection of token vectors. Its dense and sparse vectors do not use it.
TOKEN_PROJECTION = "colbert_linear.pt"

_SERVED_BY = {
    "Stanford's ColBERT": "colbert-ai, PyLate or sentence-transformers' MultiVectorEncoder",
    "PyLate": "PyLate or sentence-transformers' MultiVectorEncoder",
    "a MultiVectorEncoder of sentence-transformers": "sentence-transformers' MultiVectorEncoder",
}
_MULTI_VECTOR_MODULES = ("MultiVectorMask", "HierarchicalTokenPooling")
# Keys of config_sentence_transformers.json that only PyLate writes, and those of sentence_bert_config.json that only a
# MultiVectorEncoder does.
_PYLATE_KEYS = (
    "query_prefix",
    "document_prefix",
    "do_query_expansion",
    "attend_to_expansion_tokens",
    "skiplist_words",
)
_EXPANSION_KEYS = ("query_expansion", "query_length", "document_length")


def marked_layout(
    folders: Sequence[Path],
    config: Mapping[str, Any],
    module_types: Sequence[str],
    st_config: Mapping[str, Any],
    sentence_config: Mapping[str, Any],
) -> tuple[str, str] | None:
    """Return (layout, the mark that tells it) of a multi-vector checkpoint; None for any other checkpoint.

    Args:
        folders: the checkpoint's folder and its transformer's.
        config: the transformer's config.json. module_types: dotted class names in modules.json.
        st_config: config_sentence_transformers.json. sentence_config: sentence_bert_config.json.

    Example:
        >>> marked_layout([], {"architectures": ["HF_ColBERT"]}, [], {}, {})
        ("Stanford's ColBERT", 'architectures names HF_ColBERT')
    """
    architectures = config.get("architectures") or []
    if isinstance(architectures, list) and "HF_ColBERT" in architectures:
        return "Stanford's ColBERT", "architectures names HF_ColBERT"
    for folder in folders:
        if (folder / "artifact.metadata").exists():
            return "Stanford's ColBERT", "artifact.metadata stands beside its config.json"
    kind = st_config.get("model_type")
    for dotted in module_types:
        if dotted.rpartition(".")[2] in _MULTI_VECTOR_MODULES:
            return "a MultiVectorEncoder of sentence-transformers", f"modules.json names {dotted}"
    for dotted in module_types:
        if dotted.startswith("pylate."):
            return "PyLate", f"modules.json names {dotted}"
    if kind == "MultiVectorEncoder":
        return "a MultiVectorEncoder of sentence-transformers", "its model_type is MultiVectorEncoder"
    if kind == "ColBERT":
        return "PyLate", "its model_type is ColBERT"
    for key in _PYLATE_KEYS:
        if st_config.get(key):
            return "PyLate", f"config_sentence_transformers.json has {key}"
    similarity = st_config.get("similarity_fn_name")
    if isinstance(similarity, str) and similarity.lower() in ("maxsim", "meanmaxsim"):
        return "a MultiVectorEncoder of sentence-transformers", f"its similarity_fn_name is {similarity}"
    for key in _EXPANSION_KEYS:
        if sentence_config.get(key):
            return "a MultiVectorEncoder of sentence-transformers", f"its sentence_bert_config.json has {key}"
    return None


def refuse_marked_layout(path: Path, found: tuple[str, str] | None) -> None:
    """Raise ValueError that says what a marked layout is, why no method takes it, and what serves it."""
    if found is None:
        return
    layout, mark = found
    raise ValueError(
        f"{path} is a ColBERT checkpoint in the layout of {layout} ({mark}). No method of fastrerank serves it: the "
        "projection, the query and document markers, the padding of queries and the tokens that are left out of the "
        "score would be missing, and the ranking would be wrong. Serve it with " + _SERVED_BY[layout] + ", or load the "
        "base model that it was trained from"
    )


def refuse_token_projection(folders: Sequence[Path]) -> None:
    """Raise ValueError where BGE-M3's projection of token vectors lies beside a checkpoint: it is not computed."""
    for folder in folders:
        if (folder / TOKEN_PROJECTION).exists():
            raise ValueError(
                f"{folder} holds {TOKEN_PROJECTION}, the projection of BGE-M3's token vectors, which "
                "method='late-interaction' does not compute: its ranking would be wrong. method='embedding' serves the "
                "checkpoint's dense vectors, and FlagEmbedding's BGEM3FlagModel its token vectors"
            )
