"""The server process: models from the command line, signals, and a graceful end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.config import STARTUP_FAILURE
from uvicorn.protocols.http.h11_impl import H11Protocol

from fastrerank.serve.health import WorkerDied, dead
from fastrerank.serve.listener import Acceptor, listen
from fastrerank.serve.logs import BoundedHandler
from fastrerank.serve.middleware import JsonFormatter

__all__ = ["parse_models", "read_keys", "serve", "url_of"]


def parse_models(values: Sequence[str]) -> dict[str, str]:
    """Return {name: checkpoint} of `--model` values: "NAME=CHECKPOINT", or a checkpoint, whose name is its last part.

    Raises ValueError for a name that is empty or given twice.

    Example:
        >>> parse_models(["BAAI/bge-reranker-base", "small=models/minilm"])
        {'bge-reranker-base': 'BAAI/bge-reranker-base', 'small': 'models/minilm'}
    """
    models: dict[str, str] = {}
    for value in values:
        name, separator, checkpoint = value.partition("=")
        if not separator:
            name, checkpoint = Path(value).name, value
        if not name or not checkpoint:
            raise ValueError(f"--model must be NAME=CHECKPOINT or CHECKPOINT, got {value!r}")
        if name in models:
            raise ValueError(f"two models are named {name!r}; name one of them: --model NAME=CHECKPOINT")
        models[name] = checkpoint
    return models


def read_keys(path: Path | None) -> tuple[str, ...]:
    """Return the API keys of a file, one a line, or of FASTRERANK_API_KEY (comma-separated); () where it is not set.

    Raises ValueError for a file without a key, and for a variable that is set and holds none.
    """
    if path is not None:
        keys = tuple(line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip())
        if not keys:
            raise ValueError(f"--api-key-file: {path} holds no key; without keys the server would be open to all")
        return keys
    given = os.environ.get("FASTRERANK_API_KEY")
    if given is None:
        return ()
    keys = tuple(key.strip() for key in given.split(",") if key.strip())
    if not keys:
        raise ValueError(
            "FASTRERANK_API_KEY is set and holds no key: give it keys (separated by commas), or unset it to serve "
            "without a key"
        )
    return keys


def url_of(host: str, port: int) -> str:
    """Return the address under which a browser on this machine finds a server that listens on `host`.

    Example:
        >>> url_of("0.0.0.0", 8080), url_of("::1", 80)
        ('http://127.0.0.1:8080/', 'http://[::1]:80/')
    """
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


class _Protocol(H11Protocol):
    """HTTP/1.1 that closes connections whose request headers do not arrive in time."""

    header_seconds: float
    _headers_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._headers_due is None or self._in_request():
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def _in_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _watch(self) -> None:
        """Start the timer for headers, unless a request is being handled."""
        self._unwatch()
        if not self._in_request() and not self.transport.is_closing():
            self._headers_due = self.loop.call_later(self.header_seconds, self.transport.close)

    def _unwatch(self) -> None:
        if self._headers_due is not None:
            self._headers_due.cancel()
            self._headers_due = None


class _UvicornServer(uvicorn.Server):
    """Ends with exit code 0 on SIGTERM, SIGINT and SIGHUP instead of being killed by them."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for name in ("SIGTERM", "SIGINT", "SIGHUP"):
            if (number := getattr(signal, name, None)) is not None:
                loop.add_signal_handler(number, self.handle_exit, number, None)
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application, and accept from `sockets` by `Acceptor`, which survives a lack of file descriptors."""
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            sys.exit(STARTUP_FAILURE)

        def protocol() -> asyncio.Protocol:
            made: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg]
                config=self.config, server_state=self.server_state, app_state=self.lifespan.state
            )
            return made

        self.servers = [Acceptor(one, protocol) for one in sockets or []]  # type: ignore[misc]
        self.started = True


def serve(
    app: FastAPI, host: str, port: int, *, grace: float = 30.0, header_seconds: float = 10.0, json_logs: bool = True
) -> None:
    """Serve until SIGTERM, SIGINT or SIGHUP; then accept nothing more, finish what was accepted, and return.

    Args:
        port: 0 takes a free one, which the log tells.
        grace: seconds that running requests may take after the signal.
        header_seconds: a connection that takes longer to send a request's headers is closed.

    Raises OSError if the address cannot be bound, and WorkerDied if a model lost a worker thread; accepted requests are
    answered first, as far as possible.
    """
    handler = BoundedHandler(sys.stderr.fileno())
    if json_logs:
        handler.setFormatter(JsonFormatter())
    for name in ("fastrerank", "uvicorn.error", "asyncio"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
    protocol = type("Protocol", (_Protocol,), {"header_seconds": header_seconds})
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        http=protocol,
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=max(1, round(grace)),
        timeout_keep_alive=75,
    )
    server = _UvicornServer(config)
    models = app.state.server.models
    app.state.server.metrics.log_lines_dropped(lambda: handler.dropped)
    try:
        with listen(host, port, config.backlog) as listener:
            where, bound = listener.getsockname()[:2]
            logging.getLogger("fastrerank").info(
                "serving", extra={"fields": {"host": where, "port": bound, "models": list(models)}}
            )
            if sys.stdout.isatty():
                url = url_of(where, bound)
                print(f"Serving at {url} (all routes: {url}docs). Ctrl-C ends it.", flush=True)

            async def run() -> None:
                task = asyncio.ensure_future(server.serve(sockets=[listener]))
                while not task.done():
                    await asyncio.wait({task}, timeout=0.05)
                    server.should_exit = server.should_exit or dead(models) is not None
                    if server.should_exit:
                        app.state.server.draining = True
                await task

            asyncio.run(run())
        problem = dead(models)
        if problem is not None:
            raise WorkerDied(problem)
    finally:
        handler.flush()
