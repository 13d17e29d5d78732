"""The HTTP application: rerank and score routes in the dialects of TEI, Cohere, Jina, vLLM and Infinity."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import math
import re
import time
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, TypeVar

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

import fastrerank
from fastrerank.rerankers.base import order
from fastrerank.serve.batcher import AsyncReranker, Closed, DeadlineExceeded, Overloaded, Scored
from fastrerank.serve.dialects import (
    Flavor,
    Problem,
    error_body,
    rerank_answer,
    score_answer,
    score_pairs,
    to_ask,
)
from fastrerank.serve.metrics import Metrics
from fastrerank.serve.middleware import AccessLog, BodyLimit, Keys, log
from fastrerank.serve.schemas import RerankBody, ScoreBody

__all__ = ["Settings", "create_app"]

T = TypeVar("T")
# Methods whose raw score is a logit: without raw_scores the answer is its sigmoid, as all dialects have it.
LOGITS = ("cross-encoder", "pointwise")


@dataclass(frozen=True)
class Settings:
    """What a server allows.

    `keys`: bearer tokens, any of which opens; none: open to all. `flavor`: pins what the dialects do differently.
    `max_body_bytes`, `max_documents`, `body_seconds`: bounds of a request; `timeout`: seconds it may take in all, None
    for no bound. `origins`: for CORS; none: off.
    """

    keys: tuple[str, ...] = field(default=(), repr=False)  # secrets
    flavor: Flavor = Flavor.auto
    max_body_bytes: int = 32 << 20
    max_documents: int = 10_000
    body_seconds: float = 30.0
    timeout: float | None = None
    origins: tuple[str, ...] = ()


class _ClientGone(Exception):
    pass


class _Answer(JSONResponse):
    """JSON in UTF-8; a lone surrogate, which has no UTF-8 form, is escaped as the client must have sent it."""

    def render(self, content: Any) -> bytes:
        try:
            return super().render(content)
        except UnicodeEncodeError:
            return json.dumps(content, allow_nan=False).encode()


class _Server:
    """The routes' common work on named models."""

    def __init__(self, models: Mapping[str, AsyncReranker], settings: Settings) -> None:
        self.models, self.settings = models, settings
        self.metrics = Metrics(models)
        self.draining = False

    def model(self, name: str | None) -> tuple[str, AsyncReranker]:
        if name is None or name in ("default", "default/not-specified"):
            name = next(iter(self.models))
        if name not in self.models:
            raise Problem(404, "Validation", f"no model {name!r} here; one of {', '.join(self.models)}")
        return name, self.models[name]

    async def scored(self, request: Request, name: str, query: str, texts: list[str], explain: bool = False) -> Scored:
        """Score one query's texts; errors become what a client should see."""
        reranker = self.models[name]
        self.limit(len(texts))
        request.state.fields |= {"model": name, "documents": len(texts)}
        try:
            result = await reranker.scored(query, texts, timeout=self.settings.timeout, explain=explain)
        except Overloaded as error:
            self.metrics.refused.labels(name).inc()
            wait = str(max(1, math.ceil(error.retry_after)))
            raise Problem(429, "Overloaded", str(error), {"retry-after": wait}) from None
        except DeadlineExceeded as error:
            raise Problem(504, "Backend", str(error)) from None
        except Closed as error:
            raise Problem(503, "Unhealthy", str(error)) from None
        except FloatingPointError as error:
            raise Problem(424, "Backend", str(error)) from None
        except (ValueError, TypeError) as error:
            raise Problem(422, "Validation", str(error)) from None
        self.metrics.scored(name, result)
        request.state.fields |= {"tokens": result.tokens, "waited_ms": round(1e3 * result.waited, 2)}
        return result

    def limit(self, count: int) -> None:
        if count > self.settings.max_documents:
            most = self.settings.max_documents
            raise Problem(422, "Validation", f"batch size {count} > maximum allowed batch size {most}")

    async def rerank(self, request: Request, body: RerankBody, path: str) -> Response:
        ask = to_ask(body, path, self.settings.flavor)
        name, reranker = self.model(ask.model)
        begin = time.perf_counter()
        result = await self.scored(request, name, ask.query, ask.texts, ask.explain)
        values = result.scores if ask.raw else self.activated(reranker, result.scores)
        positions = order(result.scores)[: ask.top_n]  # by raw score: a sigmoid makes ties of large ones
        ranking = [(int(i), float(values[i])) for i in positions]
        answer = rerank_answer(ask, ranking, name, result.tokens, result.explained)
        headers = {
            "x-compute-type": reranker.device_name,
            "x-total-time": _ms(time.perf_counter() - begin),
            "x-queue-time": _ms(result.waited),
            "x-inference-time": _ms(result.compute),
            "x-compute-characters": str(sum(len(ask.query) + len(text) for text in ask.texts)),
            "x-compute-tokens": str(result.tokens),
        }
        try:
            return _Answer(answer, headers=headers)
        except (ValueError, RecursionError):
            message = "a document is nested too deep, or holds a number that JSON does not have, to be returned"
            raise Problem(422, "Validation", message) from None

    async def score(self, request: Request, body: ScoreBody) -> Response:
        left, right = score_pairs(body)
        name, reranker = self.model(body.model)
        self.limit(len(left))
        groups: dict[str, list[int]] = {}
        for i, query in enumerate(left):
            groups.setdefault(query, []).append(i)
        results = await _all(
            [self.scored(request, name, query, [right[i] for i in members]) for query, members in groups.items()]
        )
        raw = np.zeros(len(left), np.float32)
        for members, result in zip(groups.values(), results, strict=True):
            raw[members] = result.scores
        request.state.fields |= {"documents": len(left)}
        values = raw if body.raw_scores or body.use_activation is False else self.activated(reranker, raw)
        tokens = sum(result.tokens for result in results)
        return JSONResponse(score_answer([float(value) for value in values], name, tokens))

    @staticmethod
    def activated(reranker: AsyncReranker, raw: Any) -> Any:
        if reranker.reranker.method not in LOGITS:
            return raw
        return 1.0 / (1.0 + np.exp(-raw.astype(np.float64)))

    def info(self) -> dict[str, Any]:
        """What is served, in TEI's fields where it has one."""
        name, first = self.model(None)
        rows = {
            name: {"method": one.reranker.method, "score": "logit" if one.reranker.method in LOGITS else "raw",
                   "max_length": one.max_length, "device": one.device_name, "explain": one.explains}
            for name, one in self.models.items()
        }  # fmt: skip
        return {
            "model_id": name, "model_type": {"reranker": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}},
            "max_input_length": first.max_length, "max_batch_tokens": first.max_batch_tokens,
            "max_client_batch_size": self.settings.max_documents, "version": fastrerank.__version__, "models": rows,
        }  # fmt: skip


