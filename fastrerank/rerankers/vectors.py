"""What rerankers by vectors share: a checkpoint's encoder with a head that ends in unit vectors."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

from fastrerank.checkpoint import Checkpoint, open_checkpoint
from fastrerank.engine.families import family_of
from fastrerank.engine.heads import Head, NormalizeStep
from fastrerank.engine.native import NativeEncoder
from fastrerank.rerankers.base import Reranker, check_device, native_dtype
from fastrerank.text.tokenizer import Tokenizer

__all__ = ["VectorReranker"]


class VectorReranker(Reranker):
    """A reranker whose encoder gives unit vectors, of texts or of tokens.

    Args:
        model_name_or_path: hub id or local folder.
        device: None or "cpu".
        dtype: "float32", "bfloat16", "int8"; "auto" is float32. In int8 the last third of the layers runs in bfloat16:
            what is rounded there reaches every coordinate of the vectors.
        max_length: tokens per text; None for the checkpoint's limit.
        num_threads: CPU threads of a call; None for `fastrerank.set_num_threads`'s.
        revision, cache_folder, local_files_only, token, trust_remote_code: as in huggingface_hub.
    """

    def __init__(
        self, model_name_or_path: str | Path, *, device: Any = None, dtype: str = "auto",
        max_length: int | None = None, num_threads: int | None = None, revision: str | None = None,
        cache_folder: str | None = None, local_files_only: bool = False, token: bool | str | None = None,
        trust_remote_code: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.device = check_device(device)
        self.dtype = native_dtype(dtype)
        checkpoint = open_checkpoint(
            model_name_or_path, revision=revision, cache_folder=cache_folder, local_files_only=local_files_only,
            token=token, trust_remote_code=trust_remote_code,
        )  # fmt: skip
        self.checkpoint = checkpoint
        head = self._head(checkpoint)
        if not head.steps or not isinstance(head.steps[-1], NormalizeStep):
            head = Head(head.readout, (*head.steps, NormalizeStep()))
        self.engine = NativeEncoder.load(
            checkpoint, head, dtype=self.dtype, num_threads=num_threads,
            precise_layers=family_of(checkpoint.config).layers // 3,
        )  # fmt: skip
        self._tokenizer = Tokenizer.load(checkpoint.transformer_path, max_length or checkpoint.max_seq_length)

    @abstractmethod
    def _head(self, checkpoint: Checkpoint) -> Head:
        """The head that the checkpoint's modules describe, or ValueError if this method cannot serve it."""
