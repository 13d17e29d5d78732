"""Which method and which prompt a checkpoint was trained for, read off its configuration files and its name."""

from __future__ import annotations

import re
from pathlib import Path

from fastrerank.checkpoints.checkpoint import Checkpoint
from fastrerank.inputs.prompts import published_names

__all__ = [
    "is_classifier",
    "is_layerwise",
    "is_yes_no",
    "logit_score",
    "method_of",
    "names_of",
    "other_training",
    "recognised_template",
]

_LAYERWISE = "LayerWiseMiniCPMForCausalLM"

# What a published checkpoint's name begins with -> (method, template). Weights and configs of most of these are those
# of their base models: the name is all that tells them.
_PUBLISHED = (
    ("qwen3-reranker", "pointwise", "qwen3-reranker"),
    ("mxbai-rerank-(base|large)-v2", "pointwise", "mxbai-rerank-v2"),
    ("prorank", "pointwise", "prorank"),
    ("bge-reranker-v2-gemma", "pointwise", "bge-gemma"),
    ("bge-reranker-v2-minicpm", "pointwise", "bge-gemma"),
    ("erank", "pointwise", "erank"),
    ("monot5", "pointwise", "monot5"),
    ("rankt5", "pointwise", "rankt5"),
    ("rankllama", "pointwise", "rankllama"),
    ("dear-[0-9]+b-reranker-listwise", "listwise", "dear-listwise"),
    ("dear-[0-9]+b-reranker", "pointwise", "dear-stage1"),
    ("duot5", "pairwise", "duot5"),
    ("first_model", "listwise", "first"),
    ("first_mistral", "listwise", "first-rank_llm"),
    ("rank_(zephyr|vicuna)", "listwise", "rank_zephyr"),
    ("reasonrank", "listwise", "reasonrank"),
    ("coderankllm", "listwise", "coderankllm"),
    ("(diver-)?grouprank", "listwise", "grouprank"),
    ("rank-r1", "setwise", "rank-r1"),
)
_SENTENCE_TRANSFORMERS = "sentence-transformers"


def is_classifier(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint is a sequence classifier."""
    return any(name.endswith("ForSequenceClassification") for name in checkpoint.config.get("architectures") or [])


def is_layerwise(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint has a scoring head after each of its upper layers (bge-reranker-v2-minicpm-layerwise)."""
    return _LAYERWISE in (checkpoint.config.get("architectures") or [])


def other_training(checkpoint: Checkpoint) -> str | None:
    """Return what a checkpoint was trained as, where its files tell that it is no model of vectors; None otherwise.

    Modules behind the Transformer, such as Pooling and Dense, are those of a model of vectors.

    Example:
        >>> other_training(open_checkpoint("path/to/bge-reranker-base"))                 # doctest: +SKIP
        'a classifier (XLMRobertaForSequenceClassification)'
    """
    if any(module.type not in ("Transformer", "LogitScore") for module in checkpoint.modules):
        return None
    for name in checkpoint.config.get("architectures") or []:
        if name.endswith("ForSequenceClassification"):
            return f"a classifier ({name})"
        if name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
            return f"a language model ({name})"
        if name.endswith(("ForMaskedLM", "ForPreTraining")):
            return f"a model of masked words ({name})"
    return None


def is_yes_no(checkpoint: Checkpoint, given: bool) -> bool:
    """Whether the checkpoint is a plain language model whose logits of "yes" and "no" score pairs.

    That is a published reranker which answers so, or any where a chat template for pairs was `given`.
    """
    names = checkpoint.config.get("architectures") or [""]
    if checkpoint.modules or is_layerwise(checkpoint) or not str(names[0]).endswith("ForCausalLM"):
        return False
    found = _published(checkpoint)
    return given or found == ("pointwise", "qwen3-reranker")


def logit_score(checkpoint: Checkpoint) -> list[int] | None:
    """Return the token ids (true, false) or (true,) of sentence-transformers' LogitScore module; None without one.

    Raises ValueError naming the module's file if its ids are no token ids.
    """
    for module in checkpoint.modules:
        if module.type == "LogitScore":
            ids = [module.config.get("true_token_id"), module.config.get("false_token_id")]
            found = ids if ids[1] is not None else ids[:1]
            if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in found):
                raise ValueError(
                    f"{module.path / 'config.json'}: true_token_id must be a token id, and false_token_id one or null, "
                    f"got {ids[0]!r} and {ids[1]!r}"
                )
            return [int(i) for i in found if i is not None]
    return None


def recognised_template(checkpoint: Checkpoint, kind: str) -> str | None:
    """Return the template of this kind that the checkpoint was trained with; None where nothing tells."""
    if kind == "pointwise" and logit_score(checkpoint) is not None:
        return _SENTENCE_TRANSFORMERS
    found = _published(checkpoint)
    if found is not None:
        return found[1] if found[0] == kind else None
    return _SENTENCE_TRANSFORMERS if kind == "pointwise" and is_classifier(checkpoint) else None


def method_of(checkpoint: Checkpoint) -> str | None:
    """Return the method of a language model checkpoint; None where it is none, or nothing tells."""
    if is_layerwise(checkpoint) or logit_score(checkpoint) is not None:
        return "pointwise"
    found = _published(checkpoint)
    return None if found is None else found[0]


def _published(checkpoint: Checkpoint) -> tuple[str, str] | None:
    """(method, template) by the checkpoint's name: its folder's, its hub id's, or the one in its config.json."""
    if is_layerwise(checkpoint):
        return "pointwise", "bge-gemma"
    for name in names_of(checkpoint):
        for pattern, method, template in _PUBLISHED:
            if re.match(pattern, name):
                return method, template
        listed = published_names().get(name)  # checkpoints that their template's file names
        if listed is not None:
            return listed.kind, listed.name
    return None


def names_of(checkpoint: Checkpoint) -> list[str]:
    """Return what the checkpoint goes by, in small letters: its hub id's name, its folder's, the one in config.json."""
    names = [checkpoint.path.name, str(checkpoint.config.get("_name_or_path") or "")]
    if checkpoint.path.parent.name == "snapshots":  # .../models--owner--name/snapshots/revision
        names.insert(0, checkpoint.path.parents[1].name.split("--")[-1])
    return [Path(name).name.lower() for name in names]
