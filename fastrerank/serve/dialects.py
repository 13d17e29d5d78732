"""One meaning in five spellings: what a body asks for, and results and errors as each dialect writes them."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from fastrerank.serve.schemas import RerankBody, ScoreBody

__all__ = ["Ask", "Flavor", "Problem", "error_body", "rerank_answer", "score_answer", "score_pairs", "to_ask"]


class Flavor(str, Enum):
    """Whose rules settle what the dialects do differently; `auto` goes by the path and the body."""

    auto = "auto"
    tei = "tei"
    cohere = "cohere"
    jina = "jina"
    vllm = "vllm"
    infinity = "infinity"
    sglang = "sglang"


class Problem(Exception):
    """A request that cannot be served: status, TEI's kind of error, and what the client did wrong."""

    def __init__(self, status: int, kind: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.headers = status, kind, headers or {}


@dataclass(frozen=True)
class Ask:
    """A rerank request without its dialect.

    `texts` are what is scored, `documents` what the client sent; `flavor` is never `auto`, unless `documents` came to
    /rerank or /v1/rerank: then the answer is a superset that Cohere's, Jina's, vLLM's and Infinity's clients read.
    """

    query: str
    texts: list[str]
    documents: Sequence[Any]
    model: str | None
    top_n: int | None
    return_documents: bool
    raw: bool
    explain: bool
    flavor: Flavor


# Whether results carry their documents where the request does not say.
_RETURNS = {Flavor.jina: True, Flavor.vllm: True, Flavor.sglang: True}


def to_ask(body: RerankBody, path: str, pinned: Flavor) -> Ask:
    """Return what `body` asks for; raises Problem where its dialect would."""
    flavor = pinned
    if pinned is Flavor.auto:
        flavor = Flavor.tei if body.texts is not None else Flavor.cohere if path == "/v2/rerank" else Flavor.auto
    documents: Sequence[Any] = body.texts if body.texts is not None else body.documents or []
    if not documents:
        name = "texts" if body.texts is not None else "documents"
        raise Problem(400, "Empty", f"`{name}` cannot be empty")
    top_n = body.top_n
    if top_n == 0:
        if flavor in (Flavor.jina, Flavor.infinity, Flavor.sglang, Flavor.cohere):
            raise Problem(422, "Validation", "`top_n` must be at least 1")
        top_n = None  # vLLM's way of asking for all
    returns = body.return_text if flavor is Flavor.tei else body.return_documents
    if returns is None:
        returns = _RETURNS.get(flavor, False)
    if flavor is Flavor.vllm:
        returns = True
    raw = body.raw_scores or body.use_activation is False
    texts = [_text(document, f"documents[{i}]", body.rank_fields) for i, document in enumerate(documents)]
    return Ask(
        _text(body.query, "query", None), texts, documents, body.model, top_n, returns, raw, body.explain, flavor
    )


def _text(value: Any, name: str, fields: list[str] | None) -> str:
    """The text of a string, of an object's `text` or `rank_fields`, or of vLLM's `content` parts."""
    if isinstance(value, str):
        return value
    if fields:
        missing = [field for field in fields if field not in value]
        if missing:
            raise Problem(422, "Validation", f"{name} lacks the field `{missing[0]}` of `rank_fields`")
        return "\n".join(
            value[field] if isinstance(value[field], str) else json.dumps(value[field]) for field in fields
        )
    if isinstance(value.get("text"), str):
        return str(value["text"])
    parts = value.get("content")
    if isinstance(parts, list) and parts and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in parts):
        return "\n".join(part["text"] for part in parts)
    raise Problem(422, "Validation", f"{name} must be a string or an object with a string `text`")


def rerank_answer(
    ask: Ask, ranking: Sequence[tuple[int, float]], model: str, tokens: int,
    explained: Sequence[Sequence[tuple[str, float]]] | None = None,
) -> dict[str, Any] | list[dict[str, Any]]:  # fmt: skip
    """Return the JSON for `ranking`, (position, score) best first, already cut to `top_n`.

    `tokens` were scored; `explained`: of each document its tokens and what each gets, which is in no dialect.
    """
    bare = ask.flavor in (Flavor.tei, Flavor.sglang)
    results = []
    for i, score in ranking:
        result: dict[str, Any] = {"index": i, "score" if bare else "relevance_score": score}
        if ask.return_documents:
            result["text" if ask.flavor is Flavor.tei else "document"] = ask.texts[i] if bare else _echo(ask, i)
        elif ask.flavor is Flavor.infinity:
            result["document"] = None
        if explained is not None:
            result["tokens"] = explained[i]
        results.append(result)
    if bare:
        return results
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    name = f"rerank-{uuid.uuid4().hex}"
    if ask.flavor is Flavor.cohere:
        meta = {
            "api_version": {"version": "2"},
            "billed_units": {"search_units": 1},
            "tokens": {"input_tokens": tokens},
        }
        return {"id": name, "results": results, "meta": meta}
    answer: dict[str, Any] = {"id": name, "model": model, "usage": usage, "results": results}
    if ask.flavor in (Flavor.auto, Flavor.infinity):
        answer |= {"object": "rerank", "created": int(time.time())}
    if ask.flavor is Flavor.auto:
        answer["meta"] = {"billed_units": {"search_units": 1}, "tokens": {"input_tokens": tokens}}
    return answer


def _echo(ask: Ask, i: int) -> Any:
    if ask.flavor is Flavor.infinity:
        return ask.texts[i]
    document = ask.documents[i]
    if ask.flavor is Flavor.vllm:
        return {"text": ask.texts[i], "multi_modal": None}
    return document if isinstance(document, dict) else {"text": document}


_SIDES = (("queries", "documents"), ("queries", "items"), ("text_1", "text_2"), ("data_1", "data_2"))


def score_pairs(body: ScoreBody) -> tuple[list[str], list[str]]:
    """Return the two sides of equal length; raises Problem unless they are 1:1, 1:N or N:N."""
    for first, second in _SIDES:
        left, right = getattr(body, first), getattr(body, second)
        if left is not None and right is not None:
            break
    else:
        names = ", ".join(" and ".join(f"`{name}`" for name in pair) for pair in _SIDES)
        raise Problem(400, "Validation", f"the body needs two sides: {names}")
    a, b = ([_text(value, f"{name}[{i}]", None) for i, value in enumerate(side if isinstance(side, list) else [side])]
            for name, side in ((first, left), (second, right)))  # fmt: skip
    if not a or not b:
        raise Problem(400, "Empty", "At least one text_pair element must be given")
    if len(a) == 1:
        a = a * len(b)
    if len(a) != len(b):
        raise Problem(400, "Validation", "Input lengths must be either 1:1, 1:N or N:N")
    return a, b


def score_answer(scores: Sequence[float], model: str, tokens: int) -> dict[str, Any]:
    """Return vLLM's JSON for scores in the order of the pairs."""
    return {
        "id": f"score-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": model,
        "data": [{"index": i, "object": "score", "score": score} for i, score in enumerate(scores)],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0},
    }


def error_body(flavor: Flavor, status: int, kind: str, message: str) -> Any:
    """Return an error as a dialect writes it; `auto` is read by the clients of all but TEI."""
    if flavor is Flavor.tei:
        return {"error": message, "error_type": kind}
    if flavor is Flavor.cohere:
        return {"message": message}
    error = {"message": message, "type": kind, "param": None, "code": status}
    if flavor is Flavor.auto:
        return {"message": message, "error": error, "detail": message}
    return {"error": error}
