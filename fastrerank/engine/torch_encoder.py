"""Any Hugging Face encoder or decoder classifier on torch: packed without padding where it can, else padded."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fastrerank import ops
from fastrerank.checkpoint import Checkpoint, position_limit, untrained
from fastrerank.engine.heads import Head
from fastrerank.engine.memory import CPU_TOKENS, bytes_per_token, device_budget
from fastrerank.engine.packing import pack_documents, split_lengths, split_padded
from fastrerank.engine.padded import PaddedBackbone, PaddedModel
from fastrerank.engine.torch_backbone import PackedBackbone, Read, Row, why_not_packed
from fastrerank.engine.torch_heads import ModuleHead, split_head

__all__ = ["DTYPES", "TorchEncoder"]

DTYPES = ("float32", "bfloat16", "float16")

log = logging.getLogger("fastrerank")

# Relative difference between packed and single documents that passes when a model is loaded: far above rounding (1e-6,
# 2e-2), far below what a wrong position or a glance at a neighbour does.
_AGREES = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.1}


class TorchEncoder:
    """A Hugging Face model and a float32 head: equals transformers' forward on each document alone.

    The same face as `NativeEncoder`. One object may be called from many threads.

    Attributes:
        packed: whether documents run in one row without padding; else in padded batches of similar lengths.
        reason: why it is not packed; "" if it is.
        budget: tokens of one forward; halved for good when a forward runs out of memory.
    """

    def __init__(
        self, checkpoint: Checkpoint, runner: Any, head: Any, *, dtype: str, budget: int,
        num_threads: int | None = None,
    ) -> None:  # fmt: skip
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
        self._vocabulary = int(config.vocab_size)
        self.width: int = head.width
        self._stretch = _stretch(config)
        self._lock = threading.Lock()

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, head: Head | None = None, *, dtype: str = "float32", device: str = "cpu",
        num_threads: int | None = None, packed: bool | None = None, memory_limit: float | None = None,
    ) -> TorchEncoder:  # fmt: skip
        """Load a checkpoint through transformers.

        Args:
            checkpoint: opened checkpoint.
            head: rows to read and the layers on top of them; None for the checkpoint's own classification head.
            dtype: "float32", "bfloat16" or "float16" for the backbone. The head is float32 in all of them.
            device: "cpu", "cuda" or "cuda:N".
            num_threads: CPU threads of a call; None for torch's own setting.
            packed: True: packed or ValueError; False: padded; None: packed if the model can.
            memory_limit: bytes, or a fraction of the device's memory, that the process may come to; None for 0.9.

        Raises ValueError for a checkpoint without a trained classification head (where `head` is None), without some of
        its weights, with weights that are NaN, or that cannot run as asked.

        Example:
            >>> from fastrerank.checkpoint import open_checkpoint             # doctest: +SKIP
            >>> encoder = TorchEncoder.load(open_checkpoint("path"))          # doctest: +SKIP
        """
        ops.num_threads(num_threads)  # checks it
        model = _load_model(checkpoint, head is None, dtype)
        if head is None:
            backbone, task_head, reason = split_head(model)
        else:
            backbone, reason = model, ""
            task_head = ModuleHead(head, model.config.get_text_config().hidden_size)
        _cast(backbone, getattr(torch, dtype))
        place = torch.device(device)
        backbone.to(place).eval()
        runner: Any
        if task_head is None:
            _refuse_packed(packed, checkpoint, reason)
            runner = PaddedModel(backbone)
            task_head = _Whole(int(backbone.config.num_labels))
        else:
            task_head.to(place)
            runner, reason = _runner(backbone, dtype, packed)
            if not runner.packed and packed is not False:
                _refuse_packed(packed, checkpoint, reason)
        each = bytes_per_token(backbone.config, getattr(torch, dtype).itemsize, runner.packed)
        budget = CPU_TOKENS if place.type == "cpu" and memory_limit is None else device_budget(place, each, memory_limit)
        encoder = cls(checkpoint, runner, task_head, dtype=dtype, budget=budget, num_threads=num_threads)
        encoder.reason = reason
        return encoder

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
        with torch.inference_mode(), _threads(self.num_threads, self.device):
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
                with self._exclusive():
                    values = self._head(self._runner.rows(ids, types, offsets, chosen, read))
            except torch.OutOfMemoryError:
                if len(chosen) == 1:
                    raise
                values = None
            if values is None:  # outside the handler, whose traceback would keep the tensors alive
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                self.budget = max(1, min(self.budget, self._size(lengths[chosen])) // 2)
                log.warning("out of memory on %s: going on with %d tokens at a time", self.device, self.budget)
                waiting += self._split(lengths, chosen)
            elif self.readout == "tokens":
                yield chosen, values
            else:
                finished.append((chosen, values))  # read when all work has been handed to the device
        yield from finished

    def _split(self, lengths: npt.NDArray[np.int64], chosen: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
        divide = split_lengths if self.packed else split_padded
        alone = [] if self._stretch is None else [one[None] for one in chosen if lengths[one] > self._stretch]
        if alone:
            chosen = chosen[lengths[chosen] <= self._stretch]
        return alone + [chosen[part] for part in divide(lengths[chosen], self.budget)]

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Hold a model whose rotary frequencies change with the longest text, from their first state on."""
        if self._stretch is None:
            yield
            return
        with self._lock:
            for module in self._runner.backbone.modules():
                if hasattr(module, "original_inv_freq") and hasattr(module, "max_seq_len_cached"):
                    module.inv_freq = module.original_inv_freq
                    module.max_seq_len_cached = module.original_max_seq_len
            yield

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
        for wrong in (int(ids.min()), int(ids.max())):
            if not 0 <= wrong < self._vocabulary:
                raise ValueError(f"token id {wrong} is outside the vocabulary of {self._vocabulary}")
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


