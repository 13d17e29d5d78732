"""Weight files as read-only arrays: memory-mapped safetensors, or PyTorch pickles through torch."""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastrerank.naming import shortened

_DTYPES: dict[str, str] = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip
_SAFETENSORS = "model.safetensors"
_PICKLE = "pytorch_model.bin"


@dataclass(frozen=True)
class Tensor:
    """One stored tensor.

    Attributes:
        name: its name in the file.
        dtype: the safetensors name of its type: "F32", "F16", "BF16", "I64", ...
        shape: its shape.
        raw: read-only array of that shape, a view of the file's mapping; BF16 as uint16 (the upper halves of float32).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    raw: npt.NDArray[Any]

    def float32(self) -> npt.NDArray[np.float32]:
        """The values as C-contiguous float32: `raw` itself where it is that already, else a new array.

        Example:
            >>> Tensor("bias", "BF16", (2,), np.array([0x3F80, 0xC000], np.uint16)).float32().tolist()
            [1.0, -2.0]

        Raises ValueError for a type that numpy cannot convert (8-bit floats).
        """
        if self.dtype not in _DTYPES:
            raise ValueError(f"tensor {self.name!r} is stored as {self.dtype}; supported: {', '.join(_DTYPES)}")
        if self.dtype == "BF16":
            bits = self.raw.astype(np.uint32)
            bits <<= np.uint32(16)
            return bits.view(np.float32)
        # A view at an odd offset of the file is copied: kernels load whole aligned floats.
        return np.require(self.raw, np.float32, ["C", "A"])


class Tensors(Mapping[str, Tensor]):
    """The tensors of a folder by name, memory-mapped: nothing is read until a tensor's values are.

    A context manager. Arrays taken from it stay valid after `close`: each keeps its file's mapping alive.

    Example:
        >>> with Tensors.open(Path("path/to/model")) as tensors:  # doctest: +SKIP
        ...     weight = tensors["classifier.weight"].float32()
    """

    def __init__(self, tensors: dict[str, Tensor], spans: dict[str, tuple[mmap.mmap, int, int]], source: Path) -> None:
        self._tensors: dict[str, Tensor] | None = tensors
        self._spans = spans  # name -> mapping and the tensor's byte range in it
        self._source = source

    def __repr__(self) -> str:
        held = "closed" if self._tensors is None else f"{len(self._tensors)} tensors"
        return f"Tensors({shortened(str(self._source))!r}, {held})"

    @classmethod
    def open(cls, folder: Path) -> Tensors:
        """Open model.safetensors, its shards, or pytorch_model.bin (and shards), whichever comes first in `folder`.

        Raises FileNotFoundError if there is none or a shard is missing, ValueError naming a damaged file, and
        ImportError if only a PyTorch pickle is there and torch is not installed.
        """
        files = find_weight_files(folder)
        if not files:
            raise FileNotFoundError(
                f"{folder} holds no weights: expected {_SAFETENSORS}, {_SAFETENSORS}.index.json, {_PICKLE} or "
                f"{_PICKLE}.index.json"
            )
        tensors: dict[str, Tensor] = {}
        spans: dict[str, tuple[mmap.mmap, int, int]] = {}
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(f"{file} is named by the checkpoint's index but does not exist")
            if file.suffix == ".safetensors":
                _map_safetensors(file, tensors, spans)
            else:
                _load_pickle(file, tensors)
        return cls(tensors, spans, folder)

    @classmethod
    def of_file(cls, file: Path) -> Tensors:
        """Open one safetensors file. Raises FileNotFoundError, and ValueError naming it if it is damaged."""
        tensors: dict[str, Tensor] = {}
        spans: dict[str, tuple[mmap.mmap, int, int]] = {}
        _map_safetensors(file, tensors, spans)
        return cls(tensors, spans, file)

    def __getitem__(self, name: str) -> Tensor:
        return self._opened()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._opened())

    def __len__(self) -> int:
        return len(self._opened())

    def __enter__(self) -> Tensors:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def drop(self, name: str) -> None:
        """Tell the kernel that the pages of this tensor are not needed now (madvise, whole pages inside it).

        They leave the process's resident memory; reading the tensor again reads the file again. Does nothing where
        the platform has no madvise or the weights came from a pickle. KeyError for an unknown name.
        """
        self._opened()[name]
        if name not in self._spans or not hasattr(mmap, "MADV_DONTNEED"):
            return
        mapping, start, end = self._spans[name]
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        last = end // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:
            mapping.madvise(mmap.MADV_DONTNEED, first, last - first)

    def close(self) -> None:
        """Let go of the files. A mapping ends when the last array that views it is gone."""
        self._tensors = None
        self._spans = {}

    def _opened(self) -> dict[str, Tensor]:
        if self._tensors is None:
            raise ValueError(f"the weights of {self._source} are closed")
        return self._tensors


def find_weight_files(folder: Path) -> list[Path]:
    """Weight files of a checkpoint folder in the order of transformers' preference; [] if it holds none."""
    for name in (_SAFETENSORS, _PICKLE):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _shards(index)
    return []


def _shards(index: Path) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: malformed index of weight shards ({type(error).__name__}: {error})") from error
    if not names or not all(isinstance(name, str) and name == Path(name).name for name in names):
        raise ValueError(f"{index}: weight_map must map tensor names to files of the same folder")
    return [index.parent / name for name in names]


def _map_safetensors(path: Path, tensors: dict[str, Tensor], spans: dict[str, tuple[mmap.mmap, int, int]]) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        # Checks the header, that the tensors tile the file exactly, and the file's length; reads no values.
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as error:
        raise ValueError(
            f"{path}: damaged or truncated safetensors file ({error}); download or copy it again"
        ) from error
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    base = 8 + int.from_bytes(mapping[:8], "little")
    header: dict[str, Any] = json.loads(mapping[8:base])
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = (base + offset for offset in entry["data_offsets"])
        shape = tuple(entry["shape"])
        # Types that numpy lacks (8-bit floats and smaller) are handed out as their bytes, flat if they are packed.
        dtype = np.dtype(_DTYPES.get(entry["dtype"], "|u1"))
        count = math.prod(shape) if entry["dtype"] in _DTYPES else end - start
        raw = np.frombuffer(mapping, dtype, count, start) if count else np.empty(0, dtype)
        raw = raw.reshape(shape) if count == math.prod(shape) else raw
        raw.flags.writeable = False
        tensors[name] = Tensor(name, entry["dtype"], shape, raw)
        spans[name] = (mapping, start, end)


def _load_pickle(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{path} is a PyTorch pickle, which only torch can read: pip install torch, "
            "or convert the checkpoint to model.safetensors"
        ) from error
    names = {
        torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
        torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
        torch.bool: "BOOL",
    }  # fmt: skip
    try:
        # weights_only: nothing but tensors is ever unpickled, so the file cannot run code.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises UnpicklingError, RuntimeError, EOFError, ... for a damaged file
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(f"{path}: not a readable PyTorch weight file ({reason})") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path}: expected a dict of tensors, found {type(state).__name__}")
    for name, value in state.items():
        if not isinstance(value, torch.Tensor) or value.dtype not in names:
            kind = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
            raise ValueError(f"{path}: entry {name!r} is {kind}; expected dense tensors of a common type")
        value = value.detach().contiguous()
        bits = value.view(torch.int16) if value.dtype == torch.bfloat16 else value
        raw = bits.numpy().view(_DTYPES[names[value.dtype]])
        raw.flags.writeable = False
        tensors[name] = Tensor(name, names[value.dtype], tuple(value.shape), raw)
