"""Which method and which prompt a checkpoint was trained for, read off its configuration files."""

from __future__ import annotations

from fastrerank.checkpoint import Checkpoint, read_json

__all__ = ["is_classifier", "is_layerwise", "logit_score", "method_of", "recognised_template"]

_LAYERWISE = "LayerWiseMiniCPMForCausalLM"
_ENCODER_DECODERS = ("t5", "mt5", "umt5", "longt5")

# Part of a checkpoint's name -> (kind, template). Names are all that tells most of these from their base models.
_BY_NAME = {
    "qwen3-reranker": ("pointwise", "qwen3-reranker"),
    "mxbai-rerank-base-v2": ("pointwise", "mxbai-rerank-v2"),
    "mxbai-rerank-large-v2": ("pointwise", "mxbai-rerank-v2"),
    "prorank": ("pointwise", "prorank"),
    "bge-reranker-v2-gemma": ("pointwise", "bge-gemma"),
    "bge-reranker-v2-minicpm": ("pointwise", "bge-gemma"),
    "erank": ("pointwise", "erank"),
    "monot5": ("pointwise", "monot5"),
    "rankt5": ("pointwise", "rankt5"),
    "rankllama": ("pointwise", "rankllama"),
    "dear-8b-reranker-listwise": ("listwise", "dear-listwise"),
    "dear-": ("pointwise", "dear-stage1"),
    "duot5": ("pairwise", "duot5"),
    "first_model": ("listwise", "first"),
    "first_mistral": ("listwise", "first-rank_llm"),
    "rank_zephyr": ("listwise", "rank_zephyr"),
    "rank_vicuna": ("listwise", "rank_zephyr"),
    "reasonrank": ("listwise", "reasonrank"),
    "coderankllm": ("listwise", "coderankllm"),
    "grouprank": ("listwise", "grouprank"),
    "rank-r1": ("setwise", "rank-r1"),
}


def is_classifier(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint is a sequence classifier."""
    architectures = checkpoint.config.get("architectures") or []
    return any(name.endswith("ForSequenceClassification") for name in architectures)


def is_layerwise(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint has a scoring head after each of its upper layers (bge-reranker-v2-minicpm-layerwise)."""
    return _LAYERWISE in (checkpoint.config.get("architectures") or [])


def logit_score(checkpoint: Checkpoint) -> list[int] | None:
    """Return the token ids (true, false) or (true,) of sentence-transformers' LogitScore module; None without one."""
    for module in checkpoint.modules:
        if module.type == "LogitScore":
            true, false = module.config.get("true_token_id"), module.config.get("false_token_id")
            if not isinstance(true, int) or not (false is None or isinstance(false, int)):
                raise ValueError(f"{module.path / 'config.json'}: true_token_id must be a token id, got {true!r}")
            return [true] if false is None else [true, false]
    return None


def recognised_template(checkpoint: Checkpoint, kind: str) -> str | None:
    """Return the template of this kind that the checkpoint was trained with; None where nothing tells."""
    if kind == "pointwise" and is_layerwise(checkpoint):
        return "bge-gemma"
    names = [str(checkpoint.config.get("_name_or_path") or ""), str(checkpoint.path)]
    for name in names:
        for part, (found, template) in _BY_NAME.items():
            if part in name.lower() and found == kind:
                return template
    if kind == "pointwise" and logit_score(checkpoint) is not None:
        return "sentence-transformers"
    return None


def method_of(checkpoint: Checkpoint) -> str | None:
    """Return the method of a language model checkpoint; None where it is none, or nothing tells."""
    architectures = checkpoint.config.get("architectures") or []
    if is_layerwise(checkpoint) or logit_score(checkpoint) is not None:
        return "pointwise"
    names = [str(checkpoint.config.get("_name_or_path") or ""), str(checkpoint.path)]
    generative = any(name.endswith(("ForCausalLM", "ForConditionalGeneration")) for name in architectures)
    for name in names:
        for part, (kind, _) in _BY_NAME.items():
            if part in name.lower() and (generative or kind == "pointwise"):
                return kind
    if read_json(checkpoint.path / "config_sentence_transformers.json").get("model_type") == "CrossEncoder":
        return None
    return None
