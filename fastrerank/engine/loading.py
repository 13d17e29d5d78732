"""Which engine runs a checkpoint, on which devices and in which precision. Imports torch only where it is needed."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fastrerank import ops
from fastrerank.checkpoints.checkpoint import Checkpoint, untrained
from fastrerank.checkpoints.config_values import InvalidConfig
from fastrerank.engine import expected_weights
from fastrerank.engine.batch import shares
from fastrerank.engine.dtype import Dtype
from fastrerank.engine.families import family_of
from fastrerank.engine.heads import Head, NormalizeStep, classification_head
from fastrerank.engine.native import encoder as native_encoder

__all__ = [
    "ENGINES",
    "Encoder",
    "EncoderGroup",
    "Plan",
    "load_encoder",
    "load_label_encoder",
    "plan",
    "usable_gpu",
    "warm_up",
]

ENGINES = ("native", "torch", "padded")
_TORCH_DTYPES = ("float32", "bfloat16", "float16")
_DTYPES = ("auto", *native_encoder.DTYPES, "float16")

log = logging.getLogger("fastrerank")


class Encoder(Protocol):
    """What every engine is: documents of token ids in, float32 rows out."""

    dtype: str
    num_threads: int | None
    readout: Any

    @property
    def width(self) -> int:
        """Values per document, or per token where tokens are read."""

    def forward(
        self, ids: npt.NDArray[np.int32], type_ids: npt.NDArray[np.int32] | None, offsets: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        """Return float32 (N, width), or (T, width) where tokens are read."""


@dataclass(frozen=True)
class Plan:
    """What runs a checkpoint: an engine of `ENGINES`, devices, a precision, and why it is not the native engine.

    `engine` None is the torch engine, packed if the model can.
    """

    engine: str | None
    devices: tuple[str, ...]
    dtype: Dtype
    reason: str = ""

    @property
    def device(self) -> str | list[str]:
        """The device, or a list where there are several."""
        return self.devices[0] if len(self.devices) == 1 else list(self.devices)


def plan(config: Any, engine: str | None, device: Any, dtype: Any) -> Plan:
    """Choose what runs a checkpoint with this config.json.

    Args:
        config: the transformer's config.json.
        engine: one of `ENGINES`; None: native on a CPU if the family is native, else torch, else padded.
        device: "cpu", "cuda", "cuda:N", a list of them; None: a usable GPU, else the CPU.
        dtype: "float32", "bfloat16", "float16", "int8", or torch's dtypes of these names; "auto": float32 on a CPU,
            bfloat16 on a GPU.

    Raises ValueError for unknown values and for what the engine cannot do; ImportError where a torch engine is asked
    for and torch or transformers is not installed.

    Example:
        >>> plan({"model_type": "llama"}, "torch", "cpu", "auto").dtype
        'float32'
    """
    if engine is not None and engine not in ENGINES:
        raise ValueError(f"engine must be None or one of {', '.join(map(repr, ENGINES))}, got {engine!r}")
    dtype = Dtype.of(dtype)
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(repr, _DTYPES))}, got {str(dtype)!r}")
    devices = _devices(device)
    if engine in ("torch", "padded") and dtype == "int8":
        raise ValueError(
            f"dtype 'int8' is computed by the native engine on CPUs only; engine={engine!r} takes "
            + ", ".join(map(repr, _TORCH_DTYPES))
        )
    if engine == "native" or dtype == "int8":
        return _native_plan(config, devices, dtype)
    if devices is None:
        devices = ("cuda",) if usable_gpu() else ("cpu",)
    on_cpu = all(name == "cpu" for name in devices)
    chosen = Dtype("float32" if on_cpu else "bfloat16") if dtype == "auto" else dtype
    try:
        family_of(config)
        unsupported = ""
    except InvalidConfig:
        raise  # no engine can make sense of it
    except ValueError as error:
        unsupported = str(error)
    if engine is not None:
        _torch("the torch engine")
        return Plan(engine, devices, chosen)
    if not on_cpu:
        return Plan(None, devices, chosen, f"it runs on {', '.join(devices)}")
    if chosen == "float16":
        return Plan(None, devices, chosen, "the native engine does not compute float16")
    if unsupported:
        return Plan(None, devices, chosen, unsupported)
    return Plan("native", devices, chosen)


def _native_plan(config: Any, devices: tuple[str, ...] | None, dtype: Dtype) -> Plan:
    wrong = [name for name in devices or () if name != "cpu"]
    if wrong:
        what = "the native engine" if dtype != "int8" else "dtype 'int8' is computed by the native engine, which"
        raise ValueError(f"device must be None or 'cpu': {what} runs on CPUs, got {wrong[0]!r}")
    if dtype == "float16":
        raise ValueError(
            f"dtype must be 'auto', {', '.join(map(repr, native_encoder.DTYPES))} with engine='native', got 'float16'"
        )
    family_of(config)
    return Plan("native", devices or ("cpu",), Dtype("float32") if dtype == "auto" else dtype)


def _devices(device: Any) -> tuple[str, ...] | None:
    if device is None:
        return None
    if isinstance(device, (list, tuple)):
        if not device:
            raise ValueError("device must name at least one device, got an empty list")
        return tuple(_device(one) for one in device)
    return (_device(device),)


def _device(device: Any) -> str:
    name = f"cuda:{device}" if isinstance(device, int) and not isinstance(device, bool) and device >= 0 else str(device)
    if name in ("cpu", "cpu:0"):
        return "cpu"
    if not re.fullmatch(r"cuda(:\d+)?", name):
        raise ValueError(f"device must be None or 'cpu', 'cuda', 'cuda:N' or a list of these, got {name!r}")
    torch = _torch(f"device {name!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count <= int(name.partition(":")[2] or 0):
        found = f"it finds {count}" if count else "it finds no usable GPU"
        raise ValueError(f"device must be None or 'cpu' here: torch {torch.__version__} cannot use {name!r}, {found}")
    return name


def usable_gpu() -> bool:
    """Whether torch is installed and reports a CUDA GPU; imports torch only if the driver shows one.

    Example:
        >>> usable_gpu() in (True, False)
        True
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1", "NoDevFiles"):
        return False
    if not any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg")):
        return False
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
        return False
    import torch

    return bool(torch.cuda.is_available())


