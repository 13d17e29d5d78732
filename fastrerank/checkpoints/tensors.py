"""Weight files as read-only arrays: safetensors, or PyTorch pickles through torch.

Engines read what they pack or keep into their own memory, see `weight_files`. Only `Tensor.raw` maps a file.
"""

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

from fastrerank.checkpoints.config_values import shown
from fastrerank.checkpoints.weight_files import Arena, WeightFile

__all__ = ["Span", "Tensor", "Tensors", "find_weight_files"]
from fastrerank.runtime.naming import shortened

_DTYPES: dict[str, str] = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "|i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "|u1",
    "BOOL": "|b1",
}
# Types that numpy does not have, by their size in bits.
_OTHER_BITS = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "C64": 64,
}
_SAFETENSORS = "model.safetensors"
_PICKLE = "pytorch_model.bin"
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class Span:
    """Bytes [start, end) of a file."""

    file: WeightFile
    start: int
    end: int


@dataclass(frozen=True)
class Tensor:
    """One stored tensor.

    Attributes:
        name: its name in the file.
        dtype: the safetensors name of its type: "F32", "F16", "BF16", "I64", ...
        shape: its shape.
        source: where its values are: a `Span` of a file, or an array in memory.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: Span | npt.NDArray[Any]

    @property
    def raw(self) -> npt.NDArray[Any]:
        """Read-only array of that shape, a view of the file's mapping; BF16 as uint16 (upper halves of float32).

        Only for files that nobody changes meanwhile: reading a page that a truncated file no longer has ends the
        process. `read` does not.
        """
        if not isinstance(self.source, Span):
            return self.source
        count, dtype = self._layout(self.source)
        mapping = self.source.file.map()
        values = np.frombuffer(mapping, dtype, count, self.source.start) if count else np.empty(0, dtype)
        return self._shaped(values)

    def read(self, room: Arena | None = None) -> npt.NDArray[Any]:
        """Return what `raw` returns, read from the file into memory of its own, or in `room`.

        Raises ValueError naming the file if it was changed since it was opened, or is closed.
        """
        if not isinstance(self.source, Span):
            return self.source
        _, dtype = self._layout(self.source)
        content = self.source.file.read(self.source.start, self.source.end - self.source.start, room)
        return self._shaped(content.view(dtype))

    def float32(self) -> npt.NDArray[np.float32]:
        """The values as C-contiguous float32 in memory of their own.

        Example:
            >>> Tensor("bias", "BF16", (2,), np.array([0x3F80, 0xC000], np.uint16)).float32().tolist()
            [1.0, -2.0]

        Raises ValueError for a type that numpy cannot convert (8-bit floats), and as `read` does.
        """
        if self.dtype not in _DTYPES:
            raise ValueError(f"tensor {self.name!r} is stored as {self.dtype}; supported: {', '.join(_DTYPES)}")
        values = self.read()
        if self.dtype == "BF16":
            bits = values.astype(np.uint32)
            bits <<= np.uint32(16)
            return bits.view(np.float32)
        with np.errstate(over="ignore"):  # float64 beyond the range of float32 becomes infinite; packing it raises
            return np.require(values, np.float32, ["C", "A"])

    def _layout(self, span: Span) -> tuple[int, np.dtype[Any]]:
        # Types that numpy does not have (8-bit floats and smaller) are returned as bytes, flat if they are packed.
        dtype = np.dtype(_DTYPES.get(self.dtype, "|u1"))
        return (math.prod(self.shape) if self.dtype in _DTYPES else span.end - span.start), dtype

    def _shaped(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if values.size == math.prod(self.shape):
            values = values.reshape(self.shape)
        values.flags.writeable = False
        return values


class Tensors(Mapping[str, Tensor]):
    """The tensors of a folder by name: nothing is read until a tensor's values are.

    A context manager. Arrays taken from it stay valid after `close`.

    Example:
        >>> with Tensors.open(Path("path/to/model")) as tensors:  # doctest: +SKIP
        ...     weight = tensors["classifier.weight"].float32()
    """

    def __init__(self, tensors: dict[str, Tensor], files: list[WeightFile], source: Path) -> None:
        self._tensors: dict[str, Tensor] | None = tensors
        self._files = files
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
        files = _weight_files(folder)
        if not files:
            raise FileNotFoundError(
                f"{folder} holds no weights: expected {_SAFETENSORS}, {_SAFETENSORS}.index.json, {_PICKLE} or "
                f"{_PICKLE}.index.json"
            )
        tensors: dict[str, Tensor] = {}
        opened: list[WeightFile] = []
        for file, promised in files.items():
            if not file.is_file():
                raise FileNotFoundError(f"{file} is named by the checkpoint's index but does not exist")
            found = _load_pickle(file) if file.suffix != ".safetensors" else _open_safetensors(file, opened)
            for name in found.keys() & tensors.keys():
                raise ValueError(
                    f"{file}: the tensor {shown(name)} is also in another shard, so it is not clear which counts"
                )
            tensors |= found
            for name in promised:
                if name not in found:
                    raise ValueError(f"{file}: lacks the tensor {shown(name)}, which the index says is in it")
        return cls(tensors, opened, folder)

    @classmethod
    def of_file(cls, file: Path) -> Tensors:
        """Open one safetensors file. Raises FileNotFoundError, and ValueError naming it if it is damaged."""
        opened: list[WeightFile] = []
        return cls(_open_safetensors(file, opened), opened, file)

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
        source = self._opened()[name].source
        mapping = source.file.mapped() if isinstance(source, Span) else None
        if mapping is None or not isinstance(source, Span) or not hasattr(mmap, "MADV_DONTNEED"):
            return
        first = -(-source.start // mmap.PAGESIZE) * mmap.PAGESIZE
        last = source.end // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:
            mapping.madvise(mmap.MADV_DONTNEED, first, last - first)

    def check(self) -> None:
        """Raise ValueError naming a file that was changed or replaced since it was opened.

        Call it when everything is read: values from before and after a change belong to two different models.
        """
        for file in self._files:
            file.check(place=True)

    def close(self) -> None:
        """Close the files. A mapping is freed with the last array that views it."""
        self._tensors = None
        for file in self._files:
            file.close()
        self._files = []

    def _opened(self) -> dict[str, Tensor]:
        if self._tensors is None:
            raise ValueError(f"the weights of {self._source} are closed")
        return self._tensors


def find_weight_files(folder: Path) -> list[Path]:
    """Weight files of a checkpoint folder in the order of transformers' preference; [] if it holds none."""
    return list(_weight_files(folder))


