"""The engines of the GPU comparison, all in one process: token ids in, logits on the host out.

Ours is the packed torch engine as a user gets it, and the same engine with one part exchanged: no CUDA graphs, its
attention by torch's `varlen_attn`, its backbone under torch.compile. The rival is sentence-transformers' model on
padded, length-sorted batches.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from bench.cross_encoder.gpu_models import GpuModel
from bench.harness.data import Pairs
from fastrerank.checkpoints.checkpoint import open_checkpoint
from fastrerank.engine.torch.encoder import TorchEncoder

Scores = NDArray[np.float32]
DTYPE = "bfloat16"


class NotHere(Exception):
    """An engine that this machine or this version of torch cannot run; the message says why."""


class GpuEngine(ABC):
    """One way to run a checkpoint. `settings` are the batch sizes to try; `compiled` engines take minutes to start."""

    name: ClassVar[str]
    setup: ClassVar[str]
    settings: ClassVar[tuple[int, ...]] = ()
    compiled: ClassVar[bool] = False
    batch: int | None = None

    def __init__(self, model: GpuModel, device: torch.device) -> None:
        self.model, self.device = model, device

    @abstractmethod
    def load(self) -> None:
        """Read the checkpoint onto the device; raises NotHere where the engine cannot run."""

    @abstractmethod
    def scores(self, pairs: Pairs) -> Scores:
        """Equals the logits, float32 (N,), on the host: the call ends when they are there."""


class Packed(GpuEngine):
    name = "fastrerank"
    setup = "packed, CUDA graphs up to 32768 tokens"
    graphs: ClassVar[bool] = True

    def load(self) -> None:
        self.encoder = TorchEncoder.load(
            open_checkpoint(self.model.path), dtype=DTYPE, device=str(self.device), packed=True, cuda_graphs=self.graphs
        )

    def scores(self, pairs: Pairs) -> Scores:
        return self.encoder.forward(*packed_ids(pairs))[:, 0]


class Eager(Packed):
    name, graphs = "fastrerank-eager", False
    setup = "packed, no CUDA graphs"


class Varlen(Eager):
    name = "fastrerank-varlen"
    setup = "packed, no CUDA graphs, attention by torch.nn.attention.varlen.varlen_attn"

    def load(self) -> None:
        attention = find_varlen(self.device)
        super().load()
        use_varlen(self.encoder, attention)


class Compiled(Eager):
    name, compiled = "fastrerank-compiled", True
    setup = "packed, backbone under torch.compile(dynamic=True), ops.attention as one node in it"

    def load(self) -> None:
        super().load()
        runner = self.encoder.model.runner
        runner.backbone = torch.compile(runner.backbone, dynamic=True)


class SentenceTransformers(GpuEngine):
    name = "sentence-transformers"
    setup = "the model inside CrossEncoder, bfloat16, SDPA, padded length-sorted batches of 32 (its default)"
    settings: ClassVar[tuple[int, ...]] = ()
    batch = 32

    def load(self) -> None:
        from sentence_transformers import CrossEncoder

        kwargs = {"dtype": getattr(torch, DTYPE), "attn_implementation": "sdpa"}
        self._run: Any = CrossEncoder(str(self.model.path), device=str(self.device), model_kwargs=kwargs)[0].model
        self._takes = set(inspect.signature(type(self._run).forward).parameters)
        self._pad = int(self.model.config["pad_token_id"])

    @torch.inference_mode()
    def scores(self, pairs: Pairs) -> Scores:
        order = np.argsort(-pairs.lengths, kind="stable")
        size = self.batch or len(order)
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        # Read when all batches have been handed to the device: the rival does not wait between them either.
        logits = [self._run(**self._padded(pairs, rows)).logits[:, 0].float() for rows in batches]
        out = np.empty(len(order), np.float32)
        out[order] = torch.cat(logits).cpu().numpy()
        return out

    def _padded(self, pairs: Pairs, rows: NDArray[np.intp]) -> dict[str, torch.Tensor]:
        width = max(len(pairs.ids[row]) for row in rows)
        inputs = {
            "input_ids": np.full((len(rows), width), self._pad, np.int64),
            "attention_mask": np.zeros((len(rows), width), np.int64),
            "token_type_ids": np.zeros((len(rows), width), np.int64),
        }
        for line, row in enumerate(rows):
            length = len(pairs.ids[row])
            inputs["input_ids"][line, :length] = pairs.ids[row]
            inputs["attention_mask"][line, :length] = 1
            inputs["token_type_ids"][line, :length] = pairs.types[row]
        if not self.model.config.get("type_vocab_size", 0) > 1 or "token_type_ids" not in self._takes:
            del inputs["token_type_ids"]
        return {name: torch.from_numpy(array).to(self.device) for name, array in inputs.items()}


class SentenceTransformersTuned(SentenceTransformers):
    name = "sentence-transformers-tuned"
    setup = "the same, at the quickest of the batch sizes 8, 16, 64, 128"
    settings = (8, 16, 64, 128)


class SentenceTransformersCompiled(SentenceTransformers):
    name, compiled = "sentence-transformers-compiled", True
    setup = "the same as sentence-transformers, under torch.compile(dynamic=True)"

    def load(self) -> None:
        super().load()
        self._run = torch.compile(self._run, dynamic=True)


class Reference(SentenceTransformers):
    """The yardstick: transformers in float32, eager attention, one pair at a time."""

    name, batch, setup = "reference", 1, "transformers, float32, eager, one pair at a time"

    def load(self) -> None:
        from transformers import AutoModelForSequenceClassification

        self._run = (
            AutoModelForSequenceClassification.from_pretrained(
                self.model.path, dtype=torch.float32, attn_implementation="eager"
            )
            .eval()
            .to(self.device)
        )
        self._takes = set(inspect.signature(type(self._run).forward).parameters)
        self._pad = int(self.model.config["pad_token_id"])


OURS: tuple[type[GpuEngine], ...] = (Packed, Eager, Varlen)
RIVALS: tuple[type[GpuEngine], ...] = (SentenceTransformers, SentenceTransformersTuned)
COMPILED: tuple[type[GpuEngine], ...] = (Compiled, SentenceTransformersCompiled)


def packed_ids(pairs: Pairs) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int64]]:
    """Equals (ids (T,), types (T,), offsets (N+1,)) as `TorchEncoder.forward` takes them."""
    offsets = np.concatenate([[0], np.cumsum(pairs.lengths)]).astype(np.int64)
    return np.concatenate(pairs.ids), np.concatenate(pairs.types), offsets


def find_varlen(device: torch.device) -> Callable[..., torch.Tensor]:
    """Equals torch's `varlen_attn`.

    Raises
    ------
    NotHere: this torch has none that takes windows, or `device` is no GPU.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise NotHere(f"torch {torch.__version__} has no torch.nn.attention.varlen") from error
    if "window_size" not in inspect.signature(varlen_attn).parameters:
        raise NotHere(f"varlen_attn of torch {torch.__version__} takes no window_size")
    if device.type != "cuda":
        raise NotHere("varlen_attn runs on GPUs only")
    found: Callable[..., torch.Tensor] = varlen_attn
    return found


