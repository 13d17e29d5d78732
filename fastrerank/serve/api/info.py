"""What a server says about its models: TEI's /info, OpenAI's /v1/models and Infinity's /models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastrerank.runtime.version import VERSION
from fastrerank.serve.batching.batcher import AsyncReranker

__all__ = ["infinity_models", "openai_models", "tei_info"]


def tei_info(models: Mapping[str, AsyncReranker], aliases: Mapping[str, str], max_documents: int) -> dict[str, Any]:
    """Return TEI's fields for the first model, and `models` for each; `score` says what its raw score is."""
    name, first = next(iter(models.items()))
    limit = first.max_queue_tokens
    rows = {
        name: {
            "method": one.reranker.method,
            "score": "logit" if one.reranker.raw_is_logit else "raw",
            "max_length": one.max_length,
            "device": one.device_name,
            "explain": one.explains,
            "options": sorted(one.reranker.honoured_options),
            "aliases": [alias for alias, of in aliases.items() if of == name],
        }
        for name, one in models.items()
    }
    labels = list(getattr(first.reranker, "labels", None) or ["LABEL_0"])
    kind = {
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }
    return {
        "model_id": name,
        "model_sha": None,
        "model_dtype": _dtype(first),
        "model_type": {"reranker": kind},
        # The queue is bounded in tokens, not in requests: at most as many requests as tokens fit.
        "max_concurrent_requests": limit,
        "max_input_length": first.max_length or limit,
        "max_batch_tokens": first.max_batch_tokens,
        "max_batch_requests": None,
        "max_client_batch_size": max_documents,
        "auto_truncate": True,
        "tokenization_workers": first.workers,
        "version": VERSION,
        "sha": None,
        "docker_label": None,
        "models": rows,
    }


def openai_models(models: Mapping[str, AsyncReranker], aliases: Mapping[str, str], begun: int) -> dict[str, Any]:
    """Return OpenAI's list of models; `begun`: when the server was started, seconds since 1970."""
    rows = [
        {
            "id": name,
            "object": "model",
            "created": begun,
            "owned_by": "fastrerank",
            "aliases": [alias for alias, of in aliases.items() if of == name],
        }
        for name in models
    ]
    return {"object": "list", "data": rows}


def infinity_models(models: Mapping[str, AsyncReranker], begun: int) -> dict[str, Any]:
    """Return Infinity's list of models, whose `stats` say how full the queue is."""
    rows = []
    for name, one in models.items():
        queued = one.queued_tokens()
        stats = {
            "queue_fraction": queued / one.max_queue_tokens,
            "queue_absolute": queued,
            "results_pending": one.waiting(),
            "batch_size": one.max_batch_tokens,
        }
        # Clients generated from Infinity's schema accept no other owner.
        rows.append(
            {
                "id": name,
                "object": "model",
                "created": begun,
                "owned_by": "infinity",
                "stats": stats,
                "backend": "fastrerank",
                "capabilities": ["rerank"],
            }
        )
    return {"object": "list", "data": rows}


def _dtype(served: AsyncReranker) -> str:
    return str(getattr(served.reranker, "dtype", None) or "float32").removeprefix("torch.")
