"""Where and under which state a torch model runs: device, threads, uploads, and rotary frequencies that stretch."""

from __future__ import annotations

import contextlib
import threading
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["PinnedBuffers", "place_on", "stretch", "unstretched", "upload"]

_LEAST = 1 << 16  # bytes of a buffer


class PinnedBuffers:
    """Pinned host memory in buffers of powers of two bytes, each free again once its copy has been made.

    torch's `pin_memory` copies with all OpenMP threads, which then spin on the cores where a tokenizer's threads run:
    a batch's table took a millisecond. One thread copies it in some ten microseconds.

    Example:
        >>> PinnedBuffers().upload(np.arange(3), torch.device("cuda"))  # doctest: +SKIP
        tensor([0, 1, 2], device='cuda:0')
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Free buffers of each device: (uint8 buffer, event after its last copy). An event belongs to one device.
        self._idle: dict[torch.device, list[tuple[torch.Tensor, Any]]] = defaultdict(list)

    def upload(self, array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
        """Return the array as a tensor on a GPU; the copy is on the device's current stream."""
        source = np.ascontiguousarray(array)
        buffer, event = self._take(source.nbytes, device)
        buffer.numpy()[: source.nbytes] = source.reshape(-1).view(np.uint8)
        dtype = torch.from_numpy(np.empty(0, source.dtype)).dtype
        tensor = buffer[: source.nbytes].view(dtype).view(source.shape).to(device, non_blocking=True)
        event.record(torch.cuda.current_stream(device))
        with self._lock:
            self._idle[device].append((buffer, event))
        return tensor

    def _take(self, size: int, device: torch.device) -> tuple[torch.Tensor, Any]:
        with self._lock:
            idle = self._idle[device]
            fitting = [one for one in range(len(idle)) if len(idle[one][0]) >= size and idle[one][1].query()]
            if fitting:
                return idle.pop(min(fitting, key=lambda one: len(idle[one][0])))
        return self._new(max(_LEAST, 1 << (size - 1).bit_length()))

    def _new(self, size: int) -> tuple[torch.Tensor, Any]:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()


_pinned = PinnedBuffers()


def upload(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """Return the array as a tensor on `device`; to a GPU without waiting."""
    if device.type == "cuda" and array.size:
        return _pinned.upload(array, device)
    return torch.from_numpy(array).to(device)


def stretch(config: Any) -> int | None:
    """Tokens up to which rotary frequencies are fixed, for families where a longer text changes all of a batch's."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    for kind in kinds:
        if kind.get("rope_type") in ("dynamic", "longrope"):
            original = kind.get("original_max_position_embeddings")
            return int(
                original or getattr(config, "original_max_position_embeddings", 0) or config.max_position_embeddings
            )
    return None


@contextlib.contextmanager
def unstretched(backbone: torch.nn.Module, limit: int | None, lock: threading.Lock) -> Iterator[None]:
    """Hold a model whose rotary frequencies change with the longest text (`stretch`), from their first state on."""
    if limit is None:
        yield
        return
    with lock:
        for module in backbone.modules():
            if hasattr(module, "original_inv_freq") and hasattr(module, "max_seq_len_cached"):
                original: Any = module.original_inv_freq
                module.inv_freq = original.clone()
                module.max_seq_len_cached = module.original_max_seq_len
        yield


@contextlib.contextmanager
def place_on(threads: int | None, device: torch.device) -> Iterator[None]:
    """Make a GPU the current device, for kernels that run there; or set torch's CPU threads for a while."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            yield
        return
    if threads is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
