"""`load`: a checkpoint as a reranker, by the method that it serves."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any, Literal, cast, overload

from fastrerank.checkpoints.checkpoint import Checkpoint, open_checkpoint
from fastrerank.rerankers.options import load_keywords, other_keywords
from fastrerank.rerankers.recognise import method_of
from fastrerank.rerankers.registry import find_method

if TYPE_CHECKING:
    from fastrerank.rerankers.attention import AttentionReranker
    from fastrerank.rerankers.base import Reranker
    from fastrerank.rerankers.cross_encoder import CrossEncoder
    from fastrerank.rerankers.embedding import EmbeddingReranker
    from fastrerank.rerankers.late_interaction import LateInteractionReranker
    from fastrerank.rerankers.listwise import ListwiseReranker
    from fastrerank.rerankers.pairwise import PairwiseReranker
    from fastrerank.rerankers.pointwise import PointwiseReranker
    from fastrerank.rerankers.setwise import SetwiseReranker
    from fastrerank.runtime.types import MethodName, ModelPath

__all__ = ["load"]


@overload
def load(model: ModelPath, method: Literal["cross-encoder"], **options: Any) -> CrossEncoder: ...


@overload
def load(model: ModelPath, method: Literal["late-interaction"], **options: Any) -> LateInteractionReranker: ...


@overload
def load(model: ModelPath, method: Literal["embedding"], **options: Any) -> EmbeddingReranker: ...


@overload
def load(model: ModelPath, method: Literal["pointwise"], **options: Any) -> PointwiseReranker: ...


@overload
def load(model: ModelPath, method: Literal["listwise"], **options: Any) -> ListwiseReranker: ...


@overload
def load(model: ModelPath, method: Literal["pairwise"], **options: Any) -> PairwiseReranker: ...


@overload
def load(model: ModelPath, method: Literal["setwise"], **options: Any) -> SetwiseReranker: ...


@overload
def load(model: ModelPath, method: Literal["icr", "qrhead", "core"], **options: Any) -> AttentionReranker: ...


@overload
def load(model: ModelPath, method: str | None = None, **options: Any) -> Reranker: ...


def load(model: ModelPath, method: MethodName | str | None = None, **options: Any) -> Reranker:
    """Load a checkpoint as a reranker.

    Args:
        model: hub id or local folder.
        method: one of `list_methods()`; None finds it: a published LLM reranker by its name or files, a sequence
            classification head is a cross-encoder, a sentence-transformers model with Pooling is an embedding model.
        options: the class's own keywords (device, dtype, max_length, num_threads, revision, token, ...).

    Raises ValueError for an unknown method, and for a checkpoint that the method, or every method, must refuse;
    TypeError for a keyword that the method does not have, with those that it has.

    Example:
        >>> load("path/to/all-MiniLM-L6-v2", method="late-interaction")  # doctest: +SKIP
    """
    if method is not None:
        find_method(method)
    else:
        hub = ("revision", "cache_folder", "local_files_only", "token", "trust_remote_code")
        method = _method_of(open_checkpoint(model, **{key: options[key] for key in hub if key in options}))
    _check_keywords(method, options)
    return cast("Reranker", find_method(method).load()(model, **options))


def _check_keywords(method: str, options: dict[str, Any]) -> None:
    known = load_keywords(method)
    unknown = [name for name in options if name not in known and name not in other_keywords(method)]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, 1)
        meant = f" (did you mean {near[0]!r}?)" if near else ""
        raise TypeError(
            f"load() got an unexpected keyword argument {unknown[0]!r}{meant}: method {method!r} takes "
            f"{', '.join(known)}"
        )


def _method_of(checkpoint: Checkpoint) -> str:
    found = method_of(checkpoint)
    if found is not None:
        return found
    architectures = checkpoint.config.get("architectures") or []
    kinds = [module.type for module in checkpoint.modules]
    if checkpoint.st_config.get("model_type") == "CrossEncoder" or (
        not kinds and any(name.endswith("ForSequenceClassification") for name in architectures)
    ):
        return "cross-encoder"
    if "Pooling" in kinds:
        return "embedding"
    if any(name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for name in architectures):
        raise ValueError(
            f"{checkpoint.path} is a language model ({', '.join(architectures)}) of a name that tells no method: say "
            "method='pointwise', 'listwise', 'pairwise' or 'setwise', and template= where it was trained with one; or "
            "method='icr', which needs no training but a decoder"
        )
    raise ValueError(
        f"{checkpoint.path}: cannot tell which method this checkpoint is for (architectures {architectures}, no "
        "pooling modules); say method='late-interaction' or method='embedding' to use its token vectors"
    )
