"""The scores of every item for every anchor query, kept on the disk while they are made."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastrerank.runtime.fingerprint import fingerprint
from fastrerank.search.checks import positive
from fastrerank.search.search import checked_scores

__all__ = ["Build", "Progress", "discard", "identity", "same_scorer"]

Progress = Callable[[int, int], None]  # scores made, all scores

_PLAN, _JOURNAL, _SCORES = "build.json", "done.jsonl", "scores.f32"
_SAMPLE = 1 << 16  # bytes at both ends of a weight file that enter its digest


def identity(reranker: Any) -> dict[str, Any]:
    """What identifies a reranker's scores: class, method, options, and the digest of its checkpoint's files.

    Precision and device are left out, as scores differ too little between them to matter for an index.
    """
    found: dict[str, Any] = {"class": type(reranker).__name__, "method": getattr(reranker, "method", None)}
    checkpoint = getattr(reranker, "checkpoint", None)
    folder = getattr(checkpoint, "transformer_path", None)
    if folder is not None:
        found["checkpoint"] = _files_digest(Path(folder))
    for name in ("template", "instruction", "heads", "calibrate"):
        value = getattr(reranker, name, None)
        if value is not None:
            found[name] = hashlib.sha256(fingerprint(value).encode("utf-8", "surrogatepass")).hexdigest()[:16]
    labels = getattr(reranker, "num_labels", None)
    if isinstance(labels, int) and labels > 1:  # each label has scores of its own
        found["label"] = getattr(reranker, "label", None)
    return found


def _files_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]):
        if path.is_file():
            size = path.stat().st_size
            with path.open("rb") as file:
                head = file.read(_SAMPLE)
                file.seek(max(0, size - _SAMPLE))
                digest.update(f"{path.name} {size}".encode() + head + file.read(_SAMPLE))
    return digest.hexdigest()[:16]


def same_scorer(stored: dict[str, Any] | None, reranker: Any) -> None:
    """Raise ValueError if the index was built with another reranker than `reranker`."""
    if stored is not None and (own := identity(reranker)) != stored:
        raise ValueError(
            f"the index was built with the scores of {_say(stored)}, but this reranker is {_say(own)}: its "
            "scores do not fit the index's; build an index for it"
        )


def _say(found: dict[str, Any]) -> str:
    more = ", ".join(f"{name} {value}" for name, value in found.items() if name != "class" and value is not None)
    return f"{found['class']} ({more})" if more else str(found["class"])


class Build:
    """The K x N scores of a reranker, computed in blocks of consecutive pairs, query by query.

    In a folder, a block is synced to the disk before its line is added to the journal, so an interrupted build resumes
    after the last line. Without a folder, a temporary one is used.
    """

    def __init__(
        self,
        reranker: Any,
        items: Sequence[str],
        queries: Sequence[str],
        folder: str | os.PathLike[str] | None,
        block: int,
    ) -> None:
        for name, texts in (("items", items), ("anchor_queries", queries)):
            if isinstance(texts, str) or not len(texts):
                raise ValueError(f"{name} must be a non-empty list of texts, got {texts!r:.60}")
            for position, text in enumerate(texts):
                if not isinstance(text, str):
                    raise TypeError(f"{name} must hold texts, got {type(text).__name__} at position {position}")
        self._reranker, self._items, self._queries = reranker, items, list(queries)
        self._block = positive("block", block)
        self._pairs = len(items) * len(self._queries)
        self.folder = None if folder is None else Path(folder)

    def scores(self, progress: bool | Progress) -> npt.NDArray[np.float32]:
        """All scores, float32 (K, N). Those in the folder are not computed again."""
        if self.folder is None:
            with tempfile.TemporaryDirectory() as folder:
                return np.array(self._made(Path(folder), progress))
        return self._made(self.folder, progress)

    def _made(self, folder: Path, progress: bool | Progress) -> npt.NDArray[np.float32]:
        done = self._resume(folder)
        shape = (len(self._queries), len(self._items))
        with (
            (folder / _SCORES).open("r+b") as scores,
            (folder / _JOURNAL).open("ab") as journal,
            _shown(progress) as advance,
        ):
            advance(done, self._pairs)
            while done < self._pairs:
                end = min(done + self._block, self._pairs)
                values = self._score(done, end).astype("<f4").tobytes()
                scores.seek(4 * done)
                scores.write(values)
                scores.flush()
                os.fsync(scores.fileno())
                journal.write(json.dumps({"end": end, "crc": zlib.crc32(values)}).encode() + b"\n")
                journal.flush()
                os.fsync(journal.fileno())
                done = end
                advance(done, self._pairs)
        return np.memmap(folder / _SCORES, "<f4", "r", shape=shape)

    def _score(self, begin: int, end: int) -> npt.NDArray[np.float64]:
        """Scores of the pairs `begin` to `end`, counted row by row."""
        count = len(self._items)
        rows = range(begin // count, -(-end // count))
        spans = [(max(begin - row * count, 0), min(end - row * count, count)) for row in rows]

        def call(_: Any, __: Any) -> npt.NDArray[np.float64]:
            parts = self._reranker.score_many(
                [self._queries[row] for row in rows], [[self._items[i] for i in range(*span)] for span in spans]
            )
            return np.concatenate([np.asarray(part, np.float64) for part in parts])

        pairs = np.arange(begin, end)
        return checked_scores(call, pairs // count, pairs % count)

    def _resume(self, folder: Path) -> int:
        """How many pairs the folder holds. An empty folder is prepared for the build."""
        plan = {"pairs": self._pairs, "content": self._digest(), "scorer": identity(self._reranker)}
        path = folder / _PLAN
        if path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{path}: damaged ({error}); delete {folder} to begin anew") from error
            if found != plan:
                what = next(name for name in plan if not isinstance(found, dict) or found.get(name) != plan[name])
                raise ValueError(f"{folder} holds scores of another build ({what} differs); delete it, or name another")
            return self._verified(folder)
        if (
            folder.is_dir()
            and any(folder.iterdir())
            and not all(p.name in (_SCORES, _JOURNAL, _PLAN + ".new") for p in folder.iterdir())
        ):
            raise ValueError(f"{folder} holds other files; name a new or empty folder for the build's scores")
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / _SCORES).open("wb") as file:
            file.truncate(4 * self._pairs)
            os.fsync(file.fileno())
        (folder / _JOURNAL).write_bytes(b"")
        aside = folder / (_PLAN + ".new")
        with aside.open("w", encoding="utf-8") as file:
            json.dump(plan, file)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        return 0

    def _verified(self, folder: Path) -> int:
        """The end of the last block whose journal line is complete and whose scores match its checksum."""
        done = good = 0
        with (folder / _SCORES).open("rb") as scores, (folder / _JOURNAL).open("rb") as journal:
            for line in journal:
                if not line.endswith(b"\n"):
                    break  # the interruption left this line incomplete
                entry = json.loads(line)
                scores.seek(4 * done)
                if zlib.crc32(scores.read(4 * (entry["end"] - done))) != entry["crc"]:
                    break
                done = entry["end"]
                good += len(line)
        with (folder / _JOURNAL).open("r+b") as journal:
            journal.truncate(good)
        return done

    def _digest(self) -> str:
        digest = hashlib.sha256()
        for text in (*self._queries, *self._items):
            data = text.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()


def discard(folder: Path) -> None:
    """Delete a build's scores, and nothing else."""
    for name in (_PLAN, _JOURNAL, _SCORES):  # the plan first: without it no build resumes
        (folder / name).unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        shutil.rmtree(folder)


@contextmanager
def _shown(progress: bool | Progress) -> Iterator[Progress]:
    if callable(progress):
        yield progress
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    columns = (TextColumn("scoring"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, transient=True, disable=not (progress and console.is_terminal)) as bar:
        task = bar.add_task("scoring", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
