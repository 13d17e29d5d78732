"""Checkpoints as transformers models: loaded quietly, checked, and cast to the precision that they run in."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import logging as messages

from fastrerank.checkpoint import Checkpoint, untrained

__all__ = ["cast_parameters", "load_model", "quiet", "release", "release_after_reading"]

_MAPS = Path("/proc/self/maps")
_FACTORIES = {
    "classification": transformers.AutoModelForSequenceClassification,
    "causal": transformers.AutoModelForCausalLM,
    "seq2seq": transformers.AutoModelForSeq2SeqLM,
    "none": transformers.AutoModel,
}


def load_model(checkpoint: Checkpoint, head: str, dtype: str, layers: int | None = None) -> Any:
    """Return the checkpoint's transformers model on the CPU, in evaluation mode.

    Args:
        checkpoint: opened checkpoint.
        head: "classification" for the sequence classification model, "causal" or "seq2seq" for the language model,
            "none" for the body alone.
        dtype: precision that the backbone will have; parameters come as float32 for "float32", else as they are stored.
        layers: how many layers the model shall have; weights of those above are never read. None for all.

    Raises ValueError for a model without the trained head that is asked for, weights that are missing, of another shape
    than config.json says, NaN or infinite, and for a variant that transformers does not compute.
    """
    factory, task = _FACTORIES[head], head == "classification"
    path = checkpoint.transformer_path
    with checkpoint.tensors():  # damaged or missing files are named before transformers reads them
        pass
    # Heads keep the precision that they are stored in, so half precision comes after loading.
    stored = torch.float32 if dtype == "float32" else "auto"
    # torch's own attention has no soft capping, and some releases of transformers use it for such models all the same.
    exact: dict[str, Any] = {"attn_implementation": "eager"} if checkpoint.config.get("attn_logit_softcapping") else {}
    if layers is not None:
        exact["config"] = _shortened(checkpoint, layers)
    with quiet():
        model, info = factory.from_pretrained(
            str(path), dtype=stored, output_loading_info=True, local_files_only=True,
            trust_remote_code=checkpoint.trust_remote_code, ignore_mismatched_sizes=True, **exact,
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
        raise untrained(checkpoint, missing[0])
    lacking = [name for name in missing if head != "none" or not name.startswith("pooler.")]
    if lacking:
        raise ValueError(
            f"{path}: the weights lack {lacking[0]!r}" + (f" and {len(lacking) - 1} more" * (len(lacking) > 1))
        )
    kind = checkpoint.config.get("position_embedding_type") or "absolute"
    if kind.startswith("relative") and not any(hasattr(module, "distance_embedding") for module in model.modules()):
        raise ValueError(
            f"{path}: position_embedding_type = {kind!r} in config.json is not what transformers "
            f"{transformers.__version__} computes for {type(model).__name__}: its scores would be wrong"
        )
    for name, parameter in model.named_parameters():
        if name not in missing and not _finite(parameter.detach()):
            raise ValueError(f"{path}: weight of {name} is NaN or infinite: the checkpoint is damaged")
    return model.eval()


def _shortened(checkpoint: Checkpoint, layers: int) -> Any:
    """The checkpoint's transformers configuration with its first layers only."""
    config = transformers.AutoConfig.from_pretrained(
        str(checkpoint.transformer_path), local_files_only=True, trust_remote_code=checkpoint.trust_remote_code
    )
    text = config.get_text_config()
    whole = text.num_hidden_layers
    for name, value in vars(text).items():
        if isinstance(value, (list, tuple)) and len(value) == whole:  # one entry per layer, as layer_types
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    return config


def _finite(tensor: torch.Tensor) -> bool:
    """Whether all of a weight is finite; neither a copy nor, of a mapped file, the whole of it is in memory at once."""
    for part in tensor.reshape(-1).split(1 << 22):
        if not torch.isfinite(part).all():
            return False
        release(part)
    return True


def release(tensor: torch.Tensor) -> None:
    """Take a tensor that lies in a mapped weight file out of resident memory; reading it again reads the file.

    Does nothing to tensors in memory of their own, nor where the system does not tell (/proc/self/maps).
    """
    _drop(_mapped_pages(tensor))


def release_after_reading(embedding: torch.nn.Module) -> None:
    """From now on `release` an embedding's table after each lookup, if it lies in a mapped file.

    A lookup touches few of its rows, but brings the pages around each into resident memory.
    """
    pages = _mapped_pages(embedding.weight)  # type: ignore[arg-type]
    if pages is None:
        return
    whole = embedding.forward

    def forward(ids: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = whole(ids)
        _drop(pages)
        return rows

    embedding.forward = forward


def _mapped_pages(tensor: torch.Tensor) -> tuple[int, int] | None:
    """Address and length of the whole pages of a tensor in a mapped weight file; None if it is not in one."""
    if tensor.device.type != "cpu" or not _MAPS.exists():
        return None
    begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
    for line in _MAPS.read_text().splitlines():
        low, high = (int(part, 16) for part in line.split(maxsplit=1)[0].split("-"))
        if low <= begin and end <= high and line.endswith(".safetensors"):
            first, last = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
            return (first, last - first) if first < last else None
    return None


def _drop(pages: tuple[int, int] | None) -> None:
    if pages is not None:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(pages[0]), ctypes.c_size_t(pages[1]), mmap.MADV_DONTNEED)


def cast_parameters(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters only: buffers such as rotary frequencies need their float32.

    What transformers keeps in float32 stays: always, or beside float16 only (T5's output layers would overflow).
    """
    kept = {*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}
    if dtype == torch.float16:
        kept.update(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if kept.intersection(name.split(".")) else dtype)
        parameter.requires_grad_(False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' table of unexpected and missing weights off the terminal: what matters of it is raised."""
    level, bars = messages.get_verbosity(), messages.is_progress_bar_enabled()
    messages.set_verbosity(logging.ERROR)
    messages.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        messages.set_verbosity(level)
        if bars:
            messages.enable_progress_bar()  # type: ignore[no-untyped-call]