def _weight_files(folder: Path) -> dict[Path, list[str]]:
    """What `find_weight_files` returns, and the tensors that an index of shards says are in each file."""
    for name in (_SAFETENSORS, _PICKLE):
        if (folder / name).is_file():
            return {folder / name: []}
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _shards(index)
    return {}


def _shards(index: Path) -> dict[Path, list[str]]:
    shards: dict[str, list[str]] = {}
    for tensor, name in _weight_map(index).items():
        shards.setdefault(name, []).append(tensor)
    return {index.parent / name: shards[name] for name in sorted(shards)}


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor by an index of shards."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = set(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index}: malformed index of weight shards ({type(error).__name__}: {error})") from error
    if not names or not all(isinstance(name, str) and name == Path(name).name for name in names):
        raise ValueError(f"{index}: weight_map must map tensor names to files of the same folder")
    return dict(weight_map)


def _open_safetensors(path: Path, opened: list[WeightFile]) -> dict[str, Tensor]:
    """The tensors of one file, which is appended to `opened`."""
    file = WeightFile(path)
    opened.append(file)
    try:
        base, header = _read_header(file)
        return _tensors_of(file, base, header)
    except (ValueError, RecursionError) as error:
        file.close()
        reason = "its header is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise ValueError(
            f"{path}: damaged or truncated safetensors file ({reason}); download or copy it again"
        ) from error


