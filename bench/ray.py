"""Files of DL19 pairs scored by workers of a local Ray, one of which is killed; then a job that is killed as a whole.

The rows are the 43 queries' BM25 passages, again and again. Every score is compared, bit by bit, with that of
`CrossEncoder.score` in one process, which is timed before and after on the same pairs and as many threads.
"""

from __future__ import annotations

import gzip
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.harness import models
from bench.harness.data import DL19
from bench.harness.host import cpu_name, versions

FILES = 5  # of the input
PART_ROWS = 4096


@dataclass(frozen=True)
class Options:
    """What to run: `rows` pairs, on `workers` of one thread each, in `dtype`."""

    rows: int
    workers: int
    dtype: str
    model: str
    data: Path
    cache: Path
    command: str


@dataclass
class Findings:
    """What was found; `problems` is empty where every score was there once and equal."""

    host: dict[str, Any]
    options: dict[str, Any]
    offline_pairs_per_second: list[float] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def run(options: Options, log: Any) -> Findings:
    """Run both jobs in a folder under the cache, which is emptied before and after.

    Raises FileNotFoundError without the data, RuntimeError where a job fails.
    """
    path = options.data / DL19
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: give the folder that holds {DL19} with --data")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        queries = [json.loads(line) for line in lines]
    checkpoint = models.build(options.model, options.cache).path
    folder = options.cache / "ray"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        paths = _write(queries, options.rows, folder / "pairs")
        host = {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "versions": versions(("ray", "pyarrow", "numpy", "tokenizers")),
            "python": platform.python_version(),
            "command": options.command,
        }
        found = Findings(host, _plain(options))
        log.print(f"{options.rows} pairs in {FILES} files; scoring {sum(map(_count, queries))} of them in one process")
        expected = _offline(queries, checkpoint, options, found)
        for name, source, kill in (
            ("a worker killed", folder / "pairs", "worker"),
            ("the job killed", paths[0], "job"),
        ):
            log.print(f"{name}: {source}")
            row = _job(source, folder / name.replace(" ", "-"), checkpoint, options, kill)
            row = {"name": name, **row, **_compare(folder / name.replace(" ", "-"), expected, row["rows"])}
            found.runs.append(row)
            found.problems += [f"{name}: {problem}" for problem in row.pop("problems")]
        _offline(queries, checkpoint, options, found)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def _count(query: dict[str, Any]) -> int:
    return len(query["candidates"])


def _plain(options: Options) -> dict[str, Any]:
    return {name: value for name, value in asdict(options).items() if name not in ("data", "cache", "command")}


