"""Several systems on the same judged candidates: measures, latency, memory, and tests of the differences."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastrerank.data.datasets import JudgedQuery, Run, load_dataset, read_trec_run, write_trec_run
from fastrerank.evaluation.kept import Kept
from fastrerank.evaluation.measures import DEFAULT_MEASURES, PerQuery, known_measures, means, measure
from fastrerank.evaluation.reranking import check_queries, first_stage, rerank
from fastrerank.evaluation.statistics import ALPHA, PairedTest, paired_tests
from fastrerank.evaluation.systems import FIRST_STAGE, System, as_system, check_names, file_name
from fastrerank.evaluation.worker import Outcome, run_apart
from fastrerank.ops import cpu_info
from fastrerank.runtime.version import VERSION

__all__ = ["ALPHA", "Comparison", "Dataset", "Failure", "Result", "compare"]

_CUTOFFS = (1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 500, 1000)
_FORMAT = 1


@dataclass
class Dataset:
    """What was reranked: `queries` (id -> text), how many are judged, and the number of candidates of each."""

    source: str
    queries: dict[str, str]
    judged: int
    candidates: list[int]


@dataclass
class Result:
    """The result of one system on one data set.

    Attributes:
        metrics: measure -> mean over the judged queries.
        per_query: query id -> measure -> value, for the judged queries.
        curves: "nDCG" and "Recall" -> cut-off -> mean over the judged queries.
        latencies: float64 (Q,), seconds of each query, in the data set's order; None for a run that was read.
        notes: remarks that readers of the figures need.
        run: query id -> (document id, score), best first; {} in a comparison that was loaded from a file.
    """

    metrics: dict[str, float]
    per_query: PerQuery
    curves: dict[str, dict[int, float]]
    latencies: npt.NDArray[np.float64] | None
    notes: list[str] = field(default_factory=list)
    run: Run = field(default_factory=dict, repr=False)

    def latency(self, percentile: float) -> float | None:
        """Return this percentile of the seconds per query; None where nothing was timed."""
        return None if self.latencies is None else float(np.percentile(self.latencies, percentile))


@dataclass
class Failure:
    """A system that failed: the data set (None: before any), the error in one line, and the traceback."""

    system: str
    dataset: str | None
    error: str
    detail: str = ""


@dataclass
class Comparison:
    """What `compare` found.

    Attributes:
        baseline: the system that the others are tested against.
        measures: names of the measures; the first is what plots and differences show.
        min_relevance: smallest grade that counts as relevant.
        datasets: name -> `Dataset`.
        systems: name -> {"model", "options"}, {"run"} or {"ranker"}; and "load_seconds", "peak_bytes", "peak_gpu_bytes"
            of its process, None where it had none.
        results: data set -> system -> `Result`, of what did not fail.
        failures: what did.
        about: {"fastrerank", "python", "platform", "processor", "cpu level", "threads", "time", "top_k", "warmup"}.
    """

    baseline: str
    measures: list[str]
    min_relevance: int
    datasets: dict[str, Dataset]
    systems: dict[str, dict[str, Any]]
    results: dict[str, dict[str, Result]]
    failures: list[Failure]
    about: dict[str, Any]

    def __repr__(self) -> str:
        """The tables that `fastrerank eval` prints."""
        from rich.console import Console

        from fastrerank.evaluation.table import print_comparison

        text = StringIO()
        print_comparison(self, Console(file=text, width=110, force_terminal=True, color_system=None))
        return text.getvalue().rstrip()

    def tests(self, dataset: str, measure: str, baseline: str | None = None) -> dict[str, PairedTest]:
        """Return {system: its paired test against the baseline} on the judged queries of one data set.

        p values are corrected (Holm) for all systems that the call compares. {} where the baseline failed, or there are
        fewer than two judged queries.

        Example:
            >>> comparison.tests("dl19", "nDCG@10")["int8"].p_holm                       # doctest: +SKIP
            0.0312
        """
        against = self.baseline if baseline is None else baseline
        results = self.results[dataset]
        if against not in self.systems:
            raise ValueError(f"no system is named {against!r}; one of {', '.join(self.systems)}")
        if against not in results or self.datasets[dataset].judged < 2:
            return {}
        qids = list(results[against].per_query)
        rows = {name: [result.per_query[qid][measure] for qid in qids] for name, result in results.items()}
        own = rows.pop(against)
        return dict(zip(rows, paired_tests(list(rows.values()), own), strict=True))

    def means(self) -> dict[str, dict[str, float]]:
        """Return {system: {measure: mean over the data sets}} of the systems that failed on none."""
        whole = [name for name in self.systems if all(name in results for results in self.results.values())]
        return {
            name: {
                m: float(np.mean([results[name].metrics[m] for results in self.results.values()]))
                for m in self.measures
            }
            for name in whole
        }

    def to_json(self) -> dict[str, Any]:
        """Return everything but the runs, JSON-ready: `from_json` reads it back. Tests are added for other readers."""
        tests = {
            dataset: {m: {name: asdict(test) for name, test in self.tests(dataset, m).items()} for m in self.measures}
            for dataset in self.datasets
        }
        results = {
            dataset: {name: _result_json(result) for name, result in row.items()}
            for dataset, row in self.results.items()
        }
        own = {key: value for key, value in vars(self).items() if key not in ("datasets", "results", "failures")}
        return {
            "format": _FORMAT,
            **own,
            "datasets": {name: asdict(value) for name, value in self.datasets.items()},
            "results": results,
            "tests": tests,
            "failures": [asdict(failure) for failure in self.failures],
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Comparison:
        """Return the comparison that `to_json` wrote, without runs. Raises ValueError for another format."""
        if data.get("format") != _FORMAT:
            raise ValueError(f"not a comparison of format {_FORMAT}: its format is {data.get('format')!r}")
        fields = {key: data[key] for key in ("baseline", "measures", "min_relevance", "systems", "about")}
        return Comparison(
            **fields,
            datasets={name: Dataset(**value) for name, value in data["datasets"].items()},
            results={
                dataset: {name: _result(value) for name, value in row.items()}
                for dataset, row in data["results"].items()
            },
            failures=[Failure(**value) for value in data["failures"]],
        )

    def save(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write results.json, report.html and runs/DATASET/SYSTEM.trec to `folder`, and return what was written.

        The JSON holds each query's values and seconds: `load` reads it back, without the runs. Raises ValueError, after
        the other two files, for a run with an id that TREC's format cannot hold.
        """
        from fastrerank.evaluation.report import to_html

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        written = [folder / "results.json", folder / "report.html"]
        texts = (json.dumps(self.to_json(), indent=1, allow_nan=False), to_html(self))
        for path, text in zip(written, texts, strict=True):
            path.write_text(text, encoding="utf-8", errors="backslashreplace")
        for dataset, results in self.results.items():
            for name, result in results.items():
                path = folder / "runs" / file_name(dataset) / f"{file_name(name)}.trec"
                path.parent.mkdir(parents=True, exist_ok=True)
                write_trec_run(path, result.run, tag=file_name(name))
                written.append(path)
        return written

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Comparison:
        """Read a results.json, or a folder that holds one.

        Example:
            >>> Comparison.load("out").tests("dl19", "nDCG@10", baseline="float32")      # doctest: +SKIP
        """
        path = Path(path)
        return Comparison.from_json(json.loads((path / "results.json" if path.is_dir() else path).read_text("utf-8")))


