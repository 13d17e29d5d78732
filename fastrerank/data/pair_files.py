"""(query, document) pairs in Parquet and JSONL files: cut into numbered parts, read part by part, written with scores.

A part's output file is complete or absent: it is written under another name and then renamed. Work that was stopped at
any point can therefore go on with the missing parts.
"""

from __future__ import annotations

import gzip
import io
import json
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

__all__ = ["Columns", "JsonLines", "PairFiles", "Parquet", "Part", "filesystem", "find_files", "pair_files"]

STREAM_BUFFER = 1 << 20  # bytes that a reader of lines asks the file system for
BATCH_ROWS = 1024  # rows of a Parquet row group that are decoded at a time

Scores = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Part:
    """`rows` rows of the file `path` from its row `begin` on; `number` counts parts over all files.

    `offset`: byte at which the first of them begins; -1 where a file cannot be entered at a byte.
    """

    number: int
    path: str
    begin: int
    rows: int
    offset: int = -1


@dataclass(frozen=True)
class Columns:
    """Names of the columns, or fields, of queries, documents and scores; `keep`: what the output has beside the score.

    `keep` None keeps all.
    """

    query: str = "query"
    document: str = "document"
    score: str = "score"
    keep: tuple[str, ...] | None = None

    def check(self, path: str, present: Sequence[str]) -> None:
        """Raise ValueError unless these columns go with a file that has the columns `present`."""
        wanted = (self.query, self.document, *(self.keep or ()))
        missing = [name for name in wanted if name not in present]
        if missing:
            raise ValueError(f"{path} has no column {missing[0]!r}; it has {', '.join(present) or 'none'}")
        if self.score in (present if self.keep is None else self.keep):
            raise ValueError(
                f"{path} has a column {self.score!r} already: give the scores another name, or leave it out of what "
                "is kept"
            )


def filesystem(place: str) -> tuple[Any, str]:
    """Return pyarrow's file system and the path in it of a local path or of an address (s3://, gs://, hdfs://, ...).

    Example:
        >>> filesystem("/data/pairs")[1]
        '/data/pairs'
    """
    if "://" in place:
        system, path = pa.fs.FileSystem.from_uri(place)
        return system, path
    return pa.fs.LocalFileSystem(), str(Path(place).absolute())


def find_files(system: Any, path: str) -> list[str]:
    """Return `path`, or the Parquet and JSONL files below it where it is a folder, sorted by name.

    Raises FileNotFoundError where there is nothing, ValueError for a folder without such a file.
    """
    found = system.get_file_info(path)
    if found.type == pa.fs.FileType.NotFound:
        raise FileNotFoundError(f"no such file or folder: {path}")
    if found.type != pa.fs.FileType.Directory:
        return [path]
    below = system.get_file_info(pa.fs.FileSelector(path, recursive=True))
    paths = sorted(info.path for info in below if info.type == pa.fs.FileType.File and not _hidden(info.path, path))
    paths = [name for name in paths if _kind(name) is not None]
    if not paths:
        raise ValueError(f"{path} holds no {', '.join(_KINDS)} file")
    return paths


def pair_files(system: Any, paths: Sequence[str], columns: Columns) -> PairFiles:
    """Return what reads and writes files of the paths' one kind.

    Raises ValueError for files of several kinds, or of none that is known.
    """
    kinds = {path: _kind(path) for path in paths}
    unknown = next((path for path, kind in kinds.items() if kind is None), None)
    if unknown is not None:
        raise ValueError(f"{unknown}: must be named {', '.join('*' + suffix for suffix in _KINDS)}")
    if len(set(kinds.values())) > 1:
        raise ValueError(f"files must be all Parquet or all JSONL, got both: {paths[0]}, ...")
    kind = kinds[paths[0]]
    assert kind is not None
    return kind(system, columns)


