"""Parsing of JSON bodies off the event loop. Validation stops at the first errors, so its cost is bounded."""

from __future__ import annotations

import asyncio
import email.message
import json
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from operator import getitem
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, FailFast, ValidationError, create_model

from fastrerank.serve.api.errors import Problem

__all__ = ["Bodies", "body_route", "stopping"]

T = TypeVar("T", bound=BaseModel)

# Commas and opening brackets of one body. A JSON value takes up to 232 bytes in Python, so this bounds the memory of a
# parsed body; ten thousand documents with fifty fields each fit.
MOST_VALUES = 500_000
# Smaller bodies are parsed on the event loop: handing them to a thread would take longer.
INLINE_BYTES = 16 << 10


class Bodies:
    """Reads bodies as models, large ones in `threads` threads, and refuses those of more than `most_values` values."""

    def __init__(self, threads: int = 2, most_values: int = MOST_VALUES) -> None:
        self.most_values = most_values
        self._pool = ThreadPoolExecutor(threads, "fastrerank-body")
        self._stopping: dict[type[BaseModel], Any] = {}  # a model -> the same, but its lists stop at an error

    async def read(self, request: Request, model: type[T]) -> T:
        """Return the request's JSON body as `model`.

        Raises RequestValidationError for what is not JSON, or not what the model allows, and Problem (413) for more
        values than are allowed.
        """
        raw = await request.body()
        if not _is_json(request.headers.get("content-type", "")):
            raise _wrong((), "the content-type must be application/json")
        if len(raw) <= INLINE_BYTES:
            return self.parsed(raw, model)
        return await asyncio.get_running_loop().run_in_executor(self._pool, self.parsed, raw, model)

    def parsed(self, raw: bytes, model: type[T]) -> T:
        """Return `raw` as `model`; raises as `read` does."""
        if _more_values(raw, self.most_values):
            message = f"the body holds more than {self.most_values} JSON values: send fewer documents at a time"
            raise Problem(413, "Validation", message)
        try:
            value = json.loads(raw)
        except json.JSONDecodeError as error:
            raise _wrong((error.pos,), f"JSON decode error: {error.msg}") from None
        except RecursionError:
            raise _wrong((), "JSON decode error: nested too deep") from None
        except ValueError as error:  # not UTF-8, or an integer of thousands of digits
            raise _wrong((), f"JSON decode error: {error}") from None
        if model not in self._stopping:
            self._stopping[model] = stopping(model)
        try:
            found: T = self._stopping[model].model_validate(value)
        except ValidationError as error:
            rows = error.errors(include_url=False, include_context=False, include_input=False)[:5]
            raise RequestValidationError([{**row, "loc": ("body", *row["loc"])} for row in rows], body=value) from None
        return found


def body_route(bodies: Bodies) -> type[APIRoute]:
    """Return a class of routes whose endpoints `(request, body)` get their `body` from `bodies`.

    FastAPI's own routes parse and validate on the event loop, and collect every error of a body.
    """

    class BodyRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            if self.body_field is None:
                return super().get_route_handler()
            model = get_type_hints(self.endpoint)["body"]

            async def handle(request: Request) -> Response:
                answer: Response = await self.endpoint(request=request, body=await bodies.read(request, model))
                return answer

            return handle

    return BodyRoute


def _wrong(place: tuple[int, ...], message: str) -> RequestValidationError:
    return RequestValidationError([{"type": "json_invalid", "loc": ("body", *place), "msg": message}])


def _is_json(content_type: str) -> bool:
    message = email.message.Message()
    message["content-type"] = content_type
    subtype = message.get_content_subtype()
    return message.get_content_maintype() == "application" and (subtype == "json" or subtype.endswith("+json"))


def _more_values(raw: bytes, most: int) -> bool:
    """Whether there are more than `most` commas and opening brackets outside strings."""
    signs = (b",", b"[", b"{")
    if sum(map(raw.count, signs)) <= most:  # true for most bodies, texts included
        return False
    plain = np.frombuffer(raw.replace(b"\\\\", b"").replace(b'\\"', b""), np.uint8)
    inside = np.logical_xor.accumulate(plain == ord('"'))
    outside = np.zeros(len(plain), np.bool_)
    for sign in signs:
        outside |= plain == ord(sign)
    return int(np.count_nonzero(outside & ~inside)) > most


class _FailFast(FailFast):
    """Hashable, so that it may stand in a Union."""

    def __hash__(self) -> int:
        return hash(self.fail_fast)


def stopping(model: type[T]) -> type[T]:
    """Return a class of `model` whose lists stop at their first error.

    Example:
        >>> stopping(RerankBody).model_validate({"query": "q", "documents": [0] * 10**6})   # doctest: +SKIP
        Traceback (most recent call last):
        ...
        pydantic_core._pydantic_core.ValidationError: 2 validation errors for RerankBody
    """
    hints = get_type_hints(model, include_extras=True)
    lists: dict[str, Any] = {
        name: (changed, copy(field))
        for name, field in model.model_fields.items()
        if (changed := _with_fail_fast(hints[name])) != hints[name]
    }
    made: type[T] = create_model(model.__name__, __base__=model, __doc__=model.__doc__, **lists)
    return made


def _with_fail_fast(kind: Any) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is list or origin is list:
        return Annotated[list[_with_fail_fast(arguments[0])] if arguments else list, _FailFast()]  # type: ignore[misc]
    if origin is Annotated:
        return getitem(Annotated, (_with_fail_fast(arguments[0]), *arguments[1:]))
    if origin in (Union, UnionType):
        return Union[tuple(map(_with_fail_fast, arguments))]  # noqa: UP007
    return kind
