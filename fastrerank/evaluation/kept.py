"""Finished systems of a comparison, kept in a folder until all are finished, so that a comparison can resume."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastrerank.data.datasets import JudgedQuery
from fastrerank.evaluation.systems import System, file_name
from fastrerank.evaluation.worker import Outcome
from fastrerank.runtime.fingerprint import fingerprint
from fastrerank.runtime.version import VERSION

__all__ = ["Kept"]


class Kept:
    """A folder of outcomes, one file for each system, that belong to these queries and settings.

    A file is used only for the same system, options, texts and release, and only while the files of the checkpoint and
    those that options name are unchanged. A hub id stands for its commit at the time.

    Example:
        >>> kept = Kept("out/unfinished", queries, top_k=None, warmup=1)                 # doctest: +SKIP
        >>> kept.read(system) is None                                                    # doctest: +SKIP
        True
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        datasets: Mapping[str, Sequence[JudgedQuery]],
        *,
        top_k: int | None,
        warmup: int,
    ) -> None:
        self.folder = Path(folder)
        self._names = list(datasets)
        digest = hashlib.sha256(json.dumps([VERSION, top_k, warmup]).encode())
        for name, queries in datasets.items():
            for query in queries:
                row = [name, query.qid, query.query, [[c.docid, c.text] for c in query.candidates]]
                digest.update(json.dumps(row).encode())
        self._asked = digest.hexdigest()

    def read(self, system: System) -> Outcome | None:
        """Return the system's outcome; None where no file matches it."""
        try:
            found = json.loads(self._path(system).read_text("utf-8"))
            if found["key"] != self._key(system, online=True) or list(found["runs"]) != self._names:
                return None
            runs = {
                name: ({qid: [(docid, score) for docid, score in hits] for qid, hits in run.items()}, np.array(seconds))
                for name, (run, seconds) in found["runs"].items()
            }
            return Outcome(runs, found["load_seconds"], found["peak"], found["peak_gpu"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None  # the file is missing or incomplete: the system runs again

    def write(self, system: System, outcome: Outcome) -> None:
        """Write the outcome of a system that did not fail, atomically."""
        self.folder.mkdir(parents=True, exist_ok=True)
        row: dict[str, Any] = {
            "key": self._key(system, online=False),
            "load_seconds": outcome.load_seconds,
            "peak": outcome.peak,
            "peak_gpu": outcome.peak_gpu,
            "runs": {name: [run, seconds.tolist()] for name, (run, seconds) in outcome.runs.items()},
        }
        path = self._path(system)
        beside = path.with_suffix(".tmp")
        beside.write_text(json.dumps(row), "utf-8")
        beside.replace(path)

    def discard(self, systems: Sequence[System]) -> None:
        """Delete the files of these systems, and the folder if it is then empty."""
        for system in systems:
            self._path(system).unlink(missing_ok=True)
            self._path(system).with_suffix(".tmp").unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _path(self, system: System) -> Path:
        return self.folder / f"{file_name(system.name)}.json"

    def _key(self, system: System, *, online: bool) -> str:
        """What a system's outcome depends on. `online`: whether a hub id means the hub's commit, else the cache's.

        The hub may change while a system runs; the system ran the cache's commit.
        """
        model = system.model or ""
        folder = Path(model).expanduser()
        files = _files(folder) if folder.is_dir() else _commit(model, system.options, online)
        options = sorted((name, fingerprint(value), _file(value)) for name, value in system.options.items())
        return hashlib.sha256(json.dumps([self._asked, system.model, options, files]).encode()).hexdigest()


def _files(folder: Path) -> list[tuple[str, int, int]]:
    """(path, size, time of the last change) of all files in a folder and the folders in it."""
    found = ((path.relative_to(folder).as_posix(), path.stat()) for path in folder.rglob("*") if path.is_file())
    return sorted((name, state.st_size, state.st_mtime_ns) for name, state in found)


def _file(value: Any) -> tuple[int, int] | None:
    """Size and time of the last change of the file that an option names, such as a template's; None if it is none."""
    if not isinstance(value, (str, os.PathLike)):
        return None
    try:
        path = Path(value).expanduser()
        state = path.stat()
    except (OSError, ValueError, RuntimeError):
        return None
    return (state.st_size, state.st_mtime_ns) if path.is_file() else None


def _commit(model: str, options: Mapping[str, Any], online: bool) -> str | None:
    """The commit of a hub id; None if it cannot be found."""
    from huggingface_hub import snapshot_download

    cache = options.get("cache_folder")
    try:
        snapshot = snapshot_download(
            model,
            revision=options.get("revision"),
            cache_dir=None if cache is None else os.fspath(cache),
            local_files_only=not online or bool(options.get("local_files_only")),
            allow_patterns=["config.json"],
        )
    except (OSError, ValueError):
        return None
    return Path(snapshot).name
