"""Any Hugging Face encoder or decoder classifier on torch: packed without padding where it can, else padded."""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fastrerank import ops
from fastrerank.checkpoints.checkpoint import Checkpoint, position_limit
from fastrerank.engine.batch import check_ids, split_equal, split_lengths, split_padded
from fastrerank.engine.heads import Head
from fastrerank.engine.memory import CPU_TOKENS, forward_budget, halved
from fastrerank.engine.torch.backbone import Read
from fastrerank.engine.torch.gpu_layers import fuse_on_gpu
from fastrerank.engine.torch.heads import ModuleHead, split_head
from fastrerank.engine.torch.loading import cast_parameters, load_model
from fastrerank.engine.torch.placement import place_on, stretch, unstretched
from fastrerank.engine.torch.probe import runner_of

__all__ = ["DTYPES", "TorchEncoder"]

DTYPES = ("float32", "bfloat16", "float16")

log = logging.getLogger("fastrerank")


class TorchEncoder:
    """A Hugging Face model and a float32 head: equals transformers' forward on each document alone.

    The same face as `NativeEncoder`. One object may be called from many threads.

    Attributes:
        packed: whether documents run in one row without padding; else in padded batches of similar lengths.
        reason: why it is not packed; "" if it is.
        budget: tokens of one forward; halved for good when a forward runs out of memory.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        runner: Any,
        head: Any,
        *,
        dtype: str,
        budget: int,
        num_threads: int | None = None,
    ) -> None:
        self._runner, self._head = runner, head
        self.dtype = dtype
        self.device: torch.device = runner.device
        self.packed: bool = runner.packed
        self.reason = ""
        self.readout: str = head.readout
        self.budget = budget
        self.num_threads = num_threads
        config = runner.backbone.config.get_text_config()
        self._path = checkpoint.transformer_path
        self._positions = position_limit(checkpoint.config)
        self._types = int(getattr(config, "type_vocab_size", 0) or 0)
        # XLNet's, for one, are no rows of a table, and zeros are not the same as none.
        takes_types = "token_type_ids" in inspect.signature(runner.backbone.forward).parameters
        self._undeclared_types = takes_types and not hasattr(config, "type_vocab_size")
        self._vocabulary = int(config.vocab_size)
        self.width: int = head.width
        self._stretch = stretch(config)
        self._lock = threading.Lock()

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        head: Head | None = None,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        num_threads: int | None = None,
        packed: bool | None = None,
        memory_limit: float | None = None,
        cuda_graphs: bool = True,
    ) -> TorchEncoder:
        """Load a checkpoint through transformers.

        Args:
            checkpoint: opened checkpoint.
            head: rows to read and the layers on top of them; None for the checkpoint's own classification head.
            dtype: "float32", "bfloat16" or "float16" for the backbone. The head is float32 in all of them.
            device: "cpu", "cuda" or "cuda:N".
            num_threads: CPU threads of a call; None for torch's own setting.
            packed: True: packed or ValueError; False: padded; None: packed if the model can.
            memory_limit: bytes, or a fraction of the device's memory, that the process may come to; None for 0.9.
            cuda_graphs: whether a packed model on a GPU replays captured graphs for small batches.

        Raises ValueError for a checkpoint without a trained classification head (where `head` is None), without some of
        its weights, with weights that are NaN, or that cannot run as asked.

        Example:
            >>> from fastrerank.checkpoints.checkpoint import open_checkpoint             # doctest: +SKIP
            >>> encoder = TorchEncoder.load(open_checkpoint("path"))          # doctest: +SKIP
        """
        ops.num_threads(num_threads)  # checks it
        model = load_model(checkpoint, "classification" if head is None else "none", dtype)
        task_head: Any = None
        if head is None:
            backbone, task_head, reason = split_head(model)
        else:
            backbone, reason = model, ""
            task_head = ModuleHead(head, model.config.get_text_config().hidden_size)
        cast_parameters(backbone, getattr(torch, dtype))
        place = torch.device(device)
        backbone.to(place).eval()
        runner, found = runner_of(backbone, dtype, packed, whole=task_head is None, num_threads=num_threads)
        if place.type == "cuda" and runner.packed:
            fuse_on_gpu(runner)
        reason = "; ".join(part for part in (reason, found) if part)
        if packed and not runner.packed:
            raise ValueError(f"engine='torch' cannot run {checkpoint.path} packed: {reason}; engine='padded' runs it")
        task_head = _Whole(int(backbone.config.num_labels)) if task_head is None else task_head.to(place)
        budget = forward_budget(
            backbone.config, getattr(torch, dtype), place, memory_limit, packed=runner.packed, on_cpu=CPU_TOKENS
        )
        encoder = cls(checkpoint, runner, task_head, dtype=dtype, budget=budget, num_threads=num_threads)
        encoder.reason = reason
        if cuda_graphs and runner.packed and place.type == "cuda" and encoder._stretch is None:
            runner.use_graphs()
        return encoder

    def warmup(self) -> None:
        """Capture the CUDA graphs of all batch sizes now; does nothing where there are none."""
        if self.packed:
            with torch.inference_mode(), place_on(self.num_threads, self.device):
                self._runner.warmup()

    def forward(
        self,
        ids: npt.NDArray[np.int32],
        type_ids: npt.NDArray[np.int32] | None,
        offsets: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.float32]:
        """Run N documents of T tokens in all, packed one after the other.

        Args:
            ids: int32 (T,) token ids. type_ids: int32 (T,) or None for zeros.
            offsets: int64 (N+1,); document d is ids[offsets[d]:offsets[d+1]], at least one token.

        Returns float32 (N, width), or (T, width) where tokens are read. Raises ValueError for an id outside the
        vocabulary or a document longer than the model takes.
        """
        ids, offsets = np.asarray(ids), np.asarray(offsets, np.int64)
        types = None if type_ids is None else np.asarray(type_ids)
        self._check(ids, types, offsets)
        tokens = self.readout == "tokens"
        result = np.full((len(ids) if tokens else len(offsets) - 1, self.width), np.nan, np.float32)
        with torch.inference_mode(), place_on(self.num_threads, self.device):
            for chosen, values in self._batches(ids, types, offsets, self._read(ids, offsets)):
                if tokens:
                    lengths = np.diff(offsets)[chosen]
                    ends = np.cumsum(lengths)
                    chosen = np.arange(ends[-1]) + np.repeat(offsets[chosen] - (ends - lengths), lengths)
                result[chosen] = values.cpu().numpy()
        return result

    def _read(self, ids: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64]) -> Read:
        """What the head reads: a word, or the place in each document."""
        if self.readout not in ("first", "last"):
            return self.readout
        if self.readout == "first" or not len(ids):
            return np.zeros(len(offsets) - 1, np.int64)
        if self._head.skipped is None:
            return np.diff(offsets) - 1
        content = np.where(ids != self._head.skipped, np.arange(len(ids)), -1)
        return np.maximum(np.maximum.reduceat(content, offsets[:-1]) - offsets[:-1], 0)

    def _batches(
        self, ids: Any, types: Any, offsets: Any, read: Read
    ) -> Iterator[tuple[npt.NDArray[np.int64], torch.Tensor]]:
        """(documents, their values on the device) of every batch; halves the budget where memory runs out."""
        lengths = np.diff(offsets)
        waiting = self._split(lengths, np.arange(len(lengths)))
        finished: list[tuple[npt.NDArray[np.int64], torch.Tensor]] = []
        while waiting:
            chosen = waiting.pop()
            try:
                with unstretched(self._runner.backbone, self._stretch, self._lock):
                    values = self._head(self._runner.rows(ids, types, offsets, chosen, read))
            except torch.OutOfMemoryError:
                if len(chosen) == 1:
                    raise
                values = None
            if values is None:  # outside the handler, whose traceback would keep the tensors alive
                self.budget = halved(self.budget, self._size(lengths[chosen]), self.device)
                waiting += self._split(lengths, chosen)
            elif self.readout == "tokens":
                yield chosen, values
            else:
                finished.append((chosen, values))  # read when all work has been handed to the device
        yield from finished

    def _split(self, lengths: npt.NDArray[np.int64], chosen: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
        divide = split_lengths if self.packed else split_padded if self._runner.pads else split_equal
        alone: list[npt.NDArray[np.int64]] = []
        if self._stretch is not None:
            alone = [one[None] for one in chosen if lengths[one] > self._stretch]
            chosen = chosen[lengths[chosen] <= self._stretch]
        return alone + [chosen[part] for part in divide(lengths[chosen], self.budget)]

    def _size(self, lengths: npt.NDArray[np.int64]) -> int:
        return int(lengths.sum() if self.packed else lengths.max() * len(lengths))

    def _check(self, ids: Any, types: Any, offsets: Any) -> None:
        if offsets.ndim != 1 or not len(offsets) or offsets[0] != 0 or offsets[-1] != len(ids):
            raise ValueError(f"offsets must go from 0 to the number of ids, {len(ids)}, got {offsets}")
        lengths = np.diff(offsets)
        if (lengths < 0).any():
            raise ValueError(f"offsets must not decrease, got {offsets}")
        if (lengths == 0).any():
            raise ValueError(f"document {int(np.argmin(lengths))} has no tokens")
        if types is not None and len(types) != len(ids):
            raise ValueError(f"types must have as many entries as ids: {len(ids)}, got {len(types)}")
        if not len(ids):
            return
        if self._positions is not None and lengths.max() > self._positions:
            longest = int(np.argmax(lengths))
            raise ValueError(f"document {longest} has {lengths[longest]} tokens, the model takes {self._positions}")
        check_ids(ids, self._vocabulary)
        if types is not None and self._undeclared_types and types.any():
            raise ValueError(
                f"token type {int(types.max())} cannot be given to {type(self._runner.backbone).__name__}, whose "
                "config.json declares no token types (type_vocab_size)"
            )
        if types is not None and self._types:
            for wrong in (int(types.min()), int(types.max())):
                if not 0 <= wrong < self._types:
                    raise ValueError(f"token type {wrong} is outside the model's {self._types}")


class _Whole(torch.nn.Module):
    """The head of a `PaddedModel`, which has computed its logits already."""

    readout = "logits"
    skipped = None

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return logits
