"""The server on loopback: its application in a thread of the test, or all of it in a process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import uvicorn


@contextmanager
def running(app: Any) -> Iterator[str]:
    """The address of a server of `app`, http://127.0.0.1:PORT, while the block runs."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.005)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


CLI = [sys.executable, "-m", "fastrerank.cli", "serve", "--port", "0", "--device", "cpu"]


class Running:
    """A started server; `lines` are its log so far. `command`: what starts it, else `fastrerank serve`."""

    def __init__(
        self, *options: str, env: dict[str, str] | None = None, command: Sequence[str] = CLI, **popen: Any
    ) -> None:
        self.process = subprocess.Popen(
            [*command, *options], stderr=subprocess.PIPE, text=True, env={**os.environ, **(env or {})}, **popen
        )
        self.lines: list[dict[str, Any]] = []
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(json.loads(line))
            if self.lines[-1]["message"] == "serving":
                break
        self.port = self.lines[-1]["port"]
        self.url = f"http://127.0.0.1:{self.port}"
        for _ in range(500):
            with suppress(OSError), urllib.request.urlopen(f"{self.url}/ready", timeout=10):
                return
            time.sleep(0.02)
        raise AssertionError("the server did not become ready")

    def status(self, name: str) -> int:
        """Bytes that the kernel's status of the process tells: VmRSS is its memory, VmHWM the most that it had."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])

    def kill(self) -> None:
        """End it, if it has not ended."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """A signal; the exit code and the rest of the log."""
        self.process.send_signal(number)
        _, rest = self.process.communicate(timeout=40)
        return self.process.returncode, rest