def _write(queries: list[dict[str, Any]], rows: int, folder: Path) -> list[Path]:
    """The rows as Parquet files: their number, the query's and document's place in the data, and both texts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    places = [(q, d) for q, query in enumerate(queries) for d in range(_count(query))]
    paths = []
    for number, numbers in enumerate(np.array_split(np.arange(rows), FILES)):
        some = [places[i % len(places)] for i in numbers]
        table = pa.table(
            {
                "row": numbers,
                "q": [q for q, _ in some],
                "d": [d for _, d in some],
                "query": [queries[q]["query"] for q, _ in some],
                "document": [queries[q]["candidates"][d]["text"] for q, d in some],
            }
        )
        paths.append(folder / f"{number}.parquet")
        pq.write_table(table, paths[-1])
    return paths


def _offline(
    queries: list[dict[str, Any]], checkpoint: Path, options: Options, found: Findings
) -> list[NDArray[np.float32]]:
    """Scores of every distinct pair in this process, with a thread for each worker; the pace goes to `found`."""
    import fastrerank

    model = fastrerank.CrossEncoder(checkpoint, device="cpu", dtype=options.dtype, num_threads=options.workers)
    documents = [[candidate["text"] for candidate in query["candidates"]] for query in queries]
    model.score_many([query["query"] for query in queries[:2]], documents[:2])
    begin = time.perf_counter()
    scores = model.score_many([query["query"] for query in queries], documents)
    found.offline_pairs_per_second.append(sum(map(len, documents)) / (time.perf_counter() - begin))
    return scores


def _job(source: Path, output: Path, checkpoint: Path, options: Options, kill: str) -> dict[str, Any]:
    """`fastrerank score` in a process of its own; when a third is done, a worker or the whole job is killed."""
    import psutil
    import pyarrow.parquet as pq

    command = [
        sys.executable,
        "-m",
        "fastrerank.cli",
        "score",
        str(source),
        str(output),
        "--model",
        str(checkpoint),
        "--dtype",
        options.dtype,
        "--device",
        "cpu",
        "--workers",
        str(options.workers),
        "--rows-per-part",
        str(PART_ROWS),
        "--keep",
        "row,q,d",
        "--json",
    ]
    files = [source] if source.is_file() else sorted(source.iterdir())
    rows = sum(pq.read_metadata(path).num_rows for path in files)
    row: dict[str, Any] = {"rows": rows}
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.poll() is None and len(list(output.glob("part-*"))) * PART_ROWS < rows / 3:
        time.sleep(0.05)
    row["killed_after_seconds"] = time.perf_counter() - begin
    if process.poll() is None:
        below = psutil.Process(process.pid).children(recursive=True)
        if kill == "worker":
            victims = [p for p in below if "PartScorer" in " ".join(p.cmdline()[:1])]
            if not victims:
                raise RuntimeError("no worker of the job was found to kill")
            victims[0].kill()
        else:
            process.send_signal(signal.SIGKILL)
            psutil.wait_procs(below, timeout=30)  # Ray ends its processes when their driver has died
    out, error = process.communicate()
    if kill == "job":
        row["killed_rows"] = len(list(output.glob("part-*"))) * PART_ROWS
        begin = time.perf_counter()
        done = subprocess.run(command, capture_output=True, check=False)
        out, error, code = done.stdout, done.stderr, done.returncode
    else:
        code = process.returncode
    if code != 0:
        raise RuntimeError(f"the job ended with {code}: {error.decode(errors='replace')[-500:]}")
    row["seconds"] = time.perf_counter() - begin
    row |= {name: value for name, value in json.loads(out).items() if name != "rows"}
    return row | _pace(output, row["rows"])


def _pace(output: Path, rows: int) -> dict[str, float]:
    """Pairs per second between the first and the last part, where workers were at work; start and end are left out."""
    moments = sorted(path.stat().st_mtime for path in output.glob("part-*"))
    spent = moments[-1] - moments[0]
    return {"pairs_per_second": (rows - PART_ROWS) / spent if spent else float("nan")}


def _compare(output: Path, expected: list[NDArray[np.float32]], rows: int) -> dict[str, Any]:
    """Whether every row is there once, in order, with the score that one process gives it, bit by bit."""
    import pyarrow.parquet as pq

    table = pq.read_table(output)
    columns = {name: table[name].to_numpy() for name in table.column_names}
    problems = []
    if not np.array_equal(columns["row"], np.arange(rows)):
        problems.append(f"{table.num_rows} rows for {rows}, {len(np.unique(columns['row']))} of them distinct")
    wanted = np.array([expected[q][d] for q, d in zip(columns["q"], columns["d"], strict=True)], np.float32)
    unequal = int((wanted != columns["score"]).sum())
    if unequal:
        problems.append(f"{unequal} scores differ from those of one process")
    left = [path.name for path in islice(output.iterdir(), 10_000) if path.suffix == ".tmp"]
    if left:
        problems.append(f"files left over: {left}")
    return {"equal": not unequal, "scored_rows": table.num_rows, "problems": problems}


def show(found: Findings) -> None:
    """Print what was found to standard output."""
    paces = ", ".join(f"{pace:.0f}" for pace in found.offline_pairs_per_second)
    print(f"{found.host['cpu']}; {found.options}")
    print(f"one process, {found.options['workers']} threads, before and after: {paces} pairs/s")
    for row in found.runs:
        again = f"; {row['resumed']} were there when it began again" if row["resumed"] else ""
        print(
            f"{row['name']} after {row['killed_after_seconds']:.0f} s: {row['scored_rows']} of {row['rows']} rows in "
            f"{row['parts']} parts, scores {'equal' if row['equal'] else 'NOT EQUAL'}{again}; "
            f"{row['seconds']:.0f} s, {row['pairs_per_second']:.0f} pairs/s between the first and last part"
        )
    for problem in found.problems:
        print(f"PROBLEM: {problem}")
