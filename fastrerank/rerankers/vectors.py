"""What rerankers by vectors share: a checkpoint's encoder with a head that ends in unit vectors."""

from __future__ import annotations

import sys
import warnings
from abc import abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from fastrerank.checkpoints.checkpoint import Checkpoint, open_checkpoint
from fastrerank.engine.dtype import Dtype
from fastrerank.engine.heads import Head, NormalizeStep
from fastrerank.engine.loading import Encoder, load_encoder, plan, warm_up
from fastrerank.inputs.limits import TextLimits
from fastrerank.inputs.tokenizer import Tokenizer
from fastrerank.rerankers.base import Reranker
from fastrerank.rerankers.call import LIMITS
from fastrerank.rerankers.recognise import is_classifier, other_training

if TYPE_CHECKING:
    from fastrerank.runtime.types import DeviceLike, DtypeLike, EngineName

__all__ = ["VectorReranker"]


class VectorReranker(Reranker):
    """A reranker whose encoder gives unit vectors, of texts or of tokens.

    Loading warns where the checkpoint's files tell that it was trained as something else, such as a classifier.

    Args:
        model_name_or_path: hub id or local folder.
        device: "cpu", "cuda", "cuda:1", or a list of devices that share the work; None: a usable GPU, else the CPU.
        dtype: "float32", "bfloat16", "int8" (native engine only), "float16" (torch engines only); "auto": float32 on a
            CPU, bfloat16 on a GPU. With int8, two parts run in bfloat16: the last third of the layers for documents, as
            rounding there reaches every coordinate, and all layers for queries, as all documents share their error.
        max_length: tokens per text; None for the checkpoint's limit.
        num_threads: CPU threads of a call; None for `fastrerank.set_num_threads`'s, or torch's own on a torch engine.
        engine: "native", "torch" or "padded"; None: native on a CPU if the family is native, else torch, else padded.
        memory_limit: bytes, or a fraction of the device's memory, that a torch engine may come to; None for 0.9.
        revision, cache_folder, local_files_only, token, trust_remote_code: as in huggingface_hub.
    """

    call_options: ClassVar[frozenset[str]] = LIMITS
    _reads: ClassVar[str]  # what the compared vectors belong to, for messages

    def __init__(
        self,
        model_name_or_path: str | Path,
        *,
        device: DeviceLike | None = None,
        dtype: DtypeLike = "auto",
        max_length: int | None = None,
        num_threads: int | None = None,
        revision: str | None = None,
        cache_folder: str | None = None,
        local_files_only: bool = False,
        token: bool | str | None = None,
        trust_remote_code: bool = False,
        engine: EngineName | None = None,
        memory_limit: float | None = None,
    ) -> None:
        super().__init__()
        checkpoint = open_checkpoint(
            model_name_or_path,
            revision=revision,
            cache_folder=cache_folder,
            local_files_only=local_files_only,
            token=token,
            trust_remote_code=trust_remote_code,
        )
        self.checkpoint = checkpoint
        head = self._head(checkpoint)
        if not head.steps or not isinstance(head.steps[-1], NormalizeStep):
            head = Head(head.readout, (*head.steps, NormalizeStep()))
        chosen = plan(checkpoint.config, engine, device, dtype)
        self.device, self.dtype = chosen.device, chosen.dtype
        self.engine: Encoder = load_encoder(
            checkpoint, head, chosen, num_threads=num_threads, memory_limit=memory_limit
        )
        # A query has few tokens beside its documents' thousands: its higher precision costs a second copy of the
        # weights, and hardly any time.
        self.query_engine: Encoder = self.engine
        if chosen.dtype == "int8":
            self.query_engine = load_encoder(
                checkpoint,
                head,
                replace(chosen, dtype=Dtype("bfloat16")),
                num_threads=num_threads,
                memory_limit=memory_limit,
            )
        limit = checkpoint.max_seq_length if max_length is None else max_length
        self._tokenizer = Tokenizer.load(checkpoint.transformer_path, limit)
        trained = other_training(checkpoint)
        if trained is not None:
            advice = "; method='cross-encoder' is what it was trained for" if is_classifier(checkpoint) else ""
            warnings.warn(
                f"{checkpoint.path} was trained as {trained}, not for {self.method}: its {self._reads} were never "
                f"compared in training, and rankings by them may be poor{advice}",
                UserWarning,
                stacklevel=_outside(),
            )

    def warmup(self) -> VectorReranker:
        """Do now what the first calls would do, such as capturing CUDA graphs on a GPU, and return self."""
        warm_up(self.engine)
        if self.query_engine is not self.engine:
            warm_up(self.query_engine)
        return self

    @staticmethod
    def _of_query(limits: TextLimits) -> TextLimits:
        """The limits of a call for its query: `truncation_side` is about documents."""
        return replace(limits, truncation_side=None)

    @abstractmethod
    def _head(self, checkpoint: Checkpoint) -> Head:
        """The head that the checkpoint's modules describe, or ValueError if this method cannot serve it."""


def _outside() -> int:
    """The `stacklevel` at which a warning names the caller's line, not one of this package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "fastrerank":
        frame, level = frame.f_back, level + 1
    return level
