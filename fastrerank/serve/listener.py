"""The listening socket and its accept loop, which sends answers at once and survives a lack of descriptors."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import time
from collections.abc import Callable

__all__ = ["Acceptor", "listen"]

log = logging.getLogger("fastrerank.serve")

# Pause of the accept loop when no descriptor is left, and the least time between two log lines about it.
REST_SECONDS, SAY_SECONDS = 0.5, 10.0
_SHORTAGE = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


def listen(host: str, port: int, backlog: int) -> socket.socket:
    """Return a TCP socket that listens on `host`, an IPv4 or IPv6 address or a name; port 0 takes a free one.

    Its protocol is set: asyncio sets TCP_NODELAY only on connections of sockets whose protocol says that they are TCP.
    Without it the second part of an answer waits for the client's delayed acknowledgement, some 40 ms.

    Raises OSError where the address cannot be bound.

    Example:
        >>> listen("127.0.0.1", 0, 16).proto == socket.IPPROTO_TCP
        True
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    plain = socket.create_server((host, port), family=family, backlog=backlog)
    return socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, fileno=plain.detach())


class Acceptor:
    """Accepts connections of a listening socket until it is closed, as `asyncio.Server` does.

    When no descriptor is left, it pauses for `REST_SECONDS` (the kernel queues new connections) and logs that at most
    once in `SAY_SECONDS`. `asyncio.Server` would log each attempt, thousands per second.
    """

    def __init__(self, listener: socket.socket, protocol: Callable[[], asyncio.Protocol]) -> None:
        listener.setblocking(False)
        self.sockets = (listener,)
        self._listener, self._protocol = listener, protocol
        self._refused, self._said = 0, float("-inf")
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.create_task(self._accept())
        self._opening: set[asyncio.Task[None]] = set()

    def close(self) -> None:
        """Accept no more; connections stay."""
        self._task.cancel()

    async def wait_closed(self) -> None:
        """Wait until nothing more is accepted."""
        await asyncio.gather(self._task, *self._opening, return_exceptions=True)

    async def _accept(self) -> None:
        while self._listener.fileno() >= 0:
            try:
                connection, _ = await self._loop.sock_accept(self._listener)
            except OSError as error:
                if error.errno in _SHORTAGE:
                    self._say(error)
                    await asyncio.sleep(REST_SECONDS)
                else:  # the client has gone before it was accepted
                    await asyncio.sleep(0)
                continue
            task = self._loop.create_task(self._open(connection))
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def _open(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._protocol, connection)
        except OSError:
            connection.close()

    def _say(self, error: OSError) -> None:
        self._refused += 1
        now = time.monotonic()
        if now < self._said + SAY_SECONDS:
            return
        log.error(
            "no connections can be accepted: %s; raise the limit of open files (ulimit -n)",
            error.strerror,
            extra={"fields": {"attempts": self._refused}},
        )
        self._refused, self._said = 0, now