def compare(
    systems: Mapping[str, Any] | Sequence[System],
    datasets: str | os.PathLike[str] | Sequence[JudgedQuery] | Mapping[str, Any],
    *,
    baseline: str = FIRST_STAGE,
    measures: Sequence[str] = DEFAULT_MEASURES,
    top_k: int | None = None,
    min_relevance: int = 1,
    warmup: int = 1,
    progress: Callable[[str, str, int, int], None] | None = None,
    keep: str | os.PathLike[str] | None = None,
) -> Comparison:
    """Equal to `evaluate` of each system on the same candidates, with paired tests of the differences.

    A checkpoint is loaded and used in a process of its own, one after the other, so that its seconds and its peak
    memory are its own; if the process dies or raises, its system is in `failures` and the others go on. A system named
    "first-stage", the candidates' own order, is always the first row.

    Args:
        systems: name -> a checkpoint; {"model": checkpoint, "method": ..., "dtype": ..., further keywords of
            `fastrerank.load`}; {"run": TREC run file}; a run as a dict; or an object with `rank`, which is used in this
            process and so has no memory of its own. Or `System` objects.
        datasets: a path that `load_dataset` reads, `JudgedQuery` objects, or name -> either.
        baseline: the name of the system that the others are tested against.
        measures: names that ir_measures knows; the first is what plots and differences show.
        top_k: rerank only the first `top_k` candidates of each query; the rest follow in first-stage order. None: all.
        min_relevance: smallest grade that counts as relevant, for measures that do not say it themselves.
        warmup: how many queries are ranked before the clock starts.
        progress: called with (system, data set, queries done, queries in all); done is 0 before a checkpoint is loaded.
        keep: a folder where checkpoints' results are kept while the comparison goes on. A call after an interrupted one
            takes those of the same checkpoint, options and queries from there; when all are done they are deleted.

    Raises:
        ValueError: no queries or judgements, an unknown measure or baseline, two systems of one name, a run for several
            data sets. TypeError: a system that is none of the above. ImportError: `ir_measures` is not installed.

    Example:
        >>> from fastrerank.evaluation import compare
        >>> found = compare({"int8": {"model": "path/to/model", "dtype": "int8"}}, "dl19.jsonl.gz")  # doctest: +SKIP
        >>> found.results["dl19"]["int8"].metrics["nDCG@10"]                             # doctest: +SKIP
        >>> found.save("out")                                                            # doctest: +SKIP
    """
    known_measures(measures, min_relevance)
    if not measures:
        raise ValueError("measures must name at least one measure")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1 (or None for all candidates), got {top_k}")
    if warmup < 0 or min_relevance < 1:
        raise ValueError(f"warmup must be at least 0 and min_relevance 1, got {warmup} and {min_relevance}")
    entries = list(systems.items()) if isinstance(systems, Mapping) else [(system.name, system) for system in systems]
    listed = [as_system(name, value) for name, value in entries]
    pools = _load(datasets)
    check_names([System(FIRST_STAGE, run={}), *listed])
    if baseline not in (names := [FIRST_STAGE, *(system.name for system in listed)]):
        raise ValueError(f"baseline {baseline!r} is none of the systems: {', '.join(names)}")
    if len(pools) > 1 and (runs := [system.name for system in listed if system.run is not None]):
        raise ValueError(f"a run belongs to one data set, and there are {len(pools)}: {', '.join(runs)}")

    comparison = Comparison(
        baseline,
        list(measures),
        min_relevance,
        {name: _about_pool(*pool) for name, pool in pools.items()},
        {},
        {name: {} for name in pools},
        [],
        _about(top_k, warmup),
    )
    queries = {name: found for name, (_, found) in pools.items()}
    kept = None if keep is None else Kept(keep, queries, top_k=top_k, warmup=warmup)
    for system in [System(FIRST_STAGE, run={}), *listed]:
        outcome = None if kept is None or system.model is None else kept.read(system)
        if outcome is None:
            outcome = _outcome(system, queries, top_k, warmup, progress)
            if kept is not None and system.model is not None and outcome.error is None:
                kept.write(system, outcome)
        comparison.systems[system.name] = {
            **({"run": "the candidates' own order"} if system.name == FIRST_STAGE else system.about),
            "load_seconds": outcome.load_seconds,
            "peak_bytes": outcome.peak,
            "peak_gpu_bytes": outcome.peak_gpu,
        }
        for name, (run, seconds) in outcome.runs.items():
            timed = None if system.run is not None else seconds
            result = _measured(run, timed, queries[name], list(measures), min_relevance)
            if system.run is not None:
                result.notes = _notes(run, queries[name])
            comparison.results[name][system.name] = result
        if outcome.error is not None:
            comparison.failures.append(Failure(system.name, outcome.failed, outcome.error, outcome.detail))
    if kept is not None:
        kept.discard(listed)
    return comparison


