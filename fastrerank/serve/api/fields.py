"""What the fields of a body ask of a reranker. Each is honoured, refused by name, or reported as ignored."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any
from urllib.parse import quote

from fastrerank.rerankers.call import NO_OPTIONS, CallOptions
from fastrerank.serve.api.errors import Flavor, Problem
from fastrerank.serve.api.schemas import Common, ScoreBody
from fastrerank.serve.batching.batcher import AsyncReranker

__all__ = ["agreed", "call_options", "ignored_header", "raw_wanted", "refuse", "refuses_to_cut", "unknown_names"]

# Fields about transport, images or padding: they change neither scores nor results.
_WITHOUT_EFFECT = frozenset({"user", "request_id", "cache_salt", "mm_processor_kwargs", "padding"})
# Fields that only /rerank uses.
_RERANK_ONLY = (
    "texts",
    "top_n",
    "top_k",
    "topN",
    "score_threshold",
    "min_score",
    "return_documents",
    "return_text",
    "explain",
    "rank_fields",
)
# Default document limit of Cohere's v2.
COHERE_TOKENS_PER_DOC = 4096
# A larger token limit has no effect.
_MOST_TOKENS = 2**31 - 1
# Most names of one request that are reported, and most letters of a name in a header.
_MOST_NAMES, _LONGEST_NAME = 16, 60


def refuse(field: str, message: str, status: int = 422) -> Problem:
    """Return the error of a field that has no valid value; `message` follows its name."""
    return Problem(status, "Validation", f"`{field}` {message}", field=field)


def agreed(given: Iterable[tuple[str, Any]]) -> tuple[str, Any]:
    """Return the one (name, value) of fields that mean the same, ("", None) where none was sent.

    Raises Problem for two that differ.
    """
    found: tuple[str, Any] = ("", None)
    for name, value in given:
        if value is None:
            continue
        if found[0] and value != found[1]:
            raise refuse(name, f"and `{found[0]}` mean the same and differ: send one of them")
        found = found if found[0] else (name, value)
    return found


def raw_wanted(body: Common) -> bool:
    """Whether the raw score is asked for, and not what the dialect makes of it."""
    activated = None if body.use_activation is None else not body.use_activation
    given = (("raw_scores", body.raw_scores), ("raw", body.raw), ("use_activation", activated))
    return bool(agreed(given)[1])


def call_options(
    body: Common, flavor: Flavor, served: AsyncReranker, *, cohere_v2: bool = False
) -> tuple[CallOptions, list[str]]:
    """Return the options of the reranker's call, and the names of fields that have no effect.

    Args:
        flavor: the request's dialect. cohere_v2: whether documents are cut to 4096 tokens where nothing else is said.

    Raises Problem naming a field that cannot be honoured.
    """
    _refuse_unbuilt(body)
    reranker, ignored = served.reranker, []
    given = _limits(body, flavor, served.max_length)
    can = reranker.honoured_options
    if given.get("truncation_side", ("", ""))[1] == "right" and "truncation_side" not in can:
        del given["truncation_side"]  # such a method cuts in its own way, and clients of TEI always send the field
    if body.label is not None:
        given["label"] = ("label", body.label)
    instruction = _instruction(body)
    if instruction[1] is not None:
        given["instruction"] = instruction
    if body.priority:
        ignored.append("priority")
    options: dict[str, Any] = {}
    for option, (field, value) in given.items():
        try:
            if option not in can:
                raise ValueError(_refusal(option, served, can))
            reranker.check_options(**{option: value})
        except (ValueError, TypeError) as error:
            if option == "instruction" and flavor is Flavor.vllm:  # as vLLM takes one that no template has a place for
                ignored.append(field)
                continue
            raise refuse(field, f"cannot be honoured: {error}") from None
        options[option] = value
    # Defaults of the dialect, as far as the method can follow them.
    cut = {"max_length", "truncate", "max_tokens_per_doc", "max_tokens_per_query"} & options.keys()
    if flavor is Flavor.vllm and not cut and not _said_to_cut(body) and "truncate" in can:
        options["truncate"] = False
    roomy = served.max_length is None or served.max_length > COHERE_TOKENS_PER_DOC
    said = body.max_tokens_per_doc is not None or body.max_doc_length is not None
    if cohere_v2 and roomy and not said and "max_tokens_per_doc" in can:
        options["max_tokens_per_doc"] = COHERE_TOKENS_PER_DOC
    if not options:
        return NO_OPTIONS, ignored
    try:
        return reranker.check_options(**options), ignored
    except (ValueError, TypeError) as error:
        raise Problem(422, "Validation", str(error)) from None


def _refusal(option: str, served: AsyncReranker, can: Collection[str]) -> str:
    """Why the model does not honour `option`, in the terms of a client, who sees fields and no Python."""
    reason = {
        "label": "only a classification head has labels",
        "instruction": "its input has no place for an instruction",
    }.get(option, "it reads its texts in another way")
    takes = ", ".join(sorted(can)) or "none"
    return f"this model's method is {served.reranker.method!r}, and {reason}; leave it out (/info: it takes {takes})"


def _refuse_unbuilt(body: Common) -> None:
    """Raise Problem for fields that would change the answer, and that nothing here can honour."""
    if body.max_chunks_per_doc is not None:
        raise refuse("max_chunks_per_doc", "cannot be honoured: documents are cut, not split into chunks; leave it out")
    if body.relevant_spans is not None and body.relevant_spans.get("mode") != "disabled":
        raise refuse("relevant_spans", "cannot be honoured: no model here finds spans; leave it out")
    if body.return_embeddings:
        raise refuse("return_embeddings", "cannot be honoured: results carry no vectors; leave it out")
    if body.threshold is not None:
        raise refuse("threshold", "prunes texts, which no model here does; to drop results: `score_threshold`")
    if isinstance(body, ScoreBody):
        extra = body.model_extra or {}
        for name in _RERANK_ONLY:
            if extra.get(name) not in (None, False):
                raise refuse(name, "is for /rerank: /score returns the score of every pair, in their order")


def _limits(body: Common, flavor: Flavor, most: int | None) -> dict[str, tuple[str, Any]]:
    """{option: (field, value)} of what is said about cutting; `most`: tokens of the model's pairs."""
    given: dict[str, tuple[str, Any]] = {}
    for option, other in (("max_tokens_per_doc", "max_doc_length"), ("max_tokens_per_query", "max_query_length")):
        field, count = agreed((name, getattr(body, name)) for name in (option, other))
        if not count:
            continue
        if flavor is Flavor.vllm and most is not None and count >= most:
            raise refuse(field, f"must be less than the model's limit, {most} tokens, got {count}", 400)
        given[option] = (field, min(count, _MOST_TOKENS))
    length = body.truncate_prompt_tokens
    if length == 0:
        raise refuse("truncate_prompt_tokens", "must be -1, for the model's limit, or at least 1, got 0")
    if length is not None and length > 0:
        if most is not None and length > most:
            message = f"must be at most the model's limit, {most} tokens, got {length}; -1 stands for that limit"
            raise refuse("truncate_prompt_tokens", message, 400)
        given["max_length"] = ("truncate_prompt_tokens", min(length, _MOST_TOKENS))
    direction = body.truncation_direction and body.truncation_direction.lower()
    side = agreed((("truncation_side", body.truncation_side), ("truncation_direction", direction)))
    if side[1] is not None:
        given["truncation_side"] = side
    cut = _cut(body)
    if cut[1] is False:
        given["truncate"] = cut
    return given


