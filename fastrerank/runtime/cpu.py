"""The instruction-set level that kernels use, and the number of threads of a call."""

from __future__ import annotations

import os
from typing import Any

import fastrerank._cpu as _cpu

__all__ = ["BFLOAT16_LEVELS", "cpu_info", "isa", "num_threads", "set_isa", "set_num_threads"]

# Levels with bfloat16 products. The others widen the weights and keep inputs in float32.
BFLOAT16_LEVELS = ("avx512_bf16", "amx")

_threads: int | None = None
_isa: str | None = None


def set_num_threads(n: int | None) -> None:
    """Set the number of CPU threads of a call. Objects with a `num_threads` of their own keep it.

    None restores the default, the number of CPUs that this process may run on. Raises ValueError below 1.

    Example:
        >>> set_num_threads(2)
    """
    global _threads
    if n is not None and (not isinstance(n, int) or n < 1):
        raise ValueError(f"n must be a positive int or None, got {n!r}")
    _threads = n


def num_threads(requested: int | None = None) -> int:
    """Return `requested`, else what `set_num_threads` set, else the number of CPUs this process may run on."""
    if requested is not None:
        if not isinstance(requested, int) or requested < 1:
            raise ValueError(f"num_threads must be a positive int or None, got {requested!r}")
        return requested
    return _threads or _available_cpus()


def _available_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def set_isa(level: str | None) -> None:
    """Choose the instruction-set level of models loaded from now on; None restores the best one.

    `level` is "portable", "avx2", "avx512", "avx512_bf16" or "amx". Raises ValueError for one that this CPU lacks.
    """
    global _isa
    _isa = None if level is None else _checked(level, "level")


def isa() -> str:
    """Return the level in force: `set_isa`'s, else the environment's FASTRERANK_ISA, else the best of this CPU."""
    if _isa is not None:
        return _isa
    wanted = os.environ.get("FASTRERANK_ISA")
    return _checked(wanted, "FASTRERANK_ISA") if wanted else str(_cpu.levels()[-1])


def _checked(level: str, name: str) -> str:
    levels = _cpu.levels()
    if level not in levels:
        raise ValueError(f"{name} must be a level that this CPU runs ({', '.join(levels)}), got {level!r}")
    return level


def cpu_info() -> dict[str, Any]:
    """Return {"isa": level in force, "supported": levels this CPU runs, "threads": default number of threads}."""
    return {"isa": isa(), "supported": list(_cpu.levels()), "threads": num_threads()}