def _outcome(
    system: System,
    queries: Mapping[str, Sequence[JudgedQuery]],
    top_k: int | None,
    warmup: int,
    progress: Callable[[str, str, int, int], None] | None,
) -> Outcome:
    def advance(dataset: str, done: int, of: int) -> None:
        if progress is not None:
            progress(system.name, dataset, done, of)

    if system.model is not None:
        name = next(iter(queries))
        advance(name, 0, len(queries[name]))
        return run_apart(system.model, system.options, queries, top_k=top_k, warmup=warmup, progress=advance)
    outcome = Outcome()
    for name, pool in queries.items():
        try:
            if system.ranker is not None:
                outcome.runs[name] = rerank(
                    system.ranker,
                    pool,
                    top_k=top_k,
                    warmup=warmup,
                    progress=lambda done, of, name=name: advance(name, done, of),  # type: ignore[misc]
                )
            elif system.name == FIRST_STAGE:
                outcome.runs[name] = first_stage(pool), np.zeros(0)
            else:
                run = system.run if isinstance(system.run, Mapping) else read_trec_run(system.run or "")
                outcome.runs[name] = dict(run), np.zeros(0)
        except Exception as error:  # any error of a reranker is reported with its name, and the others continue
            outcome.error, outcome.failed = " ".join(f"{type(error).__name__}: {error}".split()), name
            break
    return outcome


