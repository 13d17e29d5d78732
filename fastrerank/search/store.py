"""An index as one folder: safetensors files, and a header that names them, with their checksums.

    index.json                    what the index is; replaced by a rename, which is the moment a save happens
    vectors-<token>.safetensors   a shard's packed vectors: "data", and "scale" for int8
    items-<token>.safetensors     "anchors"; optional: "ids", the items' "text" (UTF-8) with "text_ends" (where each
                                  ends), and the anchor queries' "query" with "query_ends"

Files are never changed. A save writes new ones, renames its header over the old one, and then deletes the files that
the header does not name. So the header names complete files even after a crash. A save that fails deletes what it
wrote; the files of a killed save are deleted by the next one before it writes. Savers of a folder wait for one another.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastrerank.search.files import ADVICE, Mapped, open_regular, read_arrays

try:
    import fcntl
except ImportError:  # no such locks on this platform
    fcntl = None  # type: ignore[assignment]

__all__ = ["HEADER", "commit", "files_of", "is_ours", "open_file", "read_header", "saving", "sync_folder", "write_file"]

HEADER = "index.json"
FORMAT, VERSION = "fastrerank-cur", 2
_OURS = re.compile(r"(vectors|items)-[0-9a-f]{16}\.safetensors|index\.json\.[0-9a-f]{16}\.new")
_KINDS = {"uint8": "U8", "float32": "F32", "int64": "I64"}
_CHUNK = 1 << 24
_LONGEST_HEADER = 1 << 26


@contextlib.contextmanager
def saving(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder`, which is created if missing, for one save; a save that fails leaves no files.

    Files that no header names are deleted first: a killed save left them, and this one may need their space.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # some network file systems have no locks
                fcntl.flock(handle, fcntl.LOCK_EX)
        with contextlib.suppress(ValueError):  # a damaged header names nothing that could be read
            _clear(folder, _named(folder))
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError, ValueError):
                _clear(folder, _named(folder))
            if made:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise
    finally:
        if fcntl is not None:  # closing is not enough: a process forked in the meantime holds the same lock
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


def _named(folder: Path) -> set[str]:
    """The files that the folder's header names, if there is one."""
    try:
        return {entry["name"] for entry in files_of(read_header(folder))}
    except FileNotFoundError:
        return set()


def _clear(folder: Path, named: set[str]) -> None:
    """Delete the files of saves in the folder, except those in `named`."""
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name) and path.name not in named:
            path.unlink(missing_ok=True)


def write_file(folder: Path, stem: str, arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, Any]:
    """Write and sync a safetensors file that no header names yet; return its entry for the header.

    The first array begins at a multiple of 64 bytes, so that a memory map of it is aligned to cache lines.
    """
    table: dict[str, Any] = {}
    end = 0
    for name, array in arrays.items():
        begin, end = end, end + array.nbytes
        table[name] = {"dtype": _KINDS[array.dtype.name], "shape": array.shape, "data_offsets": [begin, end]}
    head = json.dumps(table).encode()
    head += b" " * (-(8 + len(head)) % 64)
    name = f"{stem}-{secrets.token_hex(8)}.safetensors"
    digest, size = hashlib.sha256(), 0
    with (folder / name).open("xb") as file:
        for piece in (len(head).to_bytes(8, "little"), head, *(_pieces(arrays))):
            file.write(piece)
            digest.update(piece)
            size += len(piece)
        file.flush()
        os.fsync(file.fileno())
    return {"name": name, "bytes": size, "sha256": digest.hexdigest()}


def _pieces(arrays: Mapping[str, npt.NDArray[Any]]) -> Any:
    for array in arrays.values():
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        for begin in range(0, len(flat), _CHUNK):
            yield flat[begin : begin + _CHUNK]


