"""Where and under which state a torch model runs: device, threads, and rotary frequencies that stretch."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["place_on", "stretch", "unstretched"]


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
