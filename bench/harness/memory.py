"""Memory of processes."""

from __future__ import annotations

import sys
from pathlib import Path


def peak_bytes() -> int:
    """Return this process's peak resident memory in bytes.

    Linux's VmHWM, because getrusage's ru_maxrss starts at the peak of the process that spawned this one.
    """
    if Path("/proc/self/status").exists():
        return _status("self", "VmHWM")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident_bytes(process: int) -> int:
    """Return the resident memory of the process with this id in bytes, now; only Linux tells.

    Raises
    ------
    OSError: there is no such process.
    """
    return _status(process, "VmRSS")


def _status(process: int | str, field: str) -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) * 1024
