"""Log lines that never make the server wait: a reader that does not read loses lines, and is told how many."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque

__all__ = ["BoundedHandler"]


class BoundedHandler(logging.Handler):
    """Writes lines to a file descriptor from a thread of its own, and drops those that find `most` bytes waiting.

    A pipe whose reader has stopped blocks that thread and nothing else. Once there is room again, a line says how many
    were lost; `dropped` counts all of them.

    Args:
        descriptor: where lines go; it stays open.
        most: bytes of lines that may wait.

    Example:
        >>> handler = BoundedHandler(2)
        >>> logging.getLogger("fastrerank").addHandler(handler)                               # doctest: +SKIP
    """

    def __init__(self, descriptor: int, most: int = 1 << 20) -> None:
        super().__init__()
        self.dropped = 0
        self._descriptor, self._most = descriptor, most
        self._lines: deque[bytes] = deque()
        self._bytes = 0  # of the lines that wait or are being written
        self._untold = 0  # dropped since the last line that was taken
        self._ended = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._write, name="fastrerank-log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Let the record's line wait to be written, or drop it."""
        try:
            line = (self.format(record) + "\n").encode("utf-8", "backslashreplace")
            with self._changed:
                if self._untold and self._bytes + len(line) <= self._most:
                    count, self._untold = self._untold, 0
                    lost = f"{count} log lines were dropped: nobody read them in time"
                    note = logging.LogRecord("fastrerank.serve", logging.WARNING, "", 0, lost, None, None)
                    self._put((self.format(note) + "\n").encode())
                self._put(line)
        except Exception:  # a log line is no reason to fail
            self.handleError(record)

    def flush(self, seconds: float = 1.0) -> None:
        """Wait until all lines are written, `seconds` at most."""
        end = time.monotonic() + seconds
        with self._changed:
            while self._bytes and (left := end - time.monotonic()) > 0 and self._thread.is_alive():
                self._changed.wait(left)

    def close(self) -> None:
        """Write what waits, if it is read within a second, and end."""
        self.flush()
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        super().close()

    def _put(self, line: bytes) -> None:
        if self._ended or (self._bytes and self._bytes + len(line) > self._most):
            self.dropped += 1
            self._untold += 1
            return
        self._lines.append(line)
        self._bytes += len(line)
        self._changed.notify_all()

    def _write(self) -> None:
        while True:
            with self._changed:
                while not self._lines:
                    if self._ended:
                        return
                    self._changed.wait()
                lines = b"".join(self._lines)
                self._lines.clear()
            rest = memoryview(lines)
            with contextlib.suppress(OSError):  # nobody is there to read
                while rest:
                    rest = rest[self._some(rest) :]
            with self._changed:
                self._bytes -= len(lines)
                self._changed.notify_all()

    def _some(self, data: memoryview) -> int:
        """Write some of `data`, however long that takes, and return how many bytes."""
        while True:
            try:
                return os.write(self._descriptor, data)
            except BlockingIOError:  # of a descriptor that someone has made non-blocking
                time.sleep(0.05)