def _load_model(checkpoint: Checkpoint, task: bool, dtype: str) -> Any:
    import transformers

    factory = transformers.AutoModelForSequenceClassification if task else transformers.AutoModel
    path = checkpoint.transformer_path
    with checkpoint.tensors():  # damaged or missing files are named before transformers reads them
        pass
    # Heads keep the precision that they are stored in, so half precision comes after loading.
    stored = torch.float32 if dtype == "float32" else "auto"
    with _quiet():
        model, info = factory.from_pretrained(
            str(path), dtype=stored, output_loading_info=True, local_files_only=True,
            trust_remote_code=checkpoint.trust_remote_code, ignore_mismatched_sizes=True,
        )  # fmt: skip
    if info["mismatched_keys"]:
        name, stored_shape, shape = sorted(info["mismatched_keys"])[0]
        raise ValueError(
            f"{path}: the stored shape of {name} is {tuple(stored_shape)}, config.json makes it {tuple(shape)}"
        )
    prefix = f"{model.base_model_prefix}."
    missing = sorted(info["missing_keys"])
    in_body = [name for name in missing if name.startswith(prefix) and not name.startswith(f"{prefix}pooler.")]
    if task and missing and not in_body:
        raise untrained(checkpoint)
    lacking = [name for name in missing if task or not name.startswith("pooler.")]
    if lacking:
        raise ValueError(f"{path}: the weights lack {lacking[0]!r}" + (f" and {len(lacking) - 1} more" * (len(lacking) > 1)))
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter.detach()).all() and name not in missing:
            raise ValueError(f"{path}: weight of {name} is NaN or infinite: the checkpoint is damaged")
    return model.eval()


def _cast(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters only: buffers such as rotary frequencies need their float32."""
    kept = {*(getattr(model, "_keep_in_fp32_modules", None) or ()),
            *(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}  # fmt: skip
    for name, parameter in model.named_parameters():
        if not kept.intersection(name.split(".")):
            parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(False)


def _refuse_packed(packed: bool | None, checkpoint: Checkpoint, reason: str) -> None:
    if packed:
        raise ValueError(f"engine='torch' cannot run {checkpoint.path} packed: {reason}; engine='padded' runs it")


def _runner(backbone: Any, dtype: str, packed: bool | None) -> tuple[Any, str]:
    """Return the backbone's runner, and why it is a padded one if it is."""
    if packed is False:
        return PaddedBackbone(backbone), "engine='padded' was asked for"
    reason = why_not_packed(backbone)
    if reason is not None:
        return PaddedBackbone(backbone), reason
    documents = _probe_documents(backbone)
    before = backbone.config._attn_implementation
    with torch.inference_mode():
        expected = [_alone(backbone, ids) for ids in documents]
        runner = PackedBackbone(backbone)
        offsets = np.cumsum([0, *map(len, documents)])
        batch = pack_documents(np.concatenate(documents), None, offsets, np.arange(len(documents)), runner.causal)
        try:
            states = runner.hidden(Row(batch, runner.position_ids(batch), runner.device)).double()
            error = _relative_error(states, torch.cat(expected).double())
            reason = f"packed hidden states differ from single documents' by {error:.2g}"
        except NotImplementedError as refusal:
            error, reason = float("inf"), str(refusal)
    if error <= _AGREES[dtype]:
        return runner, ""
    backbone.set_attn_implementation(before)
    return PaddedBackbone(backbone), reason


def _probe_documents(backbone: Any) -> list[npt.NDArray[np.int32]]:
    """Three documents of random tokens; one is longer than the model's window, where that is small."""
    config = backbone.config.get_text_config()
    pad = getattr(config, "pad_token_id", None)
    usable = np.array([i for i in range(min(config.vocab_size, 1000)) if i != pad], np.int32)
    window = getattr(config, "sliding_window", None) or 0
    longest = window + 9 if window <= 128 else 20
    limit = min(longest, (getattr(config, "max_position_embeddings", None) or longest) - (pad or 0) - 2)
    return [np.random.default_rng(n).choice(usable, n) for n in (3, max(1, limit), 2)]


def _alone(backbone: Any, ids: npt.NDArray[np.int32]) -> torch.Tensor:
    tensor = torch.from_numpy(ids[None]).long().to(next(backbone.parameters()).device)
    states: torch.Tensor = backbone(input_ids=tensor, attention_mask=torch.ones_like(tensor))[0]
    return states[0]


def _relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference over that of the expected; where both overflow alike, of the rest."""
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(ours)):
        return float("inf")
    ours, expected = ours[finite], expected[finite]
    return float((ours - expected).norm() / expected.norm().clamp(min=1e-30)) if len(ours) else 0.0


def _stretch(config: Any) -> int | None:
    """Tokens up to which rotary frequencies are fixed, for families where a longer text changes all of a batch's."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    for kind in kinds:
        if kind.get("rope_type") in ("dynamic", "longrope"):
            original = kind.get("original_max_position_embeddings")
            return int(original or getattr(config, "original_max_position_embeddings", 0) or config.max_position_embeddings)
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' table of unexpected and missing weights off the terminal: what matters of it is raised."""
    from transformers.utils import logging as messages

    level, bars = messages.get_verbosity(), messages.is_progress_bar_enabled()
    messages.set_verbosity_error()
    messages.disable_progress_bar()
    try:
        yield
    finally:
        messages.set_verbosity(level)
        if bars:
            messages.enable_progress_bar()


@contextlib.contextmanager
def _threads(count: int | None, device: torch.device) -> Iterator[None]:
    if count is None or device.type != "cpu":
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
