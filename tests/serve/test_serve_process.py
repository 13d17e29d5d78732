"""The server as a process: what it prints, how it starts and ends, and clients that are slow or go away."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx")

import httpx
from helpers_tiny import save_tiny_cross_encoder
from serve_running import CLI, Running

import fastrerank


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(save_tiny_cross_encoder(tmp_path_factory.mktemp("served")))


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[Running]:
    running = Running("--model", f"small={checkpoint}", "--header-timeout", "1", "--body-timeout", "1")
    yield running
    running.kill()


def test_scores_are_those_of_the_library(server: Running, checkpoint: Path) -> None:
    model = fastrerank.CrossEncoder(str(checkpoint), device="cpu")
    texts = [f"text number {i} of {'owls' * (i % 5)}" for i in range(25)]
    body = {"query": "the owl", "texts": texts, "raw_scores": True}
    expected = [
        {"index": hit["corpus_id"], "score": hit["score"]}
        for hit in model.rank("the owl", texts, activation_fn="identity")
    ]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: httpx.post(f"{server.url}/rerank", json=body).json(), range(16)))
    assert all(answer == expected for answer in answers)


def test_clients_that_trickle_are_closed_and_harm_no_one(server: Running) -> None:
    """One sends headers without end, one does so in the second request of its connection, one a body."""
    get, post = b"GET /health HTTP/1.1\r\nHost: x\r\n", b"POST /rerank HTTP/1.1\r\nHost: x\r\n"
    with contextlib.ExitStack() as stack:
        fresh, kept, body = (
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=30)) for _ in range(3)
        )
        kept.sendall(get + b"\r\n")
        first = kept.recv(1000)
        while not first.endswith(b'{"status":"ok"}'):
            first += kept.recv(1000)
        assert first.startswith(b"HTTP/1.1 200")
        kept.sendall(post)
        fresh.sendall(post)
        body.sendall(post + b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
        for _ in range(4):
            time.sleep(0.1)
            fresh.sendall(b"X-More: 1\r\n")
            kept.sendall(b"X-More: 1\r\n")
            assert httpx.get(f"{server.url}/health").status_code == 200
        assert fresh.recv(1000) == b""
        assert kept.recv(1000) == b""
        assert body.recv(1000).startswith(b"HTTP/1.1 408")


def test_clients_that_go_away_leave_the_server_well(server: Running) -> None:
    body = json.dumps({"query": "q", "texts": ["word " * 100] * 2000}).encode()
    head = f"POST /rerank HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(head.encode() + body)
    for _ in range(500):
        metrics = httpx.get(f"{server.url}/metrics", timeout=30).text
        if 'fastrerank_waiting_requests{model="small"} 0.0' in metrics and 'status="499"' in metrics:
            break
        time.sleep(0.02)
    else:
        raise AssertionError(metrics)
    assert httpx.post(f"{server.url}/rerank", json={"query": "q", "texts": ["a"]}).status_code == 200


def test_a_body_of_50_megabytes_is_refused(server: Running) -> None:
    body = b'{"query": "q", "texts": ["' + b"x" * (50 << 20) + b'"]}'
    with contextlib.suppress(httpx.WriteError):  # the server may close while the client still writes
        assert httpx.post(f"{server.url}/rerank", content=body, timeout=60).status_code == 413
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_sigterm_under_load_answers_what_was_accepted_and_exits_0(checkpoint: Path) -> None:
    running = Running("--model", str(checkpoint), "--max-wait-ms", "20")
    body = {"query": "the owl", "texts": ["a cat sleeps all day"] * 5000}
    answered, refused = [], []

    def ask(_: int) -> None:
        try:
            answered.append(httpx.post(f"{running.url}/rerank", json=body, timeout=30).status_code)
        except httpx.ConnectError:
            refused.append(1)

    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(ask, i) for i in range(8)]
        time.sleep(1)  # all are connected, and not all are done
        code, rest = running.end()
        for job in jobs:
            job.result()
    assert code == 0
    assert answered.count(200) == len(answered)
    assert len(answered) + len(refused) == 8
    assert answered
    assert all(json.loads(line) for line in rest.splitlines())


def test_keys_come_from_a_file_or_the_environment(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_bytes(b"\xef\xbb\xbfone\r\n\n two \n")  # as an editor on Windows writes it
    running = Running(
        "--model", str(checkpoint), "--api-key-file", str(tmp_path / "keys"), env={"FASTRERANK_API_KEY": "no"}
    )
    body = {"query": "q", "texts": ["a"]}
    for key, status in (("one", 200), ("two", 200), ("no", 401)):
        answer = httpx.post(f"{running.url}/rerank", json=body, headers={"authorization": f"Bearer {key}"})
        assert answer.status_code == status
    assert running.end()[0] == 0


def fails(*options: str, **variables: str) -> str:
    done = subprocess.run(
        [*CLI, *options], capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **variables}
    )
    assert done.returncode in (1, 2)
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    return f"{done.returncode} {done.stderr}"


def test_what_cannot_start_says_so_in_one_line(checkpoint: Path, tmp_path: Path) -> None:
    assert fails("--model", str(tmp_path / "missing")).startswith("1 ")
    shutil.copytree(checkpoint, tmp_path / "weightless", ignore=shutil.ignore_patterns("*.safetensors"))
    assert re.match(r"1 .*weightless", fails("--model", str(tmp_path / "weightless")))
    assert re.match(r"2 .*--model", fails())
    assert "two models" in fails("--model", str(checkpoint), "--model", str(checkpoint))
    (tmp_path / "empty").write_text("\n")
    assert "holds no key" in fails("--model", str(checkpoint), "--api-key-file", str(tmp_path / "empty"))
    assert "holds no key" in fails("--model", str(checkpoint), FASTRERANK_API_KEY=" , ")
    assert re.match(r"2 .*flavor", fails("--model", str(checkpoint), "--api-flavor", "sour"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert fails("--model", str(checkpoint), "--port", str(taken.getsockname()[1])).startswith("1 ")
