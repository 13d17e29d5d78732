"""Kernels with a Python face; the only place that looks at instruction-set levels and devices.

Each op has a naive reference of the same name in `fastrerank.ops.reference`, which is its specification.
Shapes use one letter each: T tokens, N documents, H heads, D width of a vector, K rows or neighbours.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

import fastrerank._cpu as _cpu
from fastrerank.ops._cur_topk import cur_topk
from fastrerank.ops._cur_topk.items import PackedItems, cur_pack
from fastrerank.ops._max_sim import max_sim
from fastrerank.runtime.cpu import BFLOAT16_LEVELS, cpu_info, isa, num_threads, set_isa, set_num_threads

if TYPE_CHECKING:
    from fastrerank.ops._attention import attention
    from fastrerank.ops._attention_mass import attention_mass
    from fastrerank.ops._label_logits import label_logits

__all__ = [
    "BFLOAT16_LEVELS",
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


def peak(dtype: str, threads: int | None = None) -> float:
    """Measure the host's sustained operations per second (a multiply-add counts two) in registers, for `dtype`.

    `dtype` is "float32", "bfloat16" or "int8"; takes some tenths of a second. It is the upper limit of the
    encoder's products.
    """
    return float(_cpu.peak(dtype, num_threads(threads), isa()))


def cuda_info() -> dict[str, Any]:
    """Describe the CUDA kernels and devices, without torch.

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

    It is the upper limit of every scan of an index by `cur_topk`. `size` is a multiple of 16, at least
    1 MiB, and should exceed the device's cache; the fastest of `rounds` counts, after a check of the values read.
    Raises RuntimeError if the kernels are not built or CUDA fails.
    """
    if importlib.util.find_spec("fastrerank._cuda") is None:
        raise RuntimeError("the CUDA kernels are not built: install with FASTRERANK_CUDA=ON and nvcc on the PATH")
    return float(importlib.import_module("fastrerank._cuda").bandwidth(device, size, rounds))
