"""An index as one folder: safetensors files, and a header that names them, with their checksums.

    index.json                    what the index is; replaced by a rename, which is the moment a save happens
    vectors-<token>.safetensors   a shard's packed vectors: "data", and "scale" for int8
    items-<token>.safetensors     "anchors"; where there are any "ids"; of items' texts "text" (UTF-8) and "text_ends",
                                  where each ends; of anchor queries "query" and "query_ends"

Files are never changed: a save writes new ones, renames the header over the old one, and then deletes the files that
it does not name. Whenever a crash comes, the header names whole files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastrerank.tensors import Tensors

__all__ = ["HEADER", "commit", "files_of", "is_ours", "open_file", "read_header", "sync_folder", "write_file"]

HEADER = "index.json"
FORMAT, VERSION = "fastrerank-cur", 2
_OURS = re.compile(r"(vectors|items)-[0-9a-f]{16}\.safetensors|index\.json\.[0-9a-f]{16}\.new")
_KINDS = {"uint8": "U8", "float32": "F32", "int64": "I64"}
_CHUNK = 1 << 24


def write_file(folder: Path, stem: str, arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, Any]:
    """Write a safetensors file that no header names yet, to the disk; returns its entry for the header.

    The first array begins at a multiple of 64 bytes, so that it can be read in cache lines from a memory map.
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
    """Make `header`, whose files are written, the folder's index, and delete the files that it does not name."""
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
    named = {entry["name"] for entry in files_of(body)}
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name) and path.name not in named:
            path.unlink(missing_ok=True)


def is_ours(name: str) -> bool:
    """Whether a file of this name in an index's folder is one that saving or building made."""
    return name in (HEADER, "build") or _OURS.fullmatch(name) is not None


def sync_folder(folder: Path) -> None:
    """Have the folder's entries on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_header(folder: Path) -> dict[str, Any]:
    """The folder's header. FileNotFoundError where there is no index, ValueError naming a file that is not one."""
    path = folder / HEADER
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"{folder} holds no index: there is no {HEADER}; CURIndex.save writes one") from error
    except ValueError as error:
        raise ValueError(f"{path}: damaged header ({error}); save or copy the index again") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise ValueError(f"{path}: not the header of a CUR index")
    if body.get("version") != VERSION:
        raise ValueError(f"{path}: version {body.get('version')!r}, but this fastrerank reads version {VERSION}")
    stated = body.pop("sha256", None)
    if stated != _digest(body):
        raise ValueError(f"{path}: damaged header (its checksum differs); save or copy the index again")
    return body


def files_of(header: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries of all files that a header names."""
    return [*header["shards"], header["items"]]


def open_file(folder: Path, entry: Mapping[str, Any], *, verify: bool, mmap: bool) -> dict[str, npt.NDArray[Any]]:
    """A file's arrays: read-only views of a memory map, or copies. ValueError naming the file if it is damaged."""
    path = folder / str(entry["name"])
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise ValueError(f"{path}: named by {HEADER}, but does not exist; save or copy the index again") from error
    if size != entry["bytes"]:
        raise ValueError(f"{path}: damaged, {size} bytes of {entry['bytes']}; save or copy the index again")
    if verify:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while piece := file.read(_CHUNK):
                digest.update(piece)
        if digest.hexdigest() != entry["sha256"]:
            raise ValueError(f"{path}: damaged, its checksum differs; save or copy the index again")
    arrays = {name: tensor.raw for name, tensor in Tensors.of_file(path).items()}
    return arrays if mmap else {name: array.copy() for name, array in arrays.items()}


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
