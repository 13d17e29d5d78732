"""The server's process under faults: panics, dead workers, no descriptors, no reader of the log, signals, keys."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx")

import httpx
import uvicorn
from helpers_tiny import save_tiny_cross_encoder
from serve_fakes import Lengths
from serve_running import Running

from bench.serve.faulty import BREAK, DIE, PANIC
from fastrerank.serve import listener
from fastrerank.serve.app import Settings, create_app
from fastrerank.serve.batching.batcher import AsyncReranker
from fastrerank.serve.listener import Acceptor, listen
from fastrerank.serve.logs import BoundedHandler
from fastrerank.serve.run import _Protocol, _UvicornServer, read_keys

FAULTY = [sys.executable, "-m", "bench.serve.faulty"]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(save_tiny_cross_encoder(tmp_path_factory.mktemp("robust")))


def post(url: str, *texts: str) -> httpx.Response:
    return httpx.post(f"{url}/rerank", json={"query": "the flea", "texts": texts, "raw_scores": True}, timeout=30)


def test_panics_fail_their_request_and_a_dead_worker_ends_the_process(checkpoint: Path) -> None:
    running = Running("--model", f"one={checkpoint}", command=FAULTY, cwd=ROOT)
    try:
        before = post(running.url, "a cat", "the flea").json()
        for fault, name in ((PANIC, "ScoringFailed"), (BREAK, "RuntimeError")):
            failed = post(running.url, "a cat", fault)
            assert failed.status_code == 500
            assert name in failed.json()["error"]
        assert post(running.url, "a cat", "the flea").json() == before
        assert httpx.get(f"{running.url}/health").status_code == 200
        assert post(running.url, DIE).status_code == 503
        with suppress(httpx.TransportError):  # unless it has ended already
            assert httpx.get(f"{running.url}/health").status_code == 503
        running.process.wait(20)
        assert running.process.returncode not in (None, 0)
        assert running.process.returncode > 0  # an exit code and no signal
    finally:
        running.kill()


def test_health_and_readiness_fail_where_a_worker_has_died() -> None:
    shared = AsyncReranker(Lengths())
    transport = httpx.ASGITransport(create_app({"one": shared}))

    async def statuses() -> list[int]:
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return [(await client.get(path)).status_code for path in ("/health", "/ready")]

    assert asyncio.run(statuses()) == [200, 200]
    shared._fail(SystemExit())
    assert asyncio.run(statuses()) == [503, 503]
    shared.close()


def test_connections_have_no_delay() -> None:
    options = []

    class Watched(_Protocol):
        header_seconds = 10.0

        def connection_made(self, transport: Any) -> None:
            options.append(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            super().connection_made(transport)

    async def run() -> bytes:
        app = create_app({"one": AsyncReranker(Lengths())})
        server = _UvicornServer(uvicorn.Config(app, http=Watched, log_config=None, ws="none"))
        with listen("127.0.0.1", 0, 16) as one:
            port = one.getsockname()[1]
            task = asyncio.ensure_future(server.serve(sockets=[one]))
            while not server.started:
                await asyncio.sleep(0.01)
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            answer = await asyncio.wait_for(reader.read(), 10)
            writer.close()
            server.should_exit = True
            await task
        return answer

    assert asyncio.run(run()).startswith(b"HTTP/1.1 200")
    assert len(options) == 1
    assert options[0] != 0
    assert listen("::1", 0, 1).proto == socket.IPPROTO_TCP if socket.has_ipv6 else True


def test_without_descriptors_the_log_stays_short_and_the_server_comes_back(checkpoint: Path) -> None:
    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

    running = Running("--model", str(checkpoint), preexec_fn=few)
    try:
        with ExitStack() as stack:
            for _ in range(150):
                stack.enter_context(socket.create_connection(("127.0.0.1", running.port), timeout=10))
            time.sleep(2)
        end = time.monotonic() + 20
        while httpx.get(f"{running.url}/health", timeout=20).status_code != 200:
            assert time.monotonic() < end
        code, rest = running.end()
    finally:
        running.kill()
    assert code == 0
    lines = [json.loads(line) for line in rest.splitlines()]
    shortage = [line for line in lines if "no connections can be accepted" in line["message"]]
    assert len(shortage) == 1
    assert len(lines) < 20


def test_a_log_that_nobody_reads_does_not_stop_the_server(checkpoint: Path) -> None:
    running = Running("--model", str(checkpoint))
    try:
        path = "/" + "x" * 8000  # each line of the log has it
        with httpx.Client(base_url=running.url, timeout=10) as client:
            for _ in range(300):  # twice what the pipe and the queue hold
                assert client.get(path).status_code == 404
            dropped = [line for line in client.get("/metrics").text.splitlines() if line.startswith("fastrerank_log")]
            assert float(dropped[0].split()[1]) > 0
            assert client.get("/health").status_code == 200
        running.process.send_signal(signal.SIGTERM)
        running.process.wait(20)  # with a full pipe, too
        assert running.process.returncode == 0
    finally:
        running.kill()


def test_sighup_ends_the_server_as_sigterm_does(checkpoint: Path) -> None:
    assert Running("--model", str(checkpoint)).end(signal.SIGHUP)[0] == 0


def record(message: str) -> logging.LogRecord:
    return logging.LogRecord("fastrerank", logging.INFO, "", 0, message, None, None)


def test_lines_that_are_not_read_are_dropped_and_told() -> None:
    reading, writing = os.pipe()
    handler = BoundedHandler(writing, most=10_000)
    begin = time.monotonic()
    for i in range(3000):
        handler.emit(record(f"{i} " + "x" * 90))
    assert time.monotonic() - begin < 5
    assert 3000 - handler.dropped <= (65536 + 2 * 10_000) / 90
    assert handler.dropped > 1000
    read: list[bytes] = []
    thread = threading.Thread(target=lambda: read.extend(iter(lambda: os.read(reading, 65536), b"")))
    thread.start()
    handler.flush(10)
    dropped = handler.dropped
    handler.emit(record("after"))
    handler.close()
    os.close(writing)
    thread.join(10)
    os.close(reading)
    lines = b"".join(read).decode().splitlines()
    assert lines[-1] == "after"
    told = [line for line in lines if "nobody read them" in line]
    assert told
    assert sum(int(line.split()[0]) for line in told) == dropped
    numbers = [int(line.split()[0]) for line in lines[:-1] if line not in told]
    assert numbers == sorted(set(numbers))
    assert len(numbers) + dropped == 3000


def test_a_log_whose_reader_is_gone_costs_nothing() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    handler = BoundedHandler(writing)
    for _ in range(100):
        handler.emit(record("x"))
    handler.close()
    os.close(writing)


class Short(socket.socket):
    """Has no descriptors for its first connections."""

    left = 3

    def accept(self) -> Any:
        if self.left:
            self.left -= 1
            raise OSError(24, "Too many open files")
        return super().accept()


def test_accepting_rests_and_goes_on(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(listener, "REST_SECONDS", 0.01)

    async def run() -> None:
        plain = listen("127.0.0.1", 0, 16)
        one = Short(plain.family, plain.type, plain.proto, fileno=plain.detach())
        connected = asyncio.Event()

        class Protocol(asyncio.Protocol):
            def connection_made(self, transport: Any) -> None:
                connected.set()
                transport.close()

        acceptor = Acceptor(one, Protocol)
        _, writer = await asyncio.open_connection(*one.getsockname())
        await asyncio.wait_for(connected.wait(), 10)
        writer.close()
        acceptor.close()
        await acceptor.wait_closed()
        assert one.left == 0
        one.close()

    with caplog.at_level(logging.ERROR, "fastrerank.serve"):
        asyncio.run(run())
    assert len(caplog.records) == 1
    assert "ulimit -n" in caplog.text


@pytest.mark.parametrize("value", ["", " ", ",", " , ,, "])
def test_a_key_variable_without_a_key_is_an_error(value: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTRERANK_API_KEY", value)
    with pytest.raises(ValueError, match="FASTRERANK_API_KEY is set and holds no key"):
        read_keys(None)
    (tmp_path / "keys").write_bytes(b"\xef\xbb\xbf" + value.replace(",", "\n").encode())
    with pytest.raises(ValueError, match="holds no key"):
        read_keys(tmp_path / "keys")
    (tmp_path / "keys").write_bytes(b"\xef\xbb\xbfkey\n")
    assert read_keys(tmp_path / "keys") == ("key",)
    monkeypatch.delenv("FASTRERANK_API_KEY")
    assert read_keys(None) == ()


@pytest.fixture
def held() -> Iterator[tuple[Any, Any]]:
    reranker = Lengths()
    reranker.gate.clear()
    shared = AsyncReranker(reranker, max_wait_ms=0)
    app = create_app({"one": shared}, Settings(max_body_bytes=10_000, max_bodies_bytes=15_000))
    yield reranker, app
    reranker.gate.set()
    shared.close()


def test_bodies_of_all_requests_have_one_bound(held: tuple[Any, Any]) -> None:
    """What is scored keeps its bytes; what would exceed them is told to come back, and may when they are answered."""
    reranker, app = held
    body = {"query": "q", "texts": ["x" * 8000], "raw_scores": True}

    async def run() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            first = asyncio.ensure_future(client.post("/rerank", json=body))
            await asyncio.to_thread(reranker.entered.acquire)
            refused = await client.post("/rerank", json=body)
            assert (refused.status_code, refused.headers.get("retry-after")) == (429, "1"), refused.text
            assert "15000 bytes" in refused.text
            small = asyncio.ensure_future(client.post("/rerank", json={**body, "texts": ["x"]}))
            reranker.gate.set()
            assert (await first).status_code == (await small).status_code == 200
            assert (await client.post("/rerank", json=body)).status_code == 200
            assert (await client.post("/rerank", json={"query": 1})).status_code == 422
            assert (await client.post("/rerank", json=body)).status_code == 200  # nothing stays counted

    asyncio.run(run())