def _read_header(file: WeightFile) -> tuple[int, dict[str, Any]]:
    """Where the tensors' bytes begin, and the entries of the header."""
    if file.size < 8:
        raise ValueError("it is too small for a header")
    length = int.from_bytes(file.read(0, 8).tobytes(), "little")
    if length > min(file.size - 8, _MAX_HEADER):
        raise ValueError(f"its header of {length} bytes does not fit into {file.size}")
    text = file.read(8, length).tobytes().decode("utf-8")
    if not text.startswith("{"):
        raise ValueError("its header is no JSON object")
    return 8 + length, json.loads(text, object_pairs_hook=_without_repeats)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its header names something twice")
    return found


def _tensors_of(file: WeightFile, base: int, header: dict[str, Any]) -> dict[str, Tensor]:
    """Check that the tensors tile the file exactly; no values are read."""
    tensors: dict[str, Tensor] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, (begin, end) = _entry(name, entry)
        spans.append((begin, end, name))
        tensors[name] = Tensor(name, dtype, shape, Span(file, base + begin, base + end))
    reached = 0
    for begin, end, name in sorted(spans):
        if begin != reached:
            raise ValueError(f"the bytes of tensor {shown(name)} do not begin where the ones before end")
        reached = end
    if base + reached != file.size:
        raise ValueError(f"its tensors need {base + reached} bytes, the file has {file.size}")
    return tensors


def _entry(name: str, entry: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """Type, shape and byte range of a tensor by the header."""
    wrong = ValueError(f"the entry of tensor {shown(name)} is malformed")
    if not isinstance(entry, dict):
        raise wrong
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not (isinstance(dtype, str) and isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2):
        raise wrong
    if not all(type(size) is int and 0 <= size < 1 << 62 for size in (*shape, *offsets)):
        raise wrong
    if dtype not in _DTYPES and dtype not in _OTHER_BITS:
        raise ValueError(f"tensor {shown(name)} has the unknown type {shown(dtype)}")
    bits = np.dtype(_DTYPES[dtype]).itemsize * 8 if dtype in _DTYPES else _OTHER_BITS[dtype]
    begin, end = offsets
    if begin > end or math.prod(shape) * bits != (end - begin) * 8:
        raise ValueError(
            f"tensor {shown(name)} of shape {shown(shape)} does not take the {end - begin} bytes that it has"
        )
    return dtype, tuple(shape), (begin, end)


def _load_pickle(path: Path) -> dict[str, Tensor]:
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{path} is a PyTorch pickle, which only torch can read: pip install torch, "
            "or convert the checkpoint to model.safetensors"
        ) from error
    names = {
        torch.float64: "F64",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.int64: "I64",
        torch.int32: "I32",
        torch.int16: "I16",
        torch.int8: "I8",
        torch.uint8: "U8",
        torch.bool: "BOOL",
    }
    try:
        # weights_only: nothing but tensors is ever unpickled, so the file cannot run code.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises UnpicklingError, RuntimeError, EOFError, ... for a damaged file
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(f"{path}: not a readable PyTorch weight file ({reason})") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path}: expected a dict of tensors, found {type(state).__name__}")
    tensors = {}
    for name, value in state.items():
        if not isinstance(name, str):
            raise ValueError(f"{path}: expected a dict of tensors by name, found the key {name!r}")
        if not isinstance(value, torch.Tensor) or value.dtype not in names:
            kind = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
            raise ValueError(f"{path}: entry {name!r} is {kind}; expected dense tensors of a common type")
        value = value.detach().contiguous()
        bits = value.view(torch.int16) if value.dtype == torch.bfloat16 else value
        raw = bits.numpy().view(_DTYPES[names[value.dtype]])
        raw.flags.writeable = False
        tensors[name] = Tensor(name, names[value.dtype], tuple(value.shape), raw)
    return tensors
