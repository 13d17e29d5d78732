"""From the bodies of all dialects to one request, and from its results to the answer of each dialect."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastrerank.serve.api.errors import Flavor, Problem
from fastrerank.serve.api.fields import agreed, raw_wanted, refuse
from fastrerank.serve.api.schemas import RerankBody, ScoreBody

__all__ = ["Ask", "Flavor", "Problem", "rerank_answer", "score_answer", "score_pairs", "to_ask"]


@dataclass(frozen=True)
class Ask:
    """A rerank request without its dialect.

    `texts` are what is scored, `documents` what the client sent; `flavor` is never `auto`, unless `documents` came to
    /rerank or /v1/rerank: then the answer is a superset that Cohere's, Jina's, vLLM's and Infinity's clients read.
    `version`: of Cohere's API. `score_threshold`: results whose returned score is lower are left out.
    """

    query: str
    texts: list[str]
    documents: Sequence[Any]
    model: str | None
    top_n: int | None
    score_threshold: float | None
    return_documents: bool
    raw: bool
    explain: bool
    flavor: Flavor
    version: str


# Whether results carry their documents by default.
_RETURNS = frozenset({Flavor.jina, Flavor.vllm, Flavor.sglang})
# Dialects in which `top_n: 0` means all; the others refuse it.
_ZERO_IS_ALL = frozenset({Flavor.auto, Flavor.tei, Flavor.vllm})


def to_ask(body: RerankBody, path: str, flavor: Flavor) -> Ask:
    """Return what `body` asks for in the dialect `flavor`; raises Problem where that dialect would."""
    field = "documents" if body.texts is None else "texts"
    given = body.documents if body.texts is None else body.texts
    if isinstance(given, (str, dict)):
        # Only vLLM takes a single document; its routes are /rerank and /v1/rerank too.
        if flavor not in (Flavor.vllm, Flavor.auto):
            raise refuse(field, "must be an array")
        given = [given]
    documents: Sequence[Any] = given or []
    if not documents:
        raise Problem(400, "Empty", f"`{field}` cannot be empty", field=field)
    if body.rank_fields is not None and len(set(body.rank_fields)) < len(body.rank_fields):
        # Otherwise a short body could repeat a long field thousands of times.
        twice = next(name for name in body.rank_fields if body.rank_fields.count(name) > 1)
        raise refuse("rank_fields", f"must name each field once, got {twice[:100]!r} twice or more")
    texts = [_text(document, f"{field}[{i}]", body.rank_fields) for i, document in enumerate(documents)]
    returned = agreed((("return_documents", body.return_documents), ("return_text", body.return_text)))[1]
    return Ask(
        query=_text(body.query, "query", None),
        texts=texts,
        documents=documents,
        model=body.model,
        top_n=_top_n(body, flavor),
        score_threshold=agreed((("score_threshold", body.score_threshold), ("min_score", body.min_score)))[1],
        return_documents=flavor in _RETURNS if returned is None else returned,
        raw=raw_wanted(body),
        explain=bool(body.explain),
        flavor=flavor,
        version="1" if path == "/v1/rerank" else "2",
    )


def _top_n(body: RerankBody, flavor: Flavor) -> int | None:
    """How many results; None for all."""
    name, count = agreed((("top_n", body.top_n), ("top_k", body.top_k), ("topN", body.topN)))
    if count is None or count > 0:
        return None if count is None else int(count)
    if name != "topN" and flavor not in _ZERO_IS_ALL:
        raise refuse(name, "must be at least 1")
    return None


def _text(value: Any, name: str, fields: list[str] | None) -> str:
    """The text of a string, of an object's `text` or `rank_fields`, or of vLLM's `content` parts."""
    if isinstance(value, str):
        if fields is None or fields == ["text"]:
            return value
        value = {"text": value}  # a string lacks every other field
    if fields is not None:
        missing = [field for field in fields if field not in value]
        if missing:
            raise Problem(422, "Validation", f"{name} lacks the field `{missing[0]}` of `rank_fields`", field=name)
        return "\n".join(
            value[field] if isinstance(value[field], str) else json.dumps(value[field]) for field in fields
        )
    if isinstance(value.get("text"), str):
        return str(value["text"])
    parts = value.get("content")
    if isinstance(parts, list) and parts and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in parts):
        return "\n".join(part["text"] for part in parts)
    raise Problem(422, "Validation", f"{name} must be a string or an object with a string `text`", field=name)


def rerank_answer(
    ask: Ask,
    ranking: Sequence[tuple[int, float]],
    model: str,
    tokens: int,
    explained: Sequence[Sequence[tuple[str, float]]] | None = None,
) -> dict[str, Any] | list[dict[str, Any]]:
    """Return the JSON for `ranking`, (position, score) best first, already cut to `top_n`.

    `tokens`: how many were scored. `explained`: each document's tokens with their scores; no dialect has them.
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
        return {"id": name, "results": results, "meta": _meta(ask, tokens)}
    answer: dict[str, Any] = {"id": name, "model": model, "usage": usage}
    if ask.flavor is Flavor.voyage:
        # `results` too: `top_k` alone means Voyage, but other clients send it as well.
        return answer | {"object": "list", "data": [_voyage(ask, result) for result in results], "results": results}
    answer["results"] = results
    if ask.flavor in (Flavor.auto, Flavor.infinity):
        answer |= {"object": "rerank", "created": int(time.time())}
    if ask.flavor is Flavor.auto:
        answer["meta"] = _meta(ask, tokens)
    return answer


def _meta(ask: Ask, tokens: int) -> dict[str, Any]:
    """Cohere's."""
    return {
        "api_version": {"version": ask.version},
        "billed_units": {"search_units": 1},
        "tokens": {"input_tokens": tokens},
    }


def _voyage(ask: Ask, result: dict[str, Any]) -> dict[str, Any]:
    """A result as Voyage writes it: a document is its text."""
    return result | {"document": ask.texts[result["index"]]} if "document" in result else result


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
    for name in dict.fromkeys(side for pair in _SIDES for side in pair):
        if name not in (first, second) and getattr(body, name) is not None:
            raise refuse(name, f"came beside `{first}` and `{second}`: send two sides only", 400)
    a, b = (
        [_text(value, f"{name}[{i}]", None) for i, value in enumerate(side if isinstance(side, list) else [side])]
        for name, side in ((first, left), (second, right))
    )
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
