"""Kernels with a Python face; the only place that looks at instruction-set levels and devices.

Each op has a naive reference of the same name in `fastrerank.ops.reference`, which is its specification.
Shapes use one letter each: T tokens, N documents, H heads, D width of a vector, K rows or neighbours.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

import fastrerank._cpu as _cpu
from fastrerank.ops._cur import PackedItems, cur_pack
from fastrerank.ops._cur_topk import cur_topk

if TYPE_CHECKING:
    from fastrerank.ops._attention import attention
    from fastrerank.ops._attention_mass import attention_mass
    from fastrerank.ops._label_logits import label_logits

__all__ = [
    "PackedItems",
    "attention",
    "attention_mass",
    "bandwidth",
    "cpu_info",
    "cuda_info",
    "cur_pack",
    "cur_topk",
    "isa",
    "label_logits",
    "max_sim",
    "num_threads",
    "peak",
    "set_isa",
    "set_num_threads",
]


def __getattr__(name: str) -> Any:
    """Import the ops on torch tensors at first use: importing this module must not import torch."""
    if name not in ("attention", "attention_mass", "label_logits"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if importlib.util.find_spec("torch") is None:
        raise ImportError(
            f"ops.{name} takes torch tensors, and torch is not installed: pip install 'fastrerank[torch]'"
        )
    op = getattr(importlib.import_module(f"fastrerank.ops._{name}"), name)
    globals()[name] = op
    return op


# Levels that multiply bfloat16 inputs as they are; the others widen weights and keep inputs in float32.
BFLOAT16_LEVELS = ("avx512_bf16", "amx")

_threads: int | None = None
_isa: str | None = None


def set_num_threads(n: int | None) -> None:
    """Set how many CPU threads a call may use, for objects that were given no `num_threads` of their own.

    None restores the default: the CPUs that this process may run on. Raises ValueError below 1.

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


def peak(dtype: str, threads: int | None = None) -> float:
    """Measure the host's sustained operations per second (a multiply-add counts two) in registers, for `dtype`.

    `dtype` is "float32", "bfloat16" or "int8"; takes some tenths of a second. It is the roof that the encoder's
    products stand under.
    """
    return float(_cpu.peak(dtype, num_threads(threads), isa()))


def cuda_info() -> dict[str, Any]:
    """Return what the CUDA kernels found, without torch.

    {"built": whether this installation holds them, "architectures": what they are compiled for (the last one also as
    PTX), "runtime": CUDA version they were built with, "devices": [{"name", "capability", "memory": bytes,
    "multiprocessors", "supported": whether the kernels run on it}], "problem": why no device can be used, or ""}.
    Only "built" and "problem" where they are not built.
    """
    if importlib.util.find_spec("fastrerank._cuda") is None:
        return {
            "built": False,
            "problem": "this installation was built without them: no NVIDIA driver or no nvcc was found, or "
            "FASTRERANK_CUDA was OFF",
        }
    cuda = importlib.import_module("fastrerank._cuda")
    version = int(cuda.runtime)
    return {
        "built": True,
        "architectures": str(cuda.architectures).split(),
        "runtime": f"{version // 1000}.{version % 1000 // 10}",
        "devices": cuda.devices(),
        "problem": cuda.status(),
    }


def bandwidth(device: int = 0, *, size: int = 1 << 30, rounds: int = 20) -> float:
    """Measure bytes per second that CUDA device `device` delivers to a kernel that only reads `size` bytes.

    The floor under every scan of an index: what `cur_topk` can at best reach. `size` is a multiple of 16, at least
    1 MiB, and should exceed the device's cache; the fastest of `rounds` counts, after a check of what was read.
    Raises RuntimeError where the kernels are not built or CUDA fails.
    """
    if importlib.util.find_spec("fastrerank._cuda") is None:
        raise RuntimeError("the CUDA kernels are not built: install with FASTRERANK_CUDA=ON and nvcc on the PATH")
    return float(importlib.import_module("fastrerank._cuda").bandwidth(device, size, rounds))


def max_sim(
    query: npt.NDArray[np.float32],
    tokens: npt.NDArray[np.float32],
    offsets: npt.NDArray[np.int64],
    *,
    threads: int | None = None,
) -> npt.NDArray[np.float32]:
    """Like `[(query @ tokens[a:b].T).max(1).mean() for a, b in zip(offsets, offsets[1:])]`.

    Late interaction: the mean over query tokens of the best document token (ColBERT, arXiv 2004.12832, takes the sum).

    Args:
        query: float32 (Q, D), Q >= 1.
        tokens: float32 (T, D), the documents' tokens one after the other.
        offsets: int64 (N+1,); document d's tokens are tokens[offsets[d]:offsets[d+1]], at least one each.
        threads: CPU threads; None for the default. The result does not depend on it.

    Returns float32 (N,). Raises ValueError for shapes that do not fit or a document without tokens.

    Example:
        >>> q, t = np.eye(2, 4, dtype=np.float32), np.eye(4, dtype=np.float32)
        >>> max_sim(q, t, np.array([0, 1, 4])).tolist()
        [0.5, 0.5]
    """
    query = np.ascontiguousarray(query, np.float32)
    tokens = np.ascontiguousarray(tokens, np.float32)
    offsets = np.ascontiguousarray(offsets, np.int64)
    if (np.diff(offsets) < 1).any():
        raise ValueError(f"offsets must give every document at least one token, got lengths {np.diff(offsets)}")
    result: npt.NDArray[np.float32] = _cpu.max_sim(query, tokens, offsets, num_threads(threads), isa())
    return result