def _torch(what: str) -> Any:
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"{what} needs {package}: pip install 'fastrerank[torch]'")
    import torch

    return torch


def load_encoder(
    checkpoint: Checkpoint,
    head: Head | None,
    chosen: Plan,
    *,
    num_threads: int | None = None,
    memory_limit: float | None = None,
) -> Encoder:
    """Load a checkpoint on the engine and devices of a plan; several devices share each call's documents.

    `head` None is the checkpoint's own classification head. Raises ValueError if it has none that is trained, or if
    the engine cannot serve the checkpoint, and ImportError where torch is needed and missing.
    """
    ops.num_threads(num_threads)  # checks it
    load = _load_native if chosen.engine == "native" else _load_torch
    encoders = [load(checkpoint, head, chosen, device, num_threads, memory_limit) for device in chosen.devices]
    return encoders[0] if len(encoders) == 1 else EncoderGroup(encoders)


def load_label_encoder(
    checkpoint: Checkpoint,
    labels: Sequence[int] | None,
    chosen: Plan,
    *,
    num_threads: int | None = None,
    memory_limit: float | None = None,
) -> Encoder:
    """Load a decoder that shares what documents begin with; several devices share each call's documents.

    `labels` are one or two token ids of a language model; None: it is a classifier. Raises ValueError if the model is
    no decoder or its logits cannot be computed, and ImportError where torch is missing.
    """
    _torch(f"{checkpoint.path}, a decoder,")
    if chosen.engine == "padded":
        raise ValueError(f"engine must be None or 'torch' for {checkpoint.path}, a language model, got 'padded'")
    from fastrerank.engine.torch.causal import LabelEncoder

    encoders: list[Encoder] = [
        LabelEncoder.load(
            checkpoint, labels, dtype=chosen.dtype, device=device, num_threads=num_threads, memory_limit=memory_limit
        )
        for device in chosen.devices
    ]
    return encoders[0] if len(encoders) == 1 else EncoderGroup(encoders)


