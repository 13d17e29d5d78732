"""Files of pairs: their parts hold every row once, in any order of reading, and outputs are whole or absent."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pyarrow")

import pyarrow as pa
import pyarrow.parquet as pq

from fastrerank.data.pair_files import Columns, PairFiles, filesystem, find_files, pair_files

ROWS = [{"id": i, "query": f"q{i // 5}", "document": f"text {i} \u2028 \U0001f989"} for i in range(103)]


def write(folder: Path, kind: str) -> Path:
    path = folder / f"pairs.{kind}"
    text = "".join(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n" * (1 + i % 3) for i, row in enumerate(ROWS))
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=17)
    elif kind == "jsonl.gz":
        half = len(text) // 2
        path.write_bytes(gzip.compress(text[:half].encode()) + gzip.compress(text[half:].encode()))
    else:
        path.write_text(text.rstrip("\n"), encoding="utf-8")
    return path


def as_rows(rows: Any) -> list[dict[str, Any]]:
    return rows if isinstance(rows, list) else rows.to_pylist()


def opened(path: Path, columns: Columns = Columns()) -> PairFiles:  # noqa: B008 - frozen
    system, place = filesystem(str(path))
    return pair_files(system, find_files(system, place), columns)


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "jsonl.gz", "ndjson"])
def test_parts_hold_every_row_once_in_any_order(tmp_path: Path, kind: str, random: np.random.Generator) -> None:
    path = write(tmp_path, kind)
    for rows_per_part in (1, 7, 17, 102, 103, 500):
        files = opened(path)
        parts = files.parts(str(path), rows_per_part, 10)
        assert [part.number for part in parts] == list(range(10, 10 + len(parts)))
        assert [row for part in parts for row in as_rows(files.read(part))] == ROWS
        for part in random.permutation(np.array(parts, object))[:40]:
            assert as_rows(files.read(part)) == ROWS[part.begin : part.begin + rows_per_part]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_what_is_saved_is_read_back_with_equal_scores(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind)
    files = opened(path, Columns(score="s", keep=("id",)))
    (part,) = files.parts(str(path), 200, 0)
    out = str(tmp_path)
    scores = np.random.default_rng(1).normal(size=103).astype(np.float32)
    assert not files.done(out, part)
    files.save(out, part, files.read(part), scores)
    assert files.done(out, part)
    place = Path(files.place(out, part))
    if kind == "parquet":
        found = pq.read_table(place)
        assert found.schema.field("s").type == pa.float32()
        rows = found.to_pylist()
    else:
        rows = [json.loads(line) for line in place.read_text().splitlines()]
    assert [row["id"] for row in rows] == list(range(103))
    assert np.array_equal(np.array([row["s"] for row in rows], np.float32), scores)
    assert rows[0].keys() == {"id", "s"}
    place.write_bytes(place.read_bytes()[:-3])
    assert not files.done(out, part)
    place.unlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name]


def test_folders_hold_files_of_one_kind(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "_logs").mkdir()
    for name in ("b/2.jsonl", "a.jsonl", ".hidden.jsonl", "_logs/x.jsonl", "readme.txt"):
        (tmp_path / name).write_text("{}\n")
    system, place = filesystem(str(tmp_path))
    assert find_files(system, place) == [str(tmp_path / "a.jsonl"), str(tmp_path / "b" / "2.jsonl")]
    assert filesystem(f"file://{tmp_path}")[1] == str(tmp_path)
    write(tmp_path, "parquet")
    with pytest.raises(ValueError, match="all Parquet or all JSONL"):
        pair_files(system, find_files(system, place), Columns())
    with pytest.raises(ValueError, match="must be named"):
        pair_files(system, [str(tmp_path / "readme.txt")], Columns())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no"):
        find_files(system, str(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match="absent"):
        find_files(system, str(tmp_path / "absent"))


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_wrong_columns_are_named_before_any_work(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind)
    for columns, message in (
        (Columns(query="question"), "no column 'question'; it has id, query, document"),
        (Columns(keep=("qid",)), "no column 'qid'"),
        (Columns(score="id"), "has a column 'id' already"),
    ):
        with pytest.raises(ValueError, match=message):
            opened(path, columns).parts(str(path), 10, 0)


def test_wrong_rows_are_named(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    for last, error, message in (
        (b'{"query": "q"}', TypeError, "row 2 has nothing where 'document' must be a string"),
        (b'{"query": 3, "document": "d"}', TypeError, "row 2 has int where 'query'"),
        (b'{"query": "q"', ValueError, "row 2 is not JSON"),
        (b'{"query": "\xff"}', ValueError, "row 2 is not JSON"),
        (b'["q", "d"]', ValueError, "row 2 is not a JSON object but list"),
    ):
        path.write_bytes(b'{"query": "q", "document": "d"}\n\n{"query": "q", "document": "d"}\n' + last)
        files = opened(path)
        part = files.parts(str(path), 2, 0)[1]
        with pytest.raises(error, match=message):
            files.pairs(files.read(part), part)
    path.write_bytes(b'{"query": "q", "document": "d"}\n')
    with pytest.raises(ValueError, match="was changed"):
        opened(path).read(part)
