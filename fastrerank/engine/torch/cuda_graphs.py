"""CUDA graphs of a packed forward, one per bucket of tokens: a small model's launches cost more than its work.

A batch is padded with rows that see nothing up to the next bucket, copied into the bucket's buffer, and the graph that
was captured with this buffer is replayed.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fastrerank.engine.torch.placement import upload

__all__ = ["BUCKETS", "CudaGraphs", "bucket_of", "capture"]

# Powers of two and their halves between, where launches cost more than rows: at most a third of a graph's rows are
# padding. From 4096 tokens, where rows begin to cost more, in steps of 256 and then 512: at most 6 %, 3 % from 8192 on.
# Above the last, a forward's work covers its launches.
BUCKETS = (
    *(size for power in range(6, 12) for size in (1 << power, 3 << (power - 1))),
    *range(4096, 16384, 256),
    *range(16384, 32769, 512),
)

log = logging.getLogger("fastrerank")

Forward = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class _Graph:
    table: torch.Tensor
    replay: Callable[[], Any]
    states: torch.Tensor


def bucket_of(tokens: int) -> int | None:
    """Return the smallest bucket that holds `tokens`; None for more than the largest.

    Example:
        >>> bucket_of(1), bucket_of(97), bucket_of(8193), bucket_of(32769)
        (64, 128, 8448, None)
    """
    place = int(np.searchsorted(BUCKETS, tokens))
    return BUCKETS[place] if place < len(BUCKETS) else None


def capture(
    forward: Callable[[], torch.Tensor], pool: Any, stream: torch.cuda.Stream
) -> tuple[Callable[[], Any], torch.Tensor]:
    """Capture `forward`, which must read and write the same memory each time, on `stream` as a CUDA graph.

    Returns (replay, output). Kernels are compiled and libraries set up by two runs before. They are on the same stream:
    cuBLAS keeps a workspace for each, and torch's own capture stream belongs to the device that captured first.
    """
    outside = torch.cuda.current_stream()
    stream.wait_stream(outside)
    with torch.cuda.stream(stream):
        for _ in range(2):
            forward()
    outside.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        # thread_local: work of other threads on the GPU does not break the capture.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            states = forward()
    except BaseException:
        torch.cuda.set_stream(outside)  # a failed capture leaves its own stream current
        raise
    return graph.replay, states


class CudaGraphs:
    """Captured forwards of one model by bucket, made on first use.

    Args:
        forward: table int32 (rows, T) -> hidden states (T, hidden).
        device: where the tables live.
        capturing: `capture`, or a stand-in for machines without a GPU.

    Attributes:
        failed: whether a capture failed; the model then runs without graphs.
    """

    def __init__(self, forward: Forward, device: torch.device, capturing: Any = capture) -> None:
        self._forward = forward
        self._device = device
        self._capture = capturing
        self._graphs: dict[int, _Graph] = {}
        self._lock = threading.Lock()
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        # Marks the end of the last read of the buffers: the next caller may use another stream.
        self._read = torch.cuda.Event() if device.type == "cuda" else None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.failed = False

    @contextmanager
    def replay(self, table: npt.NDArray[np.int32]) -> Iterator[torch.Tensor]:
        """Give the states of a table, as wide as a bucket; they are valid, and others wait, until the context ends."""
        with self._lock:
            if self._read is not None:
                self._read.wait()
            uploaded = upload(table, self._device)
            graph = self._graphs.get(table.shape[1]) or self._captured(uploaded)
            if graph is None:
                yield self._forward(uploaded)
                return
            graph.table.copy_(uploaded)
            graph.replay()
            try:
                yield graph.states
            finally:
                if self._read is not None:
                    self._read.record()

    def _captured(self, table: torch.Tensor) -> _Graph | None:
        if self.failed:
            return None
        buffer = table.clone()
        try:
            replay, states = self._capture(lambda: self._forward(buffer), self._pool, self._stream)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.failed = True
            log.warning(
                "no CUDA graph of %d tokens could be captured, going on without graphs: %s", table.shape[1], error
            )
            return None
        self._graphs[table.shape[1]] = _Graph(buffer, replay, states)
        return self._graphs[table.shape[1]]
