"""One file of an index, opened for reading: checked, then mapped or copied. Mapped files are watched for changes."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["ADVICE", "EVERY", "Mapped", "Watched", "open_regular", "read_arrays"]

ADVICE = "save or copy the index again"
_DTYPES: dict[str, np.dtype[Any]] = {"U8": np.dtype("u1"), "F32": np.dtype("<f4"), "I64": np.dtype("<i8")}
_CHUNK = 1 << 24
EVERY = 0.05
_LONGEST_TABLE = 1 << 20


@dataclass(frozen=True)
class Mapped:
    """The state of a file when it was mapped into memory."""

    path: str
    place: tuple[int, int]  # device and inode
    state: tuple[int, int]  # size and time of change

    def check(self) -> None:
        """Raise ValueError if the file was changed in place.

        A file that was deleted or replaced stays mapped as it was.
        """
        try:
            now = os.stat(self.path)  # noqa: PTH116 - Path.stat would rebuild the path's text each time
        except OSError:
            return
        if (now.st_dev, now.st_ino) == self.place and (now.st_size, now.st_mtime_ns) != self.state:
            raise ValueError(
                f"{self.path}: was changed in place while the index is open; load the index again, with mmap=False "
                "where files are written over"
            )


class Watched:
    """The files that an index maps, and when they were last checked. Threads may share one."""

    def __init__(self, files: Sequence[Mapped] = ()) -> None:
        self.files = tuple(files)
        self._looked = -math.inf

    def check(self, *, seldom: bool = False) -> None:
        """Raise ValueError if a file was changed in place.

        With `seldom`, files are checked at most once in `EVERY` seconds, for calls that are about as fast as a check.
        """
        if not self.files:
            return
        now = monotonic()
        if seldom and now - self._looked < EVERY:
            return
        self._looked = -math.inf  # a check that raises is repeated next time
        for mapped in self.files:
            mapped.check()
        self._looked = now


def open_regular(path: Path) -> int:
    """A descriptor of a regular file, or of a link's target, as version-control tools for data store links.

    OSError if it is not there, ValueError for a device, a pipe or a folder.
    """
    # O_NONBLOCK: opening a pipe would wait for a writer. It has no effect on regular files.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError(f"{path}: not a regular file; {ADVICE}")
    return handle


def read_arrays(
    path: Path, entry: Mapping[str, Any], *, verify: bool, map_it: bool
) -> tuple[dict[str, npt.NDArray[Any]], Mapped | None]:
    """The file's arrays, read-only: views of a memory map with its `Mapped`, or copies with None.

    Raises FileNotFoundError, and ValueError naming the file if it is not what `entry` says.
    """
    handle = open_regular(path)
    try:
        found = os.fstat(handle)
        if found.st_size != entry["bytes"]:
            raise ValueError(f"{path}: damaged, {found.st_size} bytes of {entry['bytes']}; {ADVICE}")
        content: Any
        if map_it and found.st_size:
            content = mmap.mmap(handle, 0, access=mmap.ACCESS_READ)
        else:
            content = _read(handle, found.st_size, path)
        if verify and _digest(handle, content, map_it) != entry["sha256"]:
            raise ValueError(f"{path}: damaged, its checksum differs; {ADVICE}")
    finally:
        os.close(handle)
    watched = Mapped(str(path), (found.st_dev, found.st_ino), (found.st_size, found.st_mtime_ns)) if map_it else None
    return _arrays(path, content, found.st_size), watched


def _read(handle: int, size: int, path: Path) -> npt.NDArray[np.uint8]:
    content = np.empty(size, np.uint8)
    done = 0
    while done < size:
        piece = os.pread(handle, min(_CHUNK, size - done), done)
        if not piece:
            raise ValueError(f"{path}: damaged, it ends after {done} bytes of {size}; {ADVICE}")
        content[done : done + len(piece)] = np.frombuffer(piece, np.uint8)
        done += len(piece)
    return content


def _digest(handle: int, content: Any, mapped: bool) -> str:
    digest = hashlib.sha256()
    if not mapped:
        digest.update(content)
        return digest.hexdigest()
    done = 0  # not through the map: a file that is truncated meanwhile then gives an error, not a signal
    while piece := os.pread(handle, _CHUNK, done):
        digest.update(piece)
        done += len(piece)
    return digest.hexdigest()


def _arrays(path: Path, content: Any, size: int) -> dict[str, npt.NDArray[Any]]:
    """The arrays of a safetensors file; ValueError if it holds anything else."""

    def damaged(what: str) -> ValueError:
        return ValueError(f"{path}: damaged, {what}; {ADVICE}")

    length = int.from_bytes(bytes(content[:8]), "little")
    if size < 8 or length > min(size - 8, _LONGEST_TABLE):
        raise damaged("it has no table of its arrays")
    try:
        table = json.loads(bytes(content[8 : 8 + length]))
        described = {
            name: (_DTYPES[one["dtype"]], tuple(map(_natural, one["shape"])), list(map(_natural, one["data_offsets"])))
            for name, one in table.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(f"the table of its arrays cannot be read ({type(error).__name__}: {error})") from error
    arrays: dict[str, npt.NDArray[Any]] = {}
    start, end = 8 + length, 0
    for name, (dtype, shape, span) in sorted(described.items(), key=lambda one: one[1][2]):
        count = math.prod(shape)
        if len(span) != 2 or span[0] != end or span[1] - span[0] != count * dtype.itemsize:
            raise damaged(f"{name!r} is not where its shape says")
        end = span[1]
        if start + end > size:
            raise damaged(f"{name!r} ends beyond the file")
        array = np.frombuffer(content, dtype, count, start + span[0]) if count else np.empty(0, dtype)
        array = np.require(array, requirements=["A"]).reshape(shape)  # a copy if it is not aligned
        array.flags.writeable = False
        arrays[name] = array
    if start + end != size:
        raise damaged("it holds more than its arrays")
    return arrays


def _natural(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is not a size")
    return value