def _load_native(
    checkpoint: Checkpoint,
    head: Head | None,
    chosen: Plan,
    device: str,  # noqa: ARG001
    num_threads: int | None,
    memory_limit: float | None,  # noqa: ARG001
) -> Encoder:
    family = family_of(checkpoint.config)
    with checkpoint.tensors() as tensors:
        if head is None:
            prefix = native_encoder.body_prefix(family, tensors)
            expected_weights.check_body(checkpoint.transformer_path, family, tensors, prefix)
            head, missing = classification_head(checkpoint.transformer_path, family, tensors, prefix)
            if head is None:
                raise untrained(checkpoint, missing)
        # Rounding in the last layers reaches every coordinate of a vector.
        vectors = bool(head.steps) and isinstance(head.steps[-1], NormalizeStep)
        return native_encoder.NativeEncoder(
            checkpoint,
            family,
            tensors,
            head,
            dtype=chosen.dtype,
            num_threads=num_threads,
            precise_layers=family.layers // 3 if vectors else 0,
        )


def _load_torch(
    checkpoint: Checkpoint,
    head: Head | None,
    chosen: Plan,
    device: str,
    num_threads: int | None,
    memory_limit: float | None,
) -> Encoder:
    try:
        _torch("the torch engine")
    except ImportError as error:
        if chosen.engine is None:
            raise ImportError(f"{chosen.reason}; the torch engine does, but {error}") from None
        raise
    from fastrerank.engine.torch.encoder import TorchEncoder

    packed = {"torch": True, "padded": False, None: None}[chosen.engine]
    encoder = TorchEncoder.load(
        checkpoint,
        head,
        dtype=chosen.dtype,
        device=device,
        num_threads=num_threads,
        packed=packed,
        memory_limit=memory_limit,
    )
    if device == chosen.devices[0] and chosen.engine is None:
        if encoder.packed:
            log.info("%s runs packed on the torch engine: %s", checkpoint.path, chosen.reason)
        else:
            log.warning("%s runs in padded batches, which is slower: %s", checkpoint.path, encoder.reason)
    return encoder


def warm_up(encoder: Encoder) -> None:
    """Do now what an engine's first calls would do, such as capturing CUDA graphs; nothing on the native engine."""
    warmup = getattr(encoder, "warmup", None)
    if warmup is not None:
        warmup()


class EncoderGroup:
    """Encoders of one checkpoint on several devices: a call's documents are shared out by tokens, results in order."""

    def __init__(self, encoders: list[Encoder]) -> None:
        self.encoders = encoders
        self.dtype = encoders[0].dtype
        self.readout = encoders[0].readout
        self.num_threads = encoders[0].num_threads
        self._pool = ThreadPoolExecutor(len(encoders), thread_name_prefix="fastrerank")

    def __repr__(self) -> str:
        return f"EncoderGroup({len(self.encoders)} x {type(self.encoders[0]).__name__})"

    @property
    def width(self) -> int:
        """Values per document, or per token where tokens are read."""
        return self.encoders[0].width

    def warmup(self) -> None:
        """Do now, on every device, what the first calls would do."""
        for encoder in self.encoders:
            warm_up(encoder)

    def forward(
        self, ids: npt.NDArray[np.int32], type_ids: npt.NDArray[np.int32] | None, offsets: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        """Return what one encoder would: float32 (N, width), or (T, width) where tokens are read."""
        ids, offsets = np.asarray(ids), np.asarray(offsets, np.int64)
        if len(offsets) < 3:
            return self.encoders[0].forward(ids, type_ids, offsets)
        lengths = np.diff(offsets)
        parts = [part for part in shares(lengths, len(self.encoders)) if len(part)]
        rows = [np.concatenate([np.arange(offsets[d], offsets[d + 1]) for d in part]) for part in parts]

        def run(number: int) -> npt.NDArray[np.float32]:
            taken = rows[number]
            types = None if type_ids is None else np.asarray(type_ids)[taken]
            part_offsets = np.concatenate([[0], np.cumsum(lengths[parts[number]])])
            return self.encoders[number].forward(ids[taken], types, part_offsets)

        results = list(self._pool.map(run, range(len(parts))))
        places = rows if self.readout == "tokens" else parts
        result = np.empty((len(ids) if self.readout == "tokens" else len(lengths), self.width), np.float32)
        for place, values in zip(places, results, strict=True):
            result[place] = values
        return result
