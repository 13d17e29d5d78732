"""Reading of weight files: with pread into the process's own memory, and with an error if a file changes meanwhile.

Reading a *mapped* page would raise SIGBUS if the file is truncated meanwhile, and would give another model's weights if
it is rewritten.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

__all__ = ["Arena", "WeightFile", "check_unchanged", "copies_weights", "file_marks"]


def copies_weights() -> bool:
    """Whether FASTRERANK_COPY_WEIGHTS asks that nothing stays in weight files once a model is loaded.

    Raises ValueError for a value that is neither 0 nor 1.

    Example:
        >>> copies_weights()
        False
    """
    value = os.environ.get("FASTRERANK_COPY_WEIGHTS", "0").strip()
    if value not in ("", "0", "1"):
        raise ValueError(f"FASTRERANK_COPY_WEIGHTS must be 0 or 1, got {value!r}")
    return value == "1"


class Arena:
    """A buffer that is read into again and again: new pages for every tensor would cost more than reading it.

    Example:
        >>> arena = Arena(100)
        >>> len(arena.take(70)), len(arena.take(70))
        (70, 70)
    """

    def __init__(self, size: int) -> None:
        self._memory = np.empty(size, np.uint8)
        self._used = 0

    def take(self, size: int) -> npt.NDArray[np.uint8]:
        """Return `size` bytes, valid until `reset`; a request that does not fit gets new memory."""
        begin, end = self._used, self._used + size
        if end > len(self._memory):
            return np.empty(size, np.uint8)
        self._used = -(-end // 64) * 64
        return self._memory[begin:end]

    def reset(self) -> None:
        """Release the whole buffer: later reads overwrite the arrays that were handed out before."""
        self._used = 0


class WeightFile:
    """A file opened for reading that notices when it is changed in place.

    Its size, time of change and inode are noted when it is opened. A file that is *replaced* (written elsewhere and
    renamed, as package managers and huggingface_hub do) stays readable here as it was.

    Example:
        >>> file = WeightFile(Path("model.safetensors"))  # doctest: +SKIP
        >>> file.read(0, 8).tobytes()                     # doctest: +SKIP
    """

    def __init__(self, path: Path) -> None:
        """Open a regular file. Raises FileNotFoundError, another OSError, or ValueError for a device, a pipe, ..."""
        self.path = path
        # Without the flag, opening a pipe would wait for a writer; it changes nothing for a regular file.
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
        self._mapping: mmap.mmap | None = None
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(self._fd)
            self._fd = -1
            raise ValueError(f"{path}: not a regular file, so no weights can be read from it")
        self._noted = status

    @property
    def size(self) -> int:
        """Bytes that the file had when it was opened."""
        return self._noted.st_size

    @property
    def noted(self) -> tuple[int, int, int]:
        """(file descriptor, size, time of change in ns), for readers in C++ that copy the descriptor."""
        self._open()
        return self._fd, self._noted.st_size, self._noted.st_mtime_ns

    def read(self, start: int, length: int, room: Arena | None = None) -> npt.NDArray[np.uint8]:
        """Return bytes [start, start + length) in memory of their own, or in `room`.

        Raises ValueError naming the file if it ends before them.
        """
        fd = self._open()
        content = np.empty(length, np.uint8) if room is None else room.take(length)
        view: memoryview = content.data
        done = 0
        while done < length:
            got = _read_into(fd, view[done:], start + done)
            if got <= 0:
                raise self._changed("it ends before its tensors do")
            done += got
        return content

    def check(self, *, place: bool = False) -> None:
        """Raise ValueError if the file was changed since it was opened; with `place`, also if another has its name."""
        status = os.fstat(self._open())
        if (status.st_size, status.st_mtime_ns) != (self._noted.st_size, self._noted.st_mtime_ns):
            raise self._changed("its size or time of change differs")
        if place:
            try:
                now = self.path.stat()
            except OSError:
                raise self._changed("it is gone") from None
            if (now.st_dev, now.st_ino) != (status.st_dev, status.st_ino):
                raise self._changed("another file has its name")

    def map(self) -> mmap.mmap:
        """Return the file mapped read-only, the same mapping every time. Only for files that nobody changes."""
        if self._mapping is None:
            self._mapping = mmap.mmap(self._open(), 0, access=mmap.ACCESS_READ)
        return self._mapping

    def mapped(self) -> mmap.mmap | None:
        """Return the mapping if one was made."""
        return self._mapping

    def close(self) -> None:
        """Close the file; a mapping ends when the last array that views it is gone."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._mapping = -1, None

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()

    def _open(self) -> int:
        if self._fd < 0:
            raise ValueError(f"the weights of {self.path} are closed")
        return self._fd

    def _changed(self, how: str) -> ValueError:
        return ValueError(
            f"{self.path} was changed while it was read ({how}), so its weights may be two models'; load it again, and "
            "replace a model's files by renaming new ones into their place"
        )


def _read_into(fd: int, target: memoryview, at: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(fd, [target], at)
    content = os.pread(fd, len(target), at)
    target[: len(content)] = content
    return len(content)


def file_marks(paths: Iterable[Path]) -> dict[Path, tuple[int, ...]]:
    """Return size, time of change, device and inode of files, for `check_unchanged`.

    Example:
        >>> check_unchanged(file_marks([Path(__file__)]))
    """
    return {path: _mark(path) for path in paths}


def check_unchanged(marks: Mapping[Path, tuple[int, ...]]) -> None:
    """Raise ValueError naming a weight file that was changed, replaced or removed since `file_marks`."""
    for path, mark in marks.items():
        if _mark(path) != mark:
            raise ValueError(
                f"{path} was changed while it was read, so its weights may be two models'; load it again, and replace "
                "a model's files by renaming new ones into their place"
            )


def _mark(path: Path) -> tuple[int, ...]:
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_size, status.st_mtime_ns, status.st_dev, status.st_ino
