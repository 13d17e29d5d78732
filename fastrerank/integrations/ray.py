"""Ray Data: files of (query, document) pairs scored by workers, with output that resumes."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs
import ray
import ray.data

from fastrerank.data.pair_files import Columns, PairFiles, Part, filesystem, find_files, pair_files
from fastrerank.integrations.loading import call_options, load_reranker
from fastrerank.rerankers.base import Scores
from fastrerank.rerankers.independence import check_independent
from fastrerank.rerankers.pairs import score_pairs, shown
from fastrerank.runtime.version import VERSION

__all__ = ["PairScorer", "score_files"]

JOB = "_job.json"
# Options that do not change scores, or that must not be written to a disk.
UNRECORDED = ("num_threads", "token", "cache_folder", "local_files_only", "memory_limit")
MENDABLE = (ValueError, TypeError, FloatingPointError, OSError, ImportError)
MOST_BLOCKS = 10_000  # of a Ray Data set: beyond, several parts share a block


class PairScorer:
    """For `ray.data.Dataset.map_batches`: adds the column of scores to batches of (query, document) pairs.

    One object, with one model, per actor. `score_files` is the whole job around it, with output that resumes.

    Args:
        model, method, options: as in `fastrerank.load`; give `num_threads` what the actor has as `num_cpus`.
        query, document, score: names of the columns.
        label: the label that scores where the head has several, by name or number.
        raw: whether scores are raw; else activated, as `rank` shows them.

    Raises ValueError for a method that compares documents: it needs a query's candidates together, not pairs; and for a
    head with several labels where nothing tells which one scores.

    Example:
        >>> rows = ray.data.read_parquet("s3://bucket/pairs").map_batches(                   # doctest: +SKIP
        ...     PairScorer, fn_constructor_kwargs={"model": "BAAI/bge-reranker-base", "num_threads": 4},
        ...     compute=ray.data.ActorPoolStrategy(size=8), num_cpus=4, batch_size=4096)
    """

    def __init__(
        self,
        model: str,
        method: str | None = None,
        *,
        query: str = "query",
        document: str = "document",
        score: str = "score",
        label: str | int | None = None,
        raw: bool = True,
        **options: Any,
    ) -> None:
        self.reranker = load_reranker(model, method, options, label)
        check_independent(self.reranker, "pairs are scored one by one, in batches that part a query's")
        self.columns = Columns(query, document, score)
        self.label, self.raw = label, raw

    def __repr__(self) -> str:
        return f"PairScorer({self.reranker!r})"

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the batch with its scores, float32 (N,)."""
        queries, documents = (list(batch[name]) for name in (self.columns.query, self.columns.document))
        return batch | {self.columns.score: self.scores(queries, documents)}

    def scores(self, queries: Sequence[str], documents: Sequence[str]) -> Scores:
        """Return the score of each pair, float32 (N,)."""
        found = score_pairs(self.reranker, queries, documents, **call_options(self.label))
        return shown(self.reranker, found, self.raw)


