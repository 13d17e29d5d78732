"""How many tokens one forward may take: a model of its memory against what the device has free."""

from __future__ import annotations

import logging
from typing import Any

import torch

__all__ = ["CPU_DECODER_TOKENS", "CPU_TOKENS", "bytes_per_token", "device_budget", "forward_budget", "halved"]

log = logging.getLogger("fastrerank")

# On a CPU more tokens at a time do not run faster; this bounds memory to some hundred MiB of activations.
CPU_TOKENS = 4096
# Decoders' rows are wider, and their rotary embeddings hold several copies of queries and keys.
CPU_DECODER_TOKENS = 2048
# On a GPU, more tokens make products no faster.
MOST_TOKENS = 65536
_FRACTION = 0.9


def bytes_per_token(config: Any, itemsize: int, packed: bool) -> int:
    """Return an upper estimate of the activations that one token holds at the peak of a layer.

    Four hidden states (residual, normed, output, embedding sum), queries, keys, values and attention's output with
    rotary copies, and three intermediate rows (gate, up, product); float32 copies of norms count as two hidden states.
    Padded models may hold (heads, length, length) attention scores, three times.

    Example:
        >>> from types import SimpleNamespace
        >>> config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=384, num_attention_heads=12,
        ...     intermediate_size=1536, max_position_embeddings=512))
        >>> bytes_per_token(config, 2, packed=True)
        19968
    """
    text = config.get_text_config()
    hidden = text.hidden_size
    heads = getattr(text, "num_attention_heads", None) or -(-hidden // 64)
    size = getattr(text, "head_dim", None) or hidden // heads
    intermediate = getattr(text, "intermediate_size", None) or getattr(text, "d_ff", None) or 4 * hidden
    values = 8 * hidden + 6 * heads * size + 3 * intermediate
    if not packed:
        values += 3 * heads * min(getattr(text, "max_position_embeddings", None) or 512, 4096)
    return itemsize * int(values)


def forward_budget(
    config: Any, dtype: torch.dtype, device: torch.device, memory_limit: float | None, *, packed: bool, on_cpu: int
) -> int:
    """Return the token budget of one forward.

    It is `on_cpu` on a CPU without `memory_limit`, else `device_budget` of what a token of the model takes.

    Example:
        >>> forward_budget(None, torch.float32, torch.device("cpu"), None, packed=True, on_cpu=4096)
        4096
    """
    if device.type == "cpu" and memory_limit is None:
        return on_cpu
    return device_budget(device, bytes_per_token(config, dtype.itemsize, packed), memory_limit)


def halved(budget: int, size: int, device: torch.device) -> int:
    """Return the token budget to go on with after a forward of `size` tokens ran out of memory on `device`.

    It also empties the device's cache. Call it outside the exception handler: the traceback keeps tensors alive.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
    budget = max(1, min(budget, size) // 2)
    log.warning("out of memory on %s: going on with %d tokens at a time", device, budget)
    return budget


def device_budget(device: torch.device, each: int, memory_limit: float | None) -> int:
    """Return how many tokens of `each` bytes one forward may take on `device`.

    `memory_limit` is what the process may hold: bytes, or a fraction of the device's memory up to 1; None for 0.9.
    Raises ValueError for a limit that is not positive, or that leaves no room for a token.
    """
    if memory_limit is not None and memory_limit <= 0:
        raise ValueError(f"memory_limit must be a positive number of bytes or a fraction up to 1, got {memory_limit!r}")
    free, total, held = _memory(device)
    fraction = _FRACTION if memory_limit is None else memory_limit
    allowed = fraction * total if fraction <= 1 else fraction
    room = int(min(free, allowed - held)) // each
    if room < 1:
        raise ValueError(
            f"memory_limit {memory_limit!r} leaves no room on {device}: {held:,} of {allowed:,.0f} bytes are taken, "
            f"{free:,} are free"
        )
    return min(room, MOST_TOKENS)


def _memory(device: torch.device) -> tuple[int, int, int]:
    """(free, total, held by this process's tensors) bytes of the device."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_allocated(device)
        return free + torch.cuda.memory_reserved(device) - held, total, held
    import os

    page = os.sysconf("SC_PAGE_SIZE")
    return page * os.sysconf("SC_AVPHYS_PAGES"), page * os.sysconf("SC_PHYS_PAGES"), 0