def _said_to_cut(body: Common) -> bool:
    return body.truncate_prompt_tokens is not None or _cut(body)[1] is True


def _cut(body: Common) -> tuple[str, bool | None]:
    """(field, whether long texts may be cut), ("", None) where the request does not say; "END" is NVIDIA's true."""
    truncate = body.truncate == "END" if isinstance(body.truncate, str) else body.truncate
    return agreed((("truncate", truncate), ("truncation", body.truncation)))


def refuses_to_cut(body: Common) -> str | None:
    """Return the field that says that long texts are refused."""
    field, cut = _cut(body)
    return field if cut is False else None


def _instruction(body: Common) -> tuple[str, str | None]:
    """(field, text) of the instruction, ("", None) for none."""
    given: list[tuple[str, Any]] = [("instruction", body.instruction), ("instruct", body.instruct)]
    for key, value in (body.chat_template_kwargs or {}).items():
        field = f"chat_template_kwargs.{key}"
        if key not in ("instruction", "instruct"):
            shown = ignored_header([key])
            raise refuse("chat_template_kwargs", f"may hold `instruction` and `instruct`, got {shown!r}")
        if value is not None and not isinstance(value, str):
            raise refuse(field, f"must be a string, got {type(value).__name__}")
        given.append((field, value))
    return agreed(given)


def unknown_names(body: Common) -> list[str]:
    """Return the names of a body's fields that no dialect has, and that are ignored."""
    names = [name for name in body.model_extra or {} if name not in _WITHOUT_EFFECT]
    return [name for name in names if name not in _RERANK_ONLY] if isinstance(body, ScoreBody) else names


def ignored_header(names: Iterable[str]) -> str:
    """Return names as the value of a header: percent-encoded, cut, and no more than sixteen of them.

    Example:
        >>> ignored_header(["normalize", "a b"])
        'normalize, a%20b'
    """
    listed = list(names)
    cut = [name[:_LONGEST_NAME].encode("utf-8", "replace") for name in listed[:_MOST_NAMES]]
    shown = [quote(name, safe="")[:_LONGEST_NAME] for name in cut]
    more = len(listed) - len(shown)
    return ", ".join(shown) + (f", and {more} more" if more else "")
