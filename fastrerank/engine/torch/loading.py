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

from fastrerank.checkpoints.checkpoint import Checkpoint, Tensors, position_limit, untrained
from fastrerank.checkpoints.tensors import find_weight_files
from fastrerank.checkpoints.weight_files import check_unchanged, copies_weights, file_marks
from fastrerank.engine.expected_weights import check_unexpected

__all__ = [
    "cast_parameters",
    "check_files",
    "leave_files",
    "load_model",
    "one_error",
    "quiet",
    "release",
    "release_after_reading",
]

# Largest model, in bytes, whose weights are copied out of their mapped files when it is loaded.
_COPIED = 64 << 20
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
    marks = check_files(checkpoint)
    # Heads keep the precision that they are stored in, so half precision comes after loading.
    stored = torch.float32 if dtype == "float32" else "auto"
    # torch's own attention has no soft capping, and some releases of transformers use it for such models all the same.
    exact: dict[str, Any] = {"attn_implementation": "eager"} if checkpoint.config.get("attn_logit_softcapping") else {}
    if layers is not None:
        exact["config"] = _shortened(checkpoint, layers)
    with quiet(), one_error(path):
        model, info = factory.from_pretrained(
            str(path),
            dtype=stored,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=checkpoint.trust_remote_code,
            ignore_mismatched_sizes=True,
            **exact,
        )
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
    if layers is None:
        check_unexpected(path, info["unexpected_keys"], prefix, task=task)
    kind = checkpoint.config.get("position_embedding_type") or "absolute"
    if kind.startswith("relative") and not any(hasattr(module, "distance_embedding") for module in model.modules()):
        raise ValueError(
            f"{path}: position_embedding_type = {kind!r} in config.json is not what transformers "
            f"{transformers.__version__} computes for {type(model).__name__}: its scores would be wrong"
        )
    for name, parameter in model.named_parameters():
        if name not in missing and not _finite(parameter.detach()):
            raise ValueError(f"{path}: weight of {name} is NaN or infinite: the checkpoint is damaged")
    check_unchanged(marks)
    leave_files(model)
    return model.eval()


def check_files(checkpoint: Checkpoint) -> dict[Path, tuple[int, ...]]:
    """Check the weight files before transformers reads them; return what `check_unchanged` compares afterwards.

    Raises FileNotFoundError, or ValueError naming a damaged file or a size in config.json that no tensor has.
    """
    marks = file_marks(find_weight_files(checkpoint.transformer_path))
    with checkpoint.tensors() as tensors:
        _check_sizes(checkpoint, tensors)
    return marks


def _check_sizes(checkpoint: Checkpoint, tensors: Tensors) -> None:
    """Check config.json's sizes against the stored tensors, before transformers allocates what config.json says.

    Raises ValueError for a width or a vocabulary that no tensor has, and for more layers than there are tensors. The
    file's shapes are the only sizes that somebody has paid for; quantised files pack theirs and are left to the loader.
    """
    config = checkpoint.config
    if config.get("quantization_config") or not tensors:
        return
    largest = max(max(tensor.shape, default=1) for tensor in tensors.values())
    sizes = ["hidden_size", "intermediate_size", "vocab_size", "d_model", "d_ff", "embedding_size", "type_vocab_size"]
    if position_limit(config) is not None:
        sizes.append("max_position_embeddings")
    for text in (config, *(value for value in config.values() if isinstance(value, dict) and "model_type" in value)):
        for key in sizes:
            value = text.get(key)
            if isinstance(value, int) and value > largest:
                raise ValueError(
                    f"{checkpoint.transformer_path}: {key} = {value} in config.json, but the largest size of a stored "
                    f"tensor is {largest}: the two are not one checkpoint's"
                )
        for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
            value = text.get(key)
            if isinstance(value, int) and not _shares_layers(text) and value > len(tensors):
                raise ValueError(
                    f"{checkpoint.transformer_path}: {key} = {value} in config.json, but there are only {len(tensors)} "
                    "stored tensors: the two are not one checkpoint's"
                )


def _shares_layers(config: Any) -> bool:
    return str(config.get("model_type")) == "albert"


def leave_files(model: Any) -> None:
    """Copy parameters that lie in mapped weight files into memory, if they are few bytes or the environment asks.

    What stays in a mapped file ends the process when somebody truncates it (SIGBUS). Large models stay: they may be
    larger than the memory.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.device.type == "cpu"]
    size = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    if size > _COPIED and not copies_weights():
        return
    files = _weight_files_in_memory()
    for parameter in parameters:
        if any(low <= parameter.data_ptr() < high for low, high in files):
            parameter.data = parameter.data.clone()


def _weight_files_in_memory() -> list[tuple[int, int]]:
    """Addresses [low, high) of this process's mapped weight files; [] where the system does not tell."""
    if not _MAPS.exists():
        return []
    lines = [line for line in _MAPS.read_text().splitlines() if line.endswith(".safetensors")]
    return [(int(low, 16), int(high, 16)) for low, high in (line.split(maxsplit=1)[0].split("-") for line in lines)]


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
    if tensor.device.type != "cpu":
        return None
    begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
    for low, high in _weight_files_in_memory():
        if low <= begin and end <= high:
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
def one_error(path: Path) -> Iterator[None]:
    """Turn what transformers raises for a checkpoint that it cannot load into a ValueError of one line that names it.

    Missing files, packages and memory keep their own errors.
    """
    try:
        yield
    except (OSError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or "no reason given"
        if len(reason) > 300:
            reason = reason[:297] + "..."
        raise ValueError(f"{path}: transformers cannot load it ({type(error).__name__}: {reason})") from error


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