class PairFiles(ABC):
    """Files of one kind in a file system of pyarrow's. An object is used by one thread; a pickle of it reads anew.

    Reading goes forward: a part that comes after the one before in its file is read without beginning anew.
    """

    suffix: str

    def __init__(self, system: Any, columns: Columns) -> None:
        self.system, self.columns = system, columns
        self._path = ""  # of the file that is open, and the row that it gives next
        self._row = 0

    def __reduce__(self) -> Any:
        return type(self), (self.system, self.columns)

    @abstractmethod
    def parts(self, path: str, rows_per_part: int, number: int) -> list[Part]:
        """Cut a file into parts, numbered from `number`; raise ValueError where its columns are not what is needed."""

    @abstractmethod
    def read(self, part: Part) -> Any:
        """Return the rows of a part."""

    @abstractmethod
    def column(self, rows: Any, name: str) -> list[Any]:
        """Return the values of a column; None where a row has none."""

    @abstractmethod
    def write(self, rows: Any, scores: Scores, sink: Any) -> None:
        """Write the columns that are kept and the scores to a binary file."""

    @abstractmethod
    def count(self, path: str) -> int:
        """Return the number of rows of a file that `write` wrote; -1 if it is damaged."""

    def pairs(self, rows: Any, part: Part) -> tuple[list[str], list[str]]:
        """Return the queries and documents of a part's rows; raise TypeError naming the row of one that is no str."""
        found = []
        for name in (self.columns.query, self.columns.document):
            values = self.column(rows, name)
            for i, value in enumerate(values):
                if not isinstance(value, str):
                    kind = "nothing" if value is None else type(value).__name__
                    raise TypeError(f"{part.path}: row {part.begin + i} has {kind} where {name!r} must be a string")
            found.append(values)
        return found[0], found[1]

    def place(self, folder: str, part: Part) -> str:
        """Return the path of a part's output."""
        return f"{folder}/part-{part.number:06d}{self.suffix}"

    def done(self, folder: str, part: Part) -> bool:
        """Whether a part's output is there and whole."""
        path = self.place(folder, part)
        return self.system.get_file_info(path).type == pa.fs.FileType.File and self.count(path) == part.rows

    def save(self, folder: str, part: Part, rows: Any, scores: Scores) -> None:
        """Write a part's output: after this it is whole, before it is not there."""
        # A unique name: a part may be scored twice at once if a worker that still runs was taken for dead.
        beside = f"{folder}/.part-{part.number:06d}-{uuid.uuid4().hex}.tmp"
        with self.system.open_output_stream(beside) as sink:
            self.write(rows, scores, sink)
        self.system.move(beside, self.place(folder, part))


class Parquet(PairFiles):
    """Parquet files; the output has the input's types, and float32 scores."""

    suffix = ".parquet"

    def __init__(self, system: Any, columns: Columns) -> None:
        super().__init__(system, columns)
        self._file: Any = None
        self._batches: Iterator[Any] = iter(())
        self._rest: Any = None

    def parts(self, path: str, rows_per_part: int, number: int) -> list[Part]:
        with self.system.open_input_file(path) as source:
            file = pq.ParquetFile(source)
            self.columns.check(path, file.schema_arrow.names)
            rows = file.metadata.num_rows
        return [
            Part(number + i, path, begin, min(rows_per_part, rows - begin))
            for i, begin in enumerate(range(0, rows, rows_per_part))
        ]

    def read(self, part: Part) -> Any:
        if part.path != self._path or part.begin < self._row:
            self._open(part)
        pieces, missing = [], part.begin + part.rows - self._row
        while missing > 0:
            batch = self._rest if self._rest is not None else next(self._batches, None)
            if batch is None:
                raise ValueError(f"{part.path} ends before row {part.begin + part.rows - 1}: it was changed")
            taken, self._rest = batch.slice(0, missing), None
            if batch.num_rows > missing:
                self._rest = batch.slice(missing)
            skipped = min(taken.num_rows, max(0, part.begin - self._row))
            pieces.append(taken.slice(skipped))
            self._row += taken.num_rows
            missing -= taken.num_rows
        return pa.Table.from_batches(pieces)

    def _open(self, part: Part) -> None:
        """Open the file at the row group of the part's first row."""
        if self._file is not None:
            self._file.close()
        self._path, self._rest, self._row = part.path, None, 0
        self._file = self.system.open_input_file(part.path)
        file = pq.ParquetFile(self._file)
        first = 0
        while self._row + (rows := file.metadata.row_group(first).num_rows) <= part.begin:
            self._row += rows
            first += 1
        keep, wanted = self.columns.keep, [self.columns.query, self.columns.document]
        names = None if keep is None else list(dict.fromkeys([*keep, *wanted]))
        groups = range(first, file.metadata.num_row_groups)
        self._batches = file.iter_batches(BATCH_ROWS, row_groups=list(groups), columns=names)

    def column(self, rows: Any, name: str) -> list[Any]:
        values: list[Any] = rows.column(name).to_pylist()
        return values

    def write(self, rows: Any, scores: Scores, sink: Any) -> None:
        if self.columns.keep is not None:
            rows = rows.select(list(self.columns.keep))
        pq.write_table(rows.append_column(self.columns.score, pa.array(scores, pa.float32())), sink)

    def count(self, path: str) -> int:
        try:
            with self.system.open_input_file(path) as source:
                return int(pq.ParquetFile(source).metadata.num_rows)
        except pa.ArrowInvalid:
            return -1