@dataclass
class _Bounds:
    """Where the documents of the running batch end: int32 (N+1,) on the device, and the longest one."""

    ends: torch.Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int32))
    longest: int = 0


def use_varlen(encoder: TorchEncoder, varlen: Callable[..., torch.Tensor]) -> None:
    """Exchanges the attention of a packed encoder without graphs: document ends go to the device once per batch."""
    from transformers import AttentionInterface

    from fastrerank.engine.torch.placement import upload

    runner, bounds = encoder.model.runner, _Bounds()
    hidden = runner.hidden

    def bounded(batch: Any) -> torch.Tensor:
        ends = np.concatenate([[0], batch.ends]).astype(np.int32)
        bounds.ends, bounds.longest = upload(ends, runner.device), int((batch.ends - batch.starts).max())
        states: torch.Tensor = hidden(batch)
        return states

    def attend(
        module: torch.nn.Module,  # noqa: ARG001
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        if attention_mask is not None:
            raise ValueError("packed rows need no mask, got one")
        window = (-1, -1) if sliding_window is None else (sliding_window - 1, sliding_window - 1)
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        out = varlen(
            q, k, v, bounds.ends, bounds.ends, bounds.longest, bounds.longest, scale=scaling, window_size=window
        )
        return out[None], None

    name = f"fastrerank-bench-varlen-{id(encoder)}"
    AttentionInterface.register(name, attend)
    runner.backbone.set_attn_implementation(name)
    runner.hidden = bounded


@contextmanager
def failing_as(kind: type[Exception], what: str) -> Iterator[None]:
    """Turns whatever a foreign engine raises into `kind`, which the table of the run then shows."""
    try:
        yield
    except NotHere:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise kind(f"{what}: {type(error).__name__}: {lines[0] if lines else ''}") from error
