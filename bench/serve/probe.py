"""`python -m bench.serve.probe PORT SECONDS`: asks /health of a server on loopback for so long, and prints what it saw.

A process of its own: clients that share one would count their own work as the server's.
"""

from __future__ import annotations

import http.client
import json
import sys
import time


def main(port: int, seconds: float, every: float = 0.05) -> dict[str, object]:
    """Equals {"asked", "longest": seconds, "other": the first answer that was not 200, or None}."""
    end = time.monotonic() + seconds
    asked, longest, other = 0, 0.0, None
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    while time.monotonic() < end:
        time.sleep(every)
        begin = time.monotonic()
        try:
            connection.request("GET", "/health")
            answer = connection.getresponse()
            body, status = answer.read(), answer.status
        except OSError as error:
            connection.close()
            body, status = repr(error).encode(), 0
        longest, asked = max(longest, time.monotonic() - begin), asked + 1
        if status != 200 and other is None:
            other = f"{status}: {body[:200]!r}"
    return {"asked": asked, "longest": longest, "other": other}


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), float(sys.argv[2]))))