async def _all(jobs: list[Coroutine[Any, Any, T]]) -> list[T]:
    """Results of all; when one fails the others are cancelled, so that nothing is scored for nobody."""
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def _while_there(request: Request, job: Coroutine[Any, Any, T]) -> T:
    """The job's result; a client that goes away cancels it."""
    task = asyncio.ensure_future(job)
    gone = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise _ClientGone
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


def _ms(seconds: float) -> str:
    return str(round(1e3 * seconds))


def create_app(models: Mapping[str, AsyncReranker], settings: Settings | None = None) -> FastAPI:
    """Return the ASGI application that serves `models` by name; the first is the one that requests need not name.

    When it shuts down, what was accepted is finished and the models are closed. Raises ValueError without a model.

    Example:
        >>> app = create_app({"minilm": AsyncReranker(fastrerank.load("path"))})     # doctest: +SKIP
    """
    settings = settings or Settings()
    if not models:
        raise ValueError("models must name at least one reranker, got none")
    server = _Server(models, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        server.draining = False
        yield
        server.draining = True
        for reranker in models.values():
            await reranker.aclose()

    app = FastAPI(
        title="fastrerank", version=fastrerank.__version__, lifespan=lifespan,
        description="Reranking in the dialects of TEI, Cohere, Jina, vLLM and Infinity.",
    )  # fmt: skip
    app.state.server = server
    app.add_middleware(BodyLimit, size=settings.max_body_bytes, seconds=settings.body_seconds)
    app.add_middleware(Keys, keys=settings.keys)
    if settings.origins:
        app.add_middleware(CORSMiddleware, allow_origins=settings.origins, allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(AccessLog, observe=server.metrics.request)
    _add_errors(app, settings)
    _add_routes(app, server)
    return app


def _add_errors(app: FastAPI, settings: Settings) -> None:
    def problem(request: Request, status: int, kind: str, message: str, headers: Any = None) -> JSONResponse:
        flavor = settings.flavor
        if flavor is Flavor.auto:
            flavor = getattr(request.state, "flavor", Flavor.auto)
        return JSONResponse(error_body(flavor, status, kind, message), status, headers)

    @app.exception_handler(Problem)
    async def _problem(request: Request, error: Problem) -> Response:
        return problem(request, error.status, error.kind, str(error), error.headers)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> Response:
        if isinstance(error.body, dict) and "texts" in error.body:
            request.state.flavor = Flavor.tei
        rows = [f"{'.'.join(map(str, row['loc'][1:])) or 'body'}: {row['msg']}" for row in error.errors()]
        status = 400 if settings.flavor is Flavor.vllm else 422
        return problem(request, status, "Validation", "; ".join(rows[:5]))

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        return problem(request, error.status_code, "Validation", str(error.detail), error.headers)

    @app.exception_handler(_ClientGone)
    async def _gone(request: Request, _: _ClientGone) -> Response:
        request.state.fields |= {"client_gone": True}
        return Response(status_code=499)

    @app.exception_handler(Exception)
    async def _failed(request: Request, error: Exception) -> Response:
        log.error("request failed", exc_info=error, extra={"fields": getattr(request.state, "fields", {})})
        return problem(request, 500, "Backend", f"{type(error).__name__} while scoring; the server's log has more")


def _add_routes(app: FastAPI, server: _Server) -> None:
    async def rerank(request: Request, body: RerankBody) -> Response:
        if body.texts is not None:
            request.state.flavor = Flavor.tei
        elif request.url.path == "/v2/rerank":
            request.state.flavor = Flavor.cohere
        return await _while_there(request, server.rerank(request, body, request.url.path))

    async def score(request: Request, body: ScoreBody) -> Response:
        request.state.flavor = Flavor.vllm
        return await _while_there(request, server.score(request, body))

    errors: dict[int | str, dict[str, Any]] = {
        400: {"description": "Nothing to rank."},
        401: {"description": "No valid key."},
        404: {"description": "No such model."},
        408: {"description": "The body did not arrive in time."},
        413: {"description": "The body is too large."},
        422: {"description": "The body is not what the dialect allows."},
        424: {"description": "A score is NaN."},
        429: {"description": "The queue is full; Retry-After says when to come back."},
        503: {"description": "The server is shutting down."},
        504: {"description": "The request's time was over."},
    }
    for path in ("/rerank", "/v1/rerank", "/v2/rerank", "/"):
        app.add_api_route(path, rerank, methods=["POST"], responses=errors, response_model=None,
                          summary="Rank documents by a query", name=f"rerank {path}")  # fmt: skip
    for path in ("/score", "/v1/score"):
        app.add_api_route(path, score, methods=["POST"], responses=errors, response_model=None,
                          summary="Score pairs", name=f"score {path}")  # fmt: skip

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        rows = [{"id": name, "object": "model", "owned_by": "fastrerank"} for name in server.models]
        return {"object": "list", "data": rows}

    @app.get("/info")
    async def info() -> dict[str, Any]:
        return server.info()

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready", responses={503: {"description": "The server is shutting down."}})
    async def ready() -> dict[str, str]:
        if server.draining:
            raise Problem(503, "Unhealthy", "the server is shutting down")
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    html = files("fastrerank.serve").joinpath("page.html").read_text("utf-8")
    policy = {"content-security-policy": _policy(html)}

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(html, headers=policy)


def _policy(html: str) -> str:
    """What a browser may do with the page: run its own script and style, and ask this server."""
    rules = ["default-src 'none'", "connect-src 'self'", "img-src data:", "base-uri 'none'", "frame-ancestors 'none'"]
    for tag in ("script", "style"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        rules.append(f"{tag}-src 'sha256-{digest}'")
    return "; ".join(rules)