class JsonLines(PairFiles):
    """JSONL files, gzip-compressed or not; the output is not. Scores are written so that they read back the same."""

    suffix = ".jsonl"

    def __init__(self, system: Any, columns: Columns) -> None:
        super().__init__(system, columns)
        self._lines: Any = None

    def parts(self, path: str, rows_per_part: int, number: int) -> list[Part]:
        begins: list[int] = []  # bytes at which parts begin
        rows = position = 0
        with closing(self._stream(path, 0)) as lines:
            for line in lines:
                if line.strip():
                    if rows == 0:
                        self.columns.check(path, list(_row(line, path, 0)))
                    if rows % rows_per_part == 0:
                        begins.append(position)
                    rows += 1
                position += len(line)
        return [
            Part(
                number + i,
                path,
                i * rows_per_part,
                min(rows_per_part, rows - i * rows_per_part),
                -1 if path.endswith(".gz") else offset,
            )
            for i, offset in enumerate(begins)
        ]

    def read(self, part: Part) -> list[dict[str, Any]]:
        ahead = part.path == self._path and self._row <= part.begin
        if not ahead or (part.offset >= 0 and self._row != part.begin):
            if self._lines is not None:
                self._lines.close()
            self._path, self._row = part.path, part.begin if part.offset >= 0 else 0
            self._lines = self._stream(part.path, max(part.offset, 0))
        rows = []
        while self._row < part.begin + part.rows:
            line = self._lines.readline()
            if not line:
                raise ValueError(f"{part.path} ends before row {part.begin + part.rows - 1}: it was changed")
            if line.strip():
                if self._row >= part.begin:
                    rows.append(_row(line, part.path, self._row))
                self._row += 1
        return rows

    def _stream(self, path: str, offset: int) -> Any:
        if path.endswith(".gz"):
            return gzip.GzipFile(fileobj=self.system.open_input_stream(path, compression=None))
        source = self.system.open_input_file(path)
        source.seek(offset)
        return io.BufferedReader(source, STREAM_BUFFER)

    def column(self, rows: Any, name: str) -> list[Any]:
        return [row.get(name) for row in rows]

    def write(self, rows: Any, scores: Scores, sink: Any) -> None:
        keep = self.columns.keep
        for row, score in zip(rows, scores.tolist(), strict=True):
            kept = row if keep is None else {name: row.get(name) for name in keep}
            sink.write(json.dumps(kept | {self.columns.score: score}).encode() + b"\n")

    def count(self, path: str) -> int:
        rows, last = 0, b"\n"
        with self.system.open_input_stream(path, compression=None) as source:
            while block := source.read(STREAM_BUFFER):
                rows, last = rows + block.count(b"\n"), block[-1:]
        return rows if last == b"\n" else -1


_KINDS: dict[str, type[PairFiles]] = {
    ".parquet": Parquet,
    ".jsonl": JsonLines,
    ".jsonl.gz": JsonLines,
    ".ndjson": JsonLines,
    ".ndjson.gz": JsonLines,
}


def _kind(path: str) -> type[PairFiles] | None:
    return next((kind for suffix, kind in _KINDS.items() if path.endswith(suffix)), None)


def _hidden(path: str, folder: str) -> bool:
    """Whether a part of the path below `folder` begins with . or _: data sets name files so that hold no data."""
    parts: Iterable[str] = Path(path).relative_to(folder).parts
    return any(part[0] in "._" for part in parts)


def _row(line: bytes, path: str, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:  # UnicodeDecodeError is one too
        raise ValueError(f"{path}: row {number} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{path}: row {number} is not a JSON object but {type(row).__name__}")
    return row