def commit(folder: Path, header: Mapping[str, Any]) -> None:
    """Make `header` the folder's index (its files are written), and delete the files that it does not name."""
    body = {"format": FORMAT, "version": VERSION, **header}
    body["sha256"] = _digest(body)
    aside = folder / f"{HEADER}.{secrets.token_hex(8)}.new"
    with aside.open("x", encoding="utf-8") as file:
        json.dump(body, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)
    aside.replace(folder / HEADER)
    sync_folder(folder)
    _clear(folder, {entry["name"] for entry in files_of(body)})


def is_ours(name: str) -> bool:
    """Whether saving or building an index makes files of this name."""
    return name in (HEADER, "build") or _OURS.fullmatch(name) is not None


def sync_folder(folder: Path) -> None:
    """Sync the folder's entries to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_header(folder: Path) -> dict[str, Any]:
    """The folder's header. FileNotFoundError where there is no index, ValueError naming a file that is not one."""
    path = folder / HEADER
    try:
        handle = open_regular(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"{folder} holds no index: there is no {HEADER}; CURIndex.save writes one") from error
    with os.fdopen(handle, "rb") as file:
        content = file.read(_LONGEST_HEADER + 1)
    try:
        if len(content) > _LONGEST_HEADER:
            raise ValueError(f"longer than {_LONGEST_HEADER} bytes")
        body = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged header ({error}); {ADVICE}") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise ValueError(f"{path}: not the header of a CUR index")
    if body.get("version") != VERSION:
        raise ValueError(f"{path}: version {body.get('version')!r}, but this fastrerank reads version {VERSION}")
    stated = body.pop("sha256", None)
    if stated != _digest(body):
        raise ValueError(f"{path}: damaged header (its checksum differs); {ADVICE}")
    _check_header(path, body)
    return body


def _check_header(path: Path, body: Mapping[str, Any]) -> None:
    """Raise ValueError naming the entry of the header whose value no save writes."""

    def count(value: Any, least: int = 0) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    def number(value: Any, least: float, most: float = math.inf) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most < math.inf

    def entry(value: Any, stem: str) -> bool:
        return (
            isinstance(value, dict)
            and isinstance(value.get("name"), str)
            and _OURS.fullmatch(value["name"]) is not None  # so it is a name in this folder
            and value["name"].startswith(stem)
            and count(value.get("bytes"))
            and isinstance(value.get("sha256"), str)
            and (stem == "items" or count(value.get("count")))
        )

    shards, settings, largest = body.get("shards"), body.get("settings"), 1e300
    valid = {
        "count": count(body.get("count")),
        "width": count(body.get("width"), 1),
        "storage": body.get("storage") in ("float32", "bfloat16", "int8"),
        "kind": body.get("kind") in ("scores", "vectors"),
        "spread": number(body.get("spread"), 5e-324, largest),
        "following": count(body.get("following")),
        "scorer": body.get("scorer") is None or isinstance(body["scorer"], dict),
        "settings": isinstance(settings, dict)
        and set(settings) == {"rounds", "first", "ridge"}
        and count(settings["rounds"], 1)
        and number(settings["first"], 0, 1)
        and number(settings["ridge"], 0, largest),
        "shards": isinstance(shards, list) and bool(shards) and all(entry(shard, "vectors") for shard in shards),
        "items": entry(body.get("items"), "items"),
    }
    for name, fits in valid.items():
        if not fits:
            said = json.dumps(body.get(name))
            said = said if len(said) < 200 else said[:200] + "..."
            raise ValueError(f"{path}: {name} is not what a save writes, got {said}; build the index anew")


def files_of(header: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries of all files that a header names."""
    return [*header["shards"], header["items"]]


def open_file(
    folder: Path, entry: Mapping[str, Any], *, verify: bool, mmap: bool
) -> tuple[dict[str, npt.NDArray[Any]], Mapped | None]:
    """A file's arrays, read-only: views of a memory map with its `Mapped`, or copies with None.

    Raises ValueError naming the file if it is damaged or missing.
    """
    path = folder / str(entry["name"])
    try:
        return read_arrays(path, entry, verify=verify, map_it=mmap)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: named by {HEADER}, but does not exist; {ADVICE}") from error


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