def _measured(
    run: Run,
    seconds: npt.NDArray[np.float64] | None,
    queries: Sequence[JudgedQuery],
    measures: list[str],
    min_relevance: int,
) -> Result:
    judgements = {query.qid: query.judgements for query in queries if query.judgements}
    deepest = max((len(hits) for hits in run.values()), default=0)
    cutoffs = [k for k in _CUTOFFS if k < deepest] + [deepest]
    names = {f"{name}@{k}": (name, k) for name in ("nDCG", "Recall") for k in cutoffs if k > 0}
    curves: dict[str, dict[int, float]] = {"nDCG": {}, "Recall": {}}
    if names:
        for full, mean in means(measure(run, judgements, min_relevance=min_relevance, measures=list(names))).items():
            curves[names[full][0]][names[full][1]] = mean
    per_query = measure(run, judgements, min_relevance=min_relevance, measures=measures)
    return Result(means(per_query), per_query, curves, seconds, run=run)


def _notes(run: Run, queries: Sequence[JudgedQuery]) -> list[str]:
    """What sets a run that was made elsewhere apart from a reranking of these candidates."""
    notes = []
    judged = [query.qid for query in queries if query.judgements]
    if absent := sum(not run.get(qid) for qid in judged):
        notes.append(f"ranks nothing for {absent} of {len(judged)} judged queries, which count as 0")
    pools = {query.qid: {candidate.docid for candidate in query.candidates} for query in queries}
    foreign = sum(docid not in pools[qid] for qid, hits in run.items() if qid in pools for docid, _ in hits)
    if foreign:
        notes.append(f"ranks {foreign} documents that are not among the candidates")
    if tied := sum(before == after for hits in run.values() for (_, before), (_, after) in pairwise(hits)):
        notes.append(f"{tied} scores tie with the one before them: they are measured in the order of the run")
    return notes


def _load(datasets: Any) -> dict[str, tuple[str, list[JudgedQuery]]]:
    """Data set name -> (where from, queries)."""
    named = datasets if isinstance(datasets, Mapping) else {"": datasets}
    pools = {}
    for name, value in named.items():
        is_path = isinstance(value, (str, os.PathLike))
        queries = load_dataset(value) if is_path else list(value)
        try:
            check_queries(queries)
        except ValueError as error:
            raise ValueError(f"{name}: {error}" if name else str(error)) from error
        source = os.fspath(value) if is_path else "given as objects"
        pools[name or (dataset_name(value) if is_path else "dataset")] = (source, queries)
    if not pools:
        raise ValueError("datasets must name at least one data set")
    return pools


def dataset_name(path: str | os.PathLike[str]) -> str:
    """Return a file's name without .gz, .jsonl and .json, or a folder's name.

    Example:
        >>> dataset_name("data/dl19-passage-bm25-top100.jsonl.gz")
        'dl19-passage-bm25-top100'
    """
    return re.sub(r"(\.jsonl|\.json|\.tsv)?(\.gz)?$", "", Path(path).resolve().name) or str(path)


def _about_pool(source: str, queries: Sequence[JudgedQuery]) -> Dataset:
    return Dataset(
        source,
        {query.qid: query.query for query in queries},
        sum(bool(query.judgements) for query in queries),
        [len(query.candidates) for query in queries],
    )


def _about(top_k: int | None, warmup: int) -> dict[str, Any]:
    cpu = cpu_info()
    listed = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", listed.read_text(), re.MULTILINE) if listed.exists() else None
    return {
        "fastrerank": VERSION,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": model[1] if model else platform.processor() or platform.machine(),
        "cpu level": cpu["isa"],
        "threads": cpu["threads"],
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv) if sys.argv and sys.argv[0].endswith("fastrerank") else None,
        "top_k": top_k,
        "warmup": warmup,
    }


def _result_json(result: Result) -> dict[str, Any]:
    seconds = None if result.latencies is None else result.latencies.tolist()
    return {
        "metrics": result.metrics,
        "latency_ms": {f"p{p}": None if result.latencies is None else 1e3 * (result.latency(p) or 0) for p in (50, 95)},
        "notes": result.notes,
        "curves": result.curves,
        "per_query": result.per_query,
        "latencies": seconds,
    }


def _result(data: Mapping[str, Any]) -> Result:
    curves = {name: {int(k): value for k, value in curve.items()} for name, curve in data["curves"].items()}
    seconds = None if data["latencies"] is None else np.asarray(data["latencies"], np.float64)
    return Result(data["metrics"], data["per_query"], curves, seconds, data["notes"])