class _PartScorer:
    """For `map_batches` over rows that are parts: reads each, scores it, and writes its output.

    Errors that a user can fix come back as text, as Ray would bury them in the frames of its workers.
    """

    def __init__(self, files: PairFiles, output: tuple[Any, str], load: dict[str, Any]) -> None:
        self.files = files
        system, self.folder = output
        self.written = type(files)(system, files.columns)
        self.error = ""
        try:
            self.scorer = PairScorer(**load)
        except MENDABLE as error:
            self.error = _told(error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        columns = [values.tolist() for values in batch.values()]
        parts = [Part(**dict(zip(batch, values, strict=True))) for values in zip(*columns, strict=True)]
        try:
            for part in parts if not self.error else ():
                # The block of a killed worker comes again; its finished parts are skipped.
                if not self.written.done(self.folder, part):
                    rows = self.files.read(part)
                    scores = self.scorer.scores(*self.files.pairs(rows, part))
                    self.written.save(self.folder, part, rows, scores)
        except MENDABLE as error:
            self.error = _told(error)
        return {"rows": np.array([part.rows for part in parts]), "error": np.array([self.error] * len(parts))}


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def score_files(
    inputs: str | Sequence[str],
    output: str,
    model: str,
    method: str | None = None,
    *,
    workers: int = 1,
    num_threads: int = 1,
    num_gpus: float = 0.0,
    query: str = "query",
    document: str = "document",
    score: str = "score",
    keep: Sequence[str] | None = None,
    rows_per_part: int = 4096,
    address: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    label: str | int | None = None,
    raw: bool = True,
    **options: Any,
) -> dict[str, int]:
    """Score files of (query, document) pairs on Ray, and write the rows with their scores to a folder.

    The input is cut into parts of `rows_per_part` rows. Workers score parts and write `part-000000.parquet` (or
    .jsonl: the input's kind), ..., each whole or not at all, in the input's order. A worker that dies is started again
    and its part is scored anew. A job that ended begins again with the same call and scores the parts that are missing.

    Args:
        inputs: Parquet or JSONL (.jsonl, .jsonl.gz) files, or folders of them: paths, or addresses that pyarrow opens
            (s3://, gs://, hdfs://), that every worker can read.
        output: folder, likewise, that every worker can write; made where it is not there.
        model, method, options: as in `fastrerank.load`; every worker loads the model once.
        workers, num_threads, num_gpus: processes, and what each may use. A local Ray that this call starts has room
            for all of them; on a cluster, work begins with those that have room.
        query, document: columns of the input. score: name of the column of scores, float32.
        keep: columns of the input that the output has; None for all.
        rows_per_part: what a killed worker has to do again at most.
        address: of a Ray cluster, as in `ray.init`; None: RAY_ADDRESS, else a local Ray. Ray that runs is used.
        progress: called with the rows that are done and those that there are.
        label: the label that scores where the head has several, by name or number.
        raw: whether scores are raw; else activated, as `rank` shows them.

    Returns {"rows", "parts", "resumed": rows that earlier runs had scored}.
    Raises ValueError for files without these columns, and for an output folder of another job; FileNotFoundError;
    RuntimeError with what a worker could not do: load the model, or score a row, which it names.

    Example:
        >>> score_files("pairs.parquet", "scored", "BAAI/bge-reranker-base", workers=8)      # doctest: +SKIP
        {'rows': 1000000, 'parts': 245, 'resumed': 0}
    """
    for name, value in (("workers", workers), ("num_threads", num_threads), ("rows_per_part", rows_per_part)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
    columns = Columns(query, document, score, None if keep is None else tuple(keep))
    files, parts, sizes = _plan([inputs] if isinstance(inputs, str) else list(inputs), columns, rows_per_part)
    target = filesystem(output)
    job = {
        "inputs": sizes,
        "model": model,
        "method": method,
        "columns": asdict(columns),
        "options": {name: value for name, value in options.items() if name not in UNRECORDED},
        "rows_per_part": rows_per_part,
        "fastrerank": VERSION,
        **call_options(label),
        **({} if raw else {"raw": raw}),
    }
    _claim(*target, job)
    written = type(files)(target[0], columns)
    missing = [part for part in parts if not written.done(target[1], part)]
    rows = sum(part.rows for part in parts)
    resumed = done = rows - sum(part.rows for part in missing)
    if progress is not None:
        progress(done, rows)
    if missing:
        load = {"model": model, "method": method, "num_threads": num_threads, "label": label, "raw": raw, **options}
        with _cluster(address, workers * num_threads, workers * num_gpus):
            scored = ray.data.from_items(
                [asdict(part) for part in missing], override_num_blocks=min(len(missing), MOST_BLOCKS)
            ).map_batches(
                _PartScorer,
                fn_constructor_kwargs={"files": files, "output": target, "load": load},
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=min(workers, len(missing))),
                num_cpus=num_threads,
                num_gpus=num_gpus or None,
            )
            for batch in scored.iter_batches(batch_size=None):
                if error := next(filter(None, batch["error"]), None):
                    raise RuntimeError(f"a worker could not go on: {error}")
                done += int(batch["rows"].sum())
                if progress is not None:
                    progress(done, rows)
    if not all(written.done(target[1], part) for part in missing):
        raise RuntimeError(f"{output} lacks parts after the job: something else writes to it, or workers cannot see it")
    for left in target[0].get_file_info(pa.fs.FileSelector(target[1])):
        if left.base_name.startswith(".part-"):  # of workers that were killed while they wrote
            target[0].delete_file(left.path)
    return {"rows": rows, "parts": len(parts), "resumed": resumed}


def _plan(
    inputs: list[str], columns: Columns, rows_per_part: int
) -> tuple[PairFiles, list[Part], list[dict[str, Any]]]:
    """The reader of the inputs, their parts, and each file's path, bytes and rows."""
    if not inputs:
        raise ValueError("inputs must name at least one file or folder, got none")
    places = [filesystem(place) for place in inputs]
    system = places[0][0]
    if any(other != system for other, _ in places):
        raise ValueError(f"inputs must lie in one file system, got {', '.join(inputs)}")
    paths = [path for _, place in places for path in find_files(system, place)]
    twice = next((path for i, path in enumerate(paths) if path in paths[:i]), None)
    if twice is not None:
        raise ValueError(f"inputs name {twice} twice")
    files = pair_files(system, paths, columns)
    parts: list[Part] = []
    sizes = []
    for path in paths:
        found = files.parts(path, rows_per_part, len(parts))
        parts += found
        sizes.append({"path": path, "bytes": system.get_file_info(path).size, "rows": sum(part.rows for part in found)})
    return files, parts, sizes


def _claim(system: Any, folder: str, job: dict[str, Any]) -> None:
    """Make the output folder this job's; raise ValueError if it is another's."""
    system.create_dir(folder, recursive=True)
    path = f"{folder}/{JOB}"
    job = json.loads(json.dumps(job, default=repr))
    if system.get_file_info(path).type == pa.fs.FileType.File:
        with system.open_input_stream(path) as source:
            known = json.loads(source.read())
        other = [
            f"{name} {known.get(name)!r}, not {job.get(name)!r}"
            for name in {**job, **known}
            if known.get(name) != job.get(name)
        ]
        if other:
            raise ValueError(
                f"{folder} holds another job's scores, with {other[0]}: name another output folder, or delete that one"
            )
        return
    if system.get_file_info(pa.fs.FileSelector(folder)):
        raise ValueError(f"{folder} is not empty, and holds no {JOB} of an earlier run: name another output folder")
    with system.open_output_stream(path) as sink:
        sink.write(json.dumps(job, indent=2).encode())


@contextmanager
def _cluster(address: str | None, cpus: int, gpus: float) -> Iterator[None]:
    """Ray that runs, or is connected to or started for the block: a local one with room for this many."""
    begun = not ray.is_initialized()
    if begun:
        local = address == "local" or (address is None and "RAY_ADDRESS" not in os.environ)
        room: dict[str, Any] = {"num_cpus": cpus, "include_dashboard": False} if local else {}
        if local and gpus:
            room["num_gpus"] = math.ceil(gpus)
        ray.init("local" if local else address, logging_level=logging.WARNING, **room)
    context = ray.data.DataContext.get_current()
    bars, context.enable_progress_bars = context.enable_progress_bars, False  # `progress` tells it
    try:
        yield
    finally:
        context.enable_progress_bars = bars
        if begun:
            ray.shutdown()
