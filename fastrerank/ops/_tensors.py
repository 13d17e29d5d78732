"""Shared by the ops on torch tensors: choice of a backend, checks of arguments, and ops under torch.compile."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fastrerank._cpu as _cpu

__all__ = [
    "DTYPES",
    "as_float",
    "check_out",
    "check_tensor",
    "choose_backend",
    "not_negative",
    "on_device",
    "positive_scale",
    "register_op",
    "said",
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_BACKENDS = ("cpp", "triton")


def choose_backend(device: torch.device, wanted: str | None, name: str) -> str:
    """Return "cpp" or "triton": the wanted backend, or the one of the device.

    Raises ValueError for a backend that is unknown or does not run on `device`; `name` is the argument that is there.
    """
    if wanted is not None and wanted not in _BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(_BACKENDS)} or None, got {wanted!r}")
    if device.type == "cuda":
        if wanted == "cpp":
            raise ValueError('backend "cpp" takes CPU tensors, got CUDA tensors; use backend None or "triton"')
        return "triton"
    if device.type != "cpu":
        raise ValueError(f"{name} must be on a CPU or CUDA device, got {device}")
    if wanted == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            'backend "triton" takes CUDA tensors (or CPU tensors under TRITON_INTERPRET=1), got CPU tensors'
        )
    return wanted or "cpp"


_HERE = contextlib.nullcontext()


def on_device(tensor: torch.Tensor, name: str) -> contextlib.AbstractContextManager[object]:
    """Make a CUDA tensor's device the current one for a Triton kernel; this costs nothing if it already is.

    Raises ValueError for a device that runs no Triton kernels; `name` is the argument.
    """
    if tensor.is_cuda:
        return _HERE if tensor.device.index == torch.cuda.current_device() else torch.cuda.device(tensor.device)
    choose_backend(tensor.device, "triton", name)
    return _HERE


def check_tensor(name: str, value: object) -> torch.Tensor:
    """Return `value`, a dense tensor.

    Raises TypeError for anything else, ValueError for a tensor whose memory does not hold its values.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {said(value)}")
    # torch.compile cannot trace `is_neg`, and passes no such tensors.
    negated = not torch.compiler.is_compiling() and value.is_neg()
    if value.layout != torch.strided or negated:
        what = "a tensor that is still to be negated; call .resolve_neg()" if negated else str(value.layout)
        raise ValueError(f"{name} must be a dense tensor, got {what}")
    return value


def check_out(out: torch.Tensor) -> None:
    """Check that a result can be written to `out`.

    Raises ValueError if two values share memory or a gradient is required.
    """
    needed = 1
    for step, size in sorted(zip(out.stride(), out.shape, strict=True)):
        if out.numel() and size > 1:
            if step < needed:
                raise ValueError(f"out must have a place of its own for every value, got strides {out.stride()}")
            needed = step * (size - 1) + needed
    if out.requires_grad and torch.is_grad_enabled():
        raise ValueError("out must not require a gradient: call .detach(), or use torch.no_grad()")


# In float32, magnitudes up to _LEAST round to 0, and those from _BEYOND on to infinity.
_LEAST, _BEYOND = 2.0**-150, 2.0**128 - 2.0**103


def as_float(name: str, value: Any, valid: str) -> float:
    """`value` as a float in the range of float32: not infinite there, and 0 only if it is 0.

    Raises TypeError if it is not a number, and ValueError with the text `valid` if it is out of range.
    """
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise TypeError(f"{name} must be a number, got {said(value)}") from error
    if not math.isfinite(number):
        raise ValueError(f"{name} must be {valid}, got {number}")
    if number != 0 and not _LEAST < abs(number) < _BEYOND:
        raise ValueError(f"{name} must be {valid}, within the range of float32, got {number}")
    return number


def not_negative(name: str, value: Any) -> float:
    """`value` as a float of at least 0. Raises TypeError, ValueError as `as_float` does."""
    number = as_float(name, value, "finite and at least 0")
    if number < 0:
        raise ValueError(f"{name} must be finite and at least 0, got {number}")
    return number


def positive_scale(scale: Any, head_dim: int) -> float:
    """The factor of attention's scores: `scale`, or head_dim**-0.5 for None. Raises TypeError, ValueError."""
    number = head_dim**-0.5 if scale is None else as_float("scale", scale, "positive and finite or None")
    if number <= 0:
        raise ValueError(f"scale must be positive and finite or None, got {number}")
    return number


_library = torch.library.Library("fastrerank", "FRAGMENT")


def register_op(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Make `torch.ops.fastrerank.<name>`, which torch.compile takes as one opaque node.

    `fake` returns results without values. Eager calls do not use the op: they save the dispatcher's cost.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastrerank::{name}", fake, lib=_library)


def said(value: object) -> str:
    """Return a tensor's dtype and shape, or the type of any other value."""
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(type(value).__name__)


def share_openmp() -> bool:
    """Run the CPU ops on tensors with the OpenMP workers of torch; returns False if torch has none.

    After each op, torch's workers spin for milliseconds on cores that a second pool would need.
    """
    libraries = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        if (libraries / name).exists():
            # The handle also finds symbols of the libraries that torch was linked with, such as its OpenMP runtime.
            start = getattr(ctypes.CDLL(str(libraries / name)), "GOMP_parallel", None)
            if start is not None:
                _cpu.set_openmp(ctypes.cast(start, ctypes.c_void_p).value or 0)
                return True
    return False


share_openmp()
