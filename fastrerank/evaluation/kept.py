"""Finished systems of a comparison, kept in a folder until all are: an interrupted one goes on behind them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import fastrerank
from fastrerank.datasets import JudgedQuery

from .systems import System, file_name
from .worker import Outcome

__all__ = ["Kept"]


class Kept:
    """A folder of outcomes, one file for each system, that belong to these queries and settings.

    A file is used only for the system, options, checkpoint files, texts and release that it was made with.

    Example:
        >>> kept = Kept("out/unfinished", queries, top_k=None, warmup=1)                 # doctest: +SKIP
        >>> kept.read(system) is None                                                    # doctest: +SKIP
        True
    """

    def __init__(
        self, folder: str | os.PathLike[str], datasets: Mapping[str, Sequence[JudgedQuery]], *, top_k: int | None,
        warmup: int,
    ) -> None:  # fmt: skip
        self.folder = Path(folder)
        self._names = list(datasets)
        digest = hashlib.sha256(json.dumps([fastrerank.__version__, top_k, warmup]).encode())
        for name, queries in datasets.items():
            for query in queries:
                row = [name, query.qid, query.query, [[c.docid, c.text] for c in query.candidates]]
                digest.update(json.dumps(row).encode())
        self._asked = digest.hexdigest()

    def read(self, system: System) -> Outcome | None:
        """Return the system's outcome; None where there is none that belongs to it."""
        try:
            found = json.loads(self._path(system).read_text("utf-8"))
            if found["key"] != self._key(system) or list(found["runs"]) != self._names:
                return None
            runs = {
                name: ({qid: [(docid, score) for docid, score in hits] for qid, hits in run.items()}, np.array(seconds))
                for name, (run, seconds) in found["runs"].items()
            }
            return Outcome(runs, found["load_seconds"], found["peak"], found["peak_gpu"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None  # it is not there, or torn: the system runs again

    def write(self, system: System, outcome: Outcome) -> None:
        """Keep the outcome of a system that did not fail: after this its file is whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        row: dict[str, Any] = {
            "key": self._key(system), "load_seconds": outcome.load_seconds, "peak": outcome.peak,
            "peak_gpu": outcome.peak_gpu,
            "runs": {name: [run, seconds.tolist()] for name, (run, seconds) in outcome.runs.items()},
        }  # fmt: skip
        path = self._path(system)
        beside = path.with_suffix(".tmp")
        beside.write_text(json.dumps(row), "utf-8")
        beside.replace(path)

    def discard(self, systems: Sequence[System]) -> None:
        """Delete the files of these systems, and the folder where nothing else is in it."""
        for system in systems:
            self._path(system).unlink(missing_ok=True)
            self._path(system).with_suffix(".tmp").unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _path(self, system: System) -> Path:
        return self.folder / f"{file_name(system.name)}.json"

    def _key(self, system: System) -> str:
        folder = Path(system.model or "")
        files = [
            (path.name, path.stat().st_size, path.stat().st_mtime_ns)
            for path in (sorted(folder.iterdir()) if folder.is_dir() else [])
            if path.is_file()
        ]
        options = sorted((name, repr(value)) for name, value in system.options.items())
        return hashlib.sha256(json.dumps([self._asked, system.model, options, files]).encode()).hexdigest()
