"""Servers under load: how each is started on a local checkpoint, and what its process takes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from bench.harness.memory import resident_bytes
from bench.serve.load import Address

START_SECONDS = 120.0
NAME = "minilm"
# Rivals report usage to their makers unless they are told not to, and would ask the hub about local folders.
_QUIET = {"DO_NOT_TRACK": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0", "HF_HUB_OFFLINE": "1"}


class ServerError(RuntimeError):
    """A server did not start, or did not end well."""


class Server:
    """A server in a process of its own, with its log in a file.

    Raises
    ------
    ServerError: it ended, or did not answer, within `START_SECONDS`.
    """

    def __init__(self, name: str, version: str, command: Sequence[str], log: Path, port: int | None = None) -> None:
        self.name, self.version, self.command, self._log = name, version, list(command), log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as sink:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env={**os.environ, **_QUIET},
            )
        try:
            end = time.monotonic() + START_SECONDS
            self.address = Address("127.0.0.1", port or self._port_of_log(end))
            while not self._healthy():
                self._wait(end)
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def cpu_seconds(self) -> float:
        """Equals the CPU time that the process has taken, all threads, user and system."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident_bytes(self) -> int:
        """Equals the process's resident memory now."""
        return resident_bytes(self.process.pid)

    def _port_of_log(self, end: float) -> int:
        while True:
            for line in self._log.read_text("utf-8", "replace").splitlines():
                with suppress(ValueError):
                    row = json.loads(line)
                    if row.get("message") == "serving":
                        return int(row["port"])
            self._wait(end)

    def _wait(self, end: float) -> None:
        if self.process.poll() is not None:
            raise ServerError(f"{self.name} ended with code {self.process.returncode}; see {self._log}")
        if time.monotonic() > end:
            raise ServerError(f"{self.name} did not answer within {START_SECONDS:g} s; see {self._log}")
        time.sleep(0.1)

    def _healthy(self) -> bool:
        url = f"http://{self.address.host}:{self.address.port}/health"
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


class Memory:
    """Watches a server's resident memory in a thread while the block runs: `first` and `most`, in bytes."""

    def __init__(self, server: Server, every: float = 0.25) -> None:
        self._server, self._every = server, every
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        self.first = self.most = self._server.resident_bytes()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self._every):
            with suppress(OSError):
                self.most = max(self.most, self._server.resident_bytes())


def fastrerank(checkpoint: Path, dtype: str, logs: Path, options: Sequence[str] = ()) -> Server:
    """Equals `fastrerank serve` on a free port."""
    from importlib.metadata import version

    command = [
        sys.executable,
        "-m",
        "fastrerank.cli",
        "serve",
        "--model",
        f"{NAME}={checkpoint}",
        "--port",
        "0",
        "--device",
        "cpu",
        "--dtype",
        dtype,
        *options,
    ]
    return Server("fastrerank", version("fastrerank"), command, logs / "fastrerank.log")


def infinity(
    checkpoint: Path, dtype: str, logs: Path, python: Path, options: Sequence[str] = (), port: int = 18766
) -> Server:
    """Equals infinity-emb's server on torch; `python` is an interpreter that has infinity-emb installed.

    Raises
    ------
    ServerError: that interpreter does not have it.
    """
    ask = "import importlib.metadata as m; print(m.version('infinity-emb'), m.version('torch'))"
    done = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ServerError(f"{python} cannot find infinity-emb: {done.stderr.strip().splitlines()[-1:]}")
    ours, torch = done.stdout.split()
    command = [
        str(python.with_name("infinity_emb")),
        "v2",
        "--model-id",
        str(checkpoint),
        "--served-model-name",
        NAME,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--engine",
        "torch",
        "--device",
        "cpu",
        "--dtype",
        dtype,
        *options,
    ]
    return Server("infinity-emb", f"{ours}, torch {torch}", command, logs / "infinity.log", port)
