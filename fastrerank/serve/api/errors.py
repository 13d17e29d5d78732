"""Which dialect a request speaks, and errors as each of them writes them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from enum import Enum
from http import HTTPStatus
from typing import Any, Literal

__all__ = ["Flavor", "Problem", "Source", "dialect", "error_body", "error_status", "schema_problem"]

LONGEST_MESSAGE = 2000
# Where an error arises: a body that is no JSON, a body that the schema refuses, a route or its middleware, or the
# reranker.
Source = Literal["json", "schema", "route", "request"]


class Flavor(str, Enum):
    """The dialect whose rules apply; `auto` decides by the path and the body."""

    auto = "auto"
    tei = "tei"
    cohere = "cohere"
    jina = "jina"
    vllm = "vllm"
    infinity = "infinity"
    sglang = "sglang"
    voyage = "voyage"


class Problem(Exception):
    """A request that cannot be served: status, TEI's kind of error, what the client did wrong, and in which field.

    The status is that of most dialects; `error_status` says what it is in one of them.
    """

    def __init__(
        self, status: int, kind: str, message: str, headers: dict[str, str] | None = None, field: str | None = None
    ) -> None:
        # The client's text in a message may be megabytes long.
        super().__init__(message if len(message) <= LONGEST_MESSAGE else f"{message[:LONGEST_MESSAGE]}...")
        self.status, self.kind, self.headers, self.field = status, kind, headers or {}, field

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.status, self.kind, str(self), self.headers, self.field), self.__dict__


# Paths that only one dialect has.
_ROUTES = {"/score": Flavor.vllm, "/v1/score": Flavor.vllm, "/info": Flavor.tei, "/models": Flavor.infinity}


def dialect(path: str, names: Collection[str], pinned: Flavor) -> Flavor:
    """Return the dialect of a request: that of its path, else the pinned one, else what its fields tell.

    Args:
        path: of the route. names: the fields of the body; none where there is no body, or none that can be read.

    `auto` stands for requests that several dialects write alike.

    Example:
        >>> dialect("/rerank", {"query", "texts"}, Flavor.auto).value
        'tei'
    """
    if path in _ROUTES:
        return _ROUTES[path]
    if pinned is not Flavor.auto:
        return pinned
    if "texts" in names or (path == "/" and "documents" not in names):
        return Flavor.tei
    if path == "/v2/rerank":
        return Flavor.cohere
    if "documents" in names and ("truncation" in names or ("top_k" in names and "top_n" not in names)):
        return Flavor.voyage
    return Flavor.auto


def schema_problem(errors: Sequence[Any]) -> tuple[str, str | None, list[dict[str, Any]]]:
    """Return what pydantic's errors of a body say: one message, the first field, and rows {"loc", "msg", "type"}.

    Where a field allows several types, pydantic reports an error for each; they become one, at the deepest place.

    Example:
        >>> schema_problem([{"loc": ("body", "texts", 0), "msg": "Input should be a string", "type": "x"}])[0]
        'texts[0] must be a string'
    """
    found: dict[str, dict[tuple[str | int, ...], list[Any]]] = {}
    for error in errors:
        loc = error["loc"][1:]
        # After the field's name, integers are positions in lists and strings are pydantic's type names.
        place = (*loc[:1], *(part for part in loc[1:] if isinstance(part, int)))
        found.setdefault(str(loc[:1]), {}).setdefault(place, []).append(error)
    told, rows = [], []
    for places in found.values():
        place = max(places, key=len)
        # The order of a field's types differs between processes, so sort: a list comes first.
        kept = sorted(
            {error["msg"]: error for error in places[place]}.values(), key=lambda one: "list" not in one["msg"]
        )
        rows += [{"loc": ["body", *place], "msg": error["msg"], "type": error["type"]} for error in kept]
        told.append(_told(place, [str(error["msg"]).replace("a valid dictionary", "an object") for error in kept]))
    names = [row["loc"][1] for row in rows if row["loc"][1:] and isinstance(row["loc"][1], str)]
    return "; ".join(told), names[0] if names else None, rows


def _told(place: tuple[str | int, ...], messages: list[str]) -> str:
    begin = "Input should be "
    if not place:
        name = "the body"
    elif isinstance(place[0], int):
        name = f"the body at position {place[0]}"
    else:
        name = place[0] + "".join(f"[{part}]" for part in place[1:])
    if all(message.startswith(begin) for message in messages):
        return f"{name} must be {' or '.join(message.removeprefix(begin) for message in messages)}"
    if all(message.startswith("Value error, ") for message in messages):  # our own messages name the field
        return ", or ".join(message.removeprefix("Value error, ") for message in messages)
    return f"{name}: {', or '.join(messages)}"


def error_status(flavor: Flavor, status: int, kind: str, source: Source) -> int:
    """Return the status that a dialect uses for a wrong request; other statuses are unchanged."""
    if source == "json":
        return 422 if flavor in (Flavor.auto, Flavor.infinity, Flavor.jina, Flavor.sglang) else 400
    if status == 422 and flavor in (Flavor.vllm, Flavor.voyage):
        return 400
    if status == 400 and (flavor is Flavor.infinity or (flavor is Flavor.tei and kind == "Validation")):
        return 422
    return status


def error_body(
    flavor: Flavor,
    status: int,
    kind: str,
    message: str,
    *,
    source: Source = "request",
    field: str | None = None,
    rows: Collection[Any] = (),
) -> Any:
    """Return an error as a dialect writes it; `auto` is read by the clients of all but TEI.

    Args:
        kind: TEI's, such as "Validation". field: the one that is wrong. rows: as `schema_problem` returns them.
    """
    if flavor is Flavor.tei:
        return {"error": message, "error_type": kind}
    if flavor is Flavor.cohere:
        return {"message": message}
    if flavor is Flavor.voyage or (flavor is Flavor.infinity and source == "route"):
        return {"detail": message}
    if flavor is Flavor.infinity and status == 422:
        place = ["body"] if field is None else ["body", field]
        return {"detail": list(rows) or [{"loc": place, "msg": message, "type": "value_error"}]}
    if flavor in (Flavor.vllm, Flavor.infinity):
        kind = _vllm_kind(status, source)
    error = {"message": message, "type": kind, "param": field, "code": status}
    if flavor is Flavor.auto:
        return {"message": message, "error": error, "detail": message}
    return {"error": error}


def _vllm_kind(status: int, source: Source) -> str:
    if source == "request":
        named = {400: "BadRequestError", 404: "NotFoundError", 500: "InternalServerError"}
        if status in named:
            return named[status]
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Error"
