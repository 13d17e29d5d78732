"""Any Hugging Face encoder or decoder classifier on torch: packed without padding where it can, else padded."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from fastrerank import ops
from fastrerank.checkpoints.checkpoint import Checkpoint, position_limit
from fastrerank.engine.batch import Batch
from fastrerank.engine.heads import Head
from fastrerank.engine.memory import CPU_TOKENS
from fastrerank.engine.readouts import Mean, Readout, Rows, Tokens
from fastrerank.engine.torch.gpu_layers import fuse_on_gpu
from fastrerank.engine.torch.heads import ModuleHead, split_head
from fastrerank.engine.torch.loading import load_model
from fastrerank.engine.torch.model import Model, place
from fastrerank.engine.torch.placement import place_on

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastrerank.engine.torch.model import Where

__all__ = ["DTYPES", "TorchEncoder"]

DTYPES = ("float32", "bfloat16", "float16")


class TorchEncoder:
    """A Hugging Face model and a float32 head: equals transformers' forward on each document alone.

    The same face as `NativeEncoder`. One object may be called from many threads.

    Attributes:
        model: the model that is run; its `budget` and `reason` are this object's.
        packed: whether documents run in one row without padding; else in padded batches of similar lengths.
        readout: what the head reads: "first", "last", "mean" or "tokens" ("logits" of a whole model).
        width: values per document, or per token where tokens are read.
    """

    def __init__(self, checkpoint: Checkpoint, model: Model, head: Any) -> None:
        self.model, self._head = model, head
        self.dtype, self.device, self.num_threads = model.dtype, model.device, model.num_threads
        self.packed = model.packed
        self.readout: str = head.readout
        self.width: int = head.width
        config = model.runner.backbone.config.get_text_config()
        model.max_length = position_limit(checkpoint.config)
        self._types = int(getattr(config, "type_vocab_size", 0) or 0)
        # XLNet's token types are no rows of a table: zeros differ from no types.
        takes_types = "token_type_ids" in inspect.signature(model.runner.backbone.forward).parameters
        self._undeclared_types = takes_types and not hasattr(config, "type_vocab_size")

    @property
    def reason(self) -> str:
        """Return why the model is not packed; "" if it is."""
        return self.model.reason

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        head: Head | None = None,
        *,
        packed: bool | None = None,
        cuda_graphs: bool = True,
        **where: Unpack[Where],
    ) -> TorchEncoder:
        """Load a checkpoint through transformers.

        Args:
            checkpoint: opened checkpoint.
            head: rows to read and the layers on top of them; None for the checkpoint's own classification head. It is
                float32 whatever the backbone's dtype.
            packed: True: packed or ValueError; False: padded; None: packed if the model can.
            cuda_graphs: whether a packed model on a GPU replays captured graphs for small batches.
            where: dtype, device, num_threads, memory_limit; see `Where`.

        Raises ValueError for a checkpoint without a trained classification head (where `head` is None), without some of
        its weights, with weights that are NaN, or that cannot run as asked.

        Example:
            >>> from fastrerank.checkpoints.checkpoint import open_checkpoint             # doctest: +SKIP
            >>> encoder = TorchEncoder.load(open_checkpoint("path"))          # doctest: +SKIP
        """
        ops.num_threads(where.get("num_threads"))  # checks it
        loaded = load_model(checkpoint, "classification" if head is None else "none", where.get("dtype", "float32"))
        task_head: Any = None
        if head is None:
            backbone, task_head, reason = split_head(loaded)
        else:
            backbone, reason = loaded, ""
            task_head = ModuleHead(head, loaded.config.get_text_config().hidden_size)
        runner, found = place(backbone, packed=packed, whole=task_head is None, **where)
        if runner.device.type == "cuda" and runner.packed:
            fuse_on_gpu(runner)
        reason = "; ".join(part for part in (reason, found) if part)
        if packed and not runner.packed:
            raise ValueError(f"engine='torch' cannot run {checkpoint.path} packed: {reason}; engine='padded' runs it")
        task_head = _Whole(int(backbone.config.num_labels)) if task_head is None else task_head.to(runner.device)
        model = Model(runner, on_cpu=CPU_TOKENS, reason=reason, **where)
        if cuda_graphs and runner.packed and runner.device.type == "cuda" and model.fixed_frequencies:
            runner.use_graphs()
        return cls(checkpoint, model, task_head)

    def warmup(self) -> None:
        """Capture the CUDA graphs of all batch sizes now; does nothing where there are none."""
        if self.packed:
            with torch.inference_mode(), place_on(self.num_threads, self.device):
                self.model.runner.warmup()

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
        batch = Batch(
            np.asarray(ids), np.asarray(offsets, np.int64), None if type_ids is None else np.asarray(type_ids)
        )
        self.model.check(batch)
        self._check_types(batch.types)
        if not len(batch):
            return np.zeros((0, self.width), np.float32)
        values, _ = self.model.run(batch, self._read(batch), self._head, on_host=True)
        return np.asarray(values.numpy(), np.float32)

    def _read(self, batch: Batch) -> Readout:
        """What the head reads."""
        if self.readout == "first":
            return Rows(np.zeros(len(batch), np.int64))
        if self.readout == "last" and self._head.skipped is not None:
            content = np.where(batch.ids != self._head.skipped, np.arange(len(batch.ids)), -1)
            starts = batch.offsets[:-1]
            return Rows(np.maximum(np.maximum.reduceat(content, starts) - starts, 0))
        if self.readout in ("mean", "tokens"):
            return Mean() if self.readout == "mean" else Tokens()
        return Rows.last(batch)  # the runner of a whole model returns its logits for any row

    def _check_types(self, types: npt.NDArray[np.integer] | None) -> None:
        if types is None or not len(types):
            return
        if self._undeclared_types and types.any():
            raise ValueError(
                f"token type {int(types.max())} cannot be given to {type(self.model.runner.backbone).__name__}, whose "
                "config.json declares no token types (type_vocab_size)"
            )
        for wrong in (int(types.min()), int(types.max())) if self._types else ():
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
