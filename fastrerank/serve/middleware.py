"""Middleware: request ids, the access log, API keys, and bounds on the size and the duration of a body."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from starlette.exceptions import HTTPException

from fastrerank.serve.api.errors import Problem

__all__ = ["AccessLog", "BodyLimit", "JsonFormatter", "Keys"]

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

log = logging.getLogger("fastrerank.serve")
_GOOD_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class JsonFormatter(logging.Formatter):
    """One JSON object per line, with the record's message and its `fields`. It never holds a document's text."""

    def format(self, record: logging.LogRecord) -> str:
        row = {"time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"), "level": record.levelname.lower()}
        row |= {"logger": record.name, "message": record.getMessage(), **getattr(record, "fields", {})}
        if record.exc_info:
            row["exception"] = self.formatException(record.exc_info)
        return json.dumps(row)


class AccessLog:
    """Gives every request an id (the client's `x-request-id`, if it sent one) and a line in the log; counts it.

    Args:
        observe: called with (path template, status, seconds) of each finished request.
    """

    def __init__(self, app: App, observe: Callable[[str, int, float], None]) -> None:
        self.app, self.observe = app, observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        name = given if _GOOD_ID.fullmatch(given) else uuid.uuid4().hex.encode()
        scope.setdefault("state", {})["fields"] = fields = {"request_id": name.decode()}
        begin, status = time.perf_counter(), 499  # the status if the client leaves before an answer starts

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", name)]
            await send(message)

        try:
            await self.app(scope, receive, answer)
        finally:
            seconds = time.perf_counter() - begin
            route = scope.get("route")
            self.observe(getattr(route, "path", "other"), status, seconds)
            fields |= {
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "ms": round(1e3 * seconds, 2),
            }
            log.info("request", extra={"fields": fields})


class Keys:
    """Answers 401 to requests without one of the keys in `Authorization: Bearer`. Open paths need no key.

    Keys are compared in a time that does not depend on where they differ.
    """

    OPEN = ("/health", "/ready")
    # Pages that a browser opens without a header. They and their files hold no secret.
    PAGES = ("/", "/docs", "/openapi.json")

    def __init__(
        self, app: App, keys: Sequence[str], open_page: bool = True, body: Callable[[str, str], Any] | None = None
    ) -> None:
        """`body`: (path, message) -> what the answer holds, as JSON."""
        self.app, self.keys = app, [key.encode() for key in keys]
        self.body = body or (lambda _, message: {"message": message})
        self.open = (*self.OPEN, *self.PAGES) if open_page else self.OPEN
        self.folders = ("/docs/",) if open_page else ()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.keys and not self._may(scope):
            message = "a valid API key is needed: Authorization: Bearer KEY"
            await respond(send, 401, self.body(scope["path"], message), {"www-authenticate": "Bearer"})
            return
        await self.app(scope, receive, send)

    def _may(self, scope: Scope) -> bool:
        path = scope["path"]
        if scope["method"] in ("GET", "HEAD") and (path in self.open or path.startswith(self.folders)):
            return True
        kind, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        right = [hmac.compare_digest(key, known) for known in self.keys]
        return kind.lower() == b"bearer" and any(right)


class BodyLimit:
    """Answers 413 to bodies of more than `size` bytes, and 408 to bodies that take more than `seconds` to arrive.

    The bodies of all unanswered requests may have `together` bytes; a request that would exceed them gets 429.
    """

    def __init__(self, app: App, size: int, seconds: float, together: int) -> None:
        self.app, self.size, self.seconds, self.together = app, size, seconds, together
        self.held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        end = time.monotonic() + self.seconds
        received, whole = 0, False

        async def limited() -> Message:
            nonlocal received, whole
            if whole:  # after the body the only message is that the client left, which may come at any time
                return await receive()
            if declared.isdigit() and int(declared) > self.size:
                raise self._too_large()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, end - time.monotonic()))
            except (asyncio.TimeoutError, TimeoutError):
                raise HTTPException(
                    408, f"the body took more than {self.seconds:g} s to arrive", {"connection": "close"}
                ) from None
            if message["type"] == "http.request":
                size = len(message.get("body", b""))
                received += size
                self.held += size
                if received > self.size:
                    raise self._too_large()
                if self.held > self.together:
                    raise Problem(
                        429,
                        "Overloaded",
                        f"the bodies of all requests together exceed {self.together} bytes",
                        {"retry-after": "1", "connection": "close"},
                    )
                whole = not message.get("more_body", False)
            return message

        try:
            await self.app(scope, limited, send)
        finally:
            self.held -= received

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"the body exceeds {self.size} bytes", {"connection": "close"})


async def respond(send: Send, status: int, body: Any, headers: dict[str, str]) -> None:
    """Send a JSON response from a middleware."""
    raw = json.dumps(body).encode()
    lines = {"content-type": "application/json", "content-length": str(len(raw)), **headers}
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(name.encode(), value.encode()) for name, value in lines.items()],
        }
    )
    await send({"type": "http.response.body", "body": raw})
