"""The cross-encoder comparison: checks every engine's scores, then times them in interleaved rounds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.cross_encoder import rivals
from bench.harness import data, models
from bench.harness.engine import Engine
from bench.harness.host import host
from bench.harness.timing import EngineError, Worker, agreement, interleave

PRECISIONS = ("float32", "bfloat16", "int8")
SIZES = (10, 25, 50, 100, 200)  # documents per request of the latency table
FLOOR_PAIRS = 16  # pairs that are also scored in float64
# A float32 engine may differ from the float32 reference by this many times the reference's own distance from float64:
# other summation orders and other exp/tanh/erf polynomials cost a few times it (2-3 here); a wrong layer costs 1e4.
FLOOR_FACTOR = 16
# A lower precision below this Kendall tau is broken, not rounded: the worst sound one seen (random head) has 0.88.
TAU_FLOOR = 0.5


@dataclass(frozen=True)
class Options:
    """What to run; see `python -m bench.run cross-encoder --help`."""

    model: str
    length: str
    documents: int
    rounds: int
    engines: tuple[str, ...]
    threads: int
    quick: bool
    data: Path
    cache: Path
    command: str


@dataclass
class EngineResult:
    """One row: `state` is "ok", "not installed", "failed" or "WRONG" (with `detail`); times in seconds."""

    name: str
    precision: str
    ours: bool
    on_text: bool
    setup: str
    version: str = ""
    state: str = "ok"
    detail: str = ""
    setting: dict[str, Any] = field(default_factory=dict)
    sweep: list[tuple[dict[str, Any], float]] = field(default_factory=list)
    check: dict[str, float] = field(default_factory=dict)
    load_seconds: float = 0.0
    tokenise_seconds: float | None = None
    peak_bytes: int | None = None
    seconds: list[float] = field(default_factory=list)


@dataclass
class Findings:
    """Everything a run found; `report` prints it and writes it as JSON. Peaks in operations/s, times in seconds."""

    host: dict[str, Any]
    workload: dict[str, Any]
    engines: list[EngineResult]
    flop: float
    peaks: dict[str, float]
    bound: float
    latency: dict[str, dict[int, list[float]]] = field(default_factory=dict)
    stages: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    variants: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    quality: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def measured(self) -> list[EngineResult]:
        """Equals the engines that have times."""
        return [engine for engine in self.engines if engine.seconds]

    @property
    def sound(self) -> bool:
        """Equals whether every installed engine was measured."""
        return all(engine.state in ("ok", "not installed") for engine in self.engines)


def select(names: Iterable[str]) -> tuple[str, ...]:
    """Equals our native engines and those whose name begins with one of `names` (all rivals when there are none).

    Raises
    ------
    ValueError: a name that no engine but the native ones begins with.
    """
    native, named, rest = ([engine.name for engine in some] for some in (rivals.OURS, rivals.NAMED, rivals.RIVALS))
    wanted = [name.strip() for name in names]
    for name in wanted:
        if not any(known.startswith(name) for known in named + rest):
            valid = ", ".join(rest + named)
            raise ValueError(f"--against {name!r} names no rival; valid are {valid} or a beginning of one")
    chosen = [name for name in named + rest if name.startswith(tuple(wanted))] if wanted else rest
    return (*native, *chosen)


def run(options: Options, log: Any, save: Callable[[Findings], None] = lambda _: None) -> Findings:
    """Equals the findings of the whole comparison; `log` is a rich console for progress.

    `save` gets the findings so far after each part, because a run takes minutes and may be broken off.
    """
    model = models.build(options.model, options.cache)
    tokenizer = data.PairTokenizer(model.path)
    work = data.load(options.data, tokenizer, documents=options.documents, length=options.length)
    bench = _Bench(options, model, work, log)
    reference, bound = bench.reference()
    findings = Findings(
        host=host(options),
        workload={
            "model": model.note,
            "query": work.pairs.query,
            "documents": options.documents,
            "length": options.length,
            "tokens": int(work.pairs.lengths.sum()),
            "longest": int(work.pairs.lengths.max()),
        },
        engines=[],
        flop=model.flop(work.pairs.lengths),
        peaks=bench.host_peaks(),
        bound=bound,
        notes=[model.note],
    )
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for name in options.engines:
            log.print(f"[dim]{name}: setting up[/dim]")
            result, worker = bench.prepare(name, reference, bound)
            findings.engines.append(result)
            if worker is not None:
                workers[name] = stack.enter_context(worker)
        rows = {result.name: result for result in findings.engines}
        times, failed = bench.rounds("main table", {name: _scores(worker) for name, worker in workers.items()})
        # A peak is a ceiling: whatever else runs on the machine only lowers what is measured, so the higher one counts.
        later = bench.host_peaks()
        findings.peaks = {dtype: max(value, later[dtype]) for dtype, value in findings.peaks.items()}
        for name, message in failed.items():
            rows[name].state, rows[name].detail = "failed", message
        for name, seconds in times.items():
            rows[name].seconds = seconds
            if rows[name].on_text:
                rows[name].tokenise_seconds = float(np.median([workers[name].call("tokenise") for _ in range(3)]))
        save(findings)
        if options.quick:
            return findings
        findings.latency, findings.stages = bench.latencies(_fastest(findings), workers)
        save(findings)
    for result in findings.measured():
        result.peak_bytes = bench.peak_memory(result)
    save(findings)
    native = [row for row in findings.measured() if rivals.ENGINES[row.name] in rivals.OURS]
    findings.variants = bench.variants([row.name for row in native])
    findings.quality = bench.quality(native)
    save(findings)
    return findings


class _Bench:
    """The steps of one run, which all need the same four things."""

    def __init__(self, options: Options, model: models.BenchModel, work: data.Workload, log: Any) -> None:
        self._options, self._model, self._work, self._log = options, model, work, log

    def _worker(self, name: str, *, threads: int | None = None, environment: Mapping[str, str] | None = None) -> Worker:
        folder = self._model.path.parent
        threads = threads or self._options.threads
        return Worker(name, self._model.path, folder, threads=threads, environment=environment)

    def reference(self) -> tuple[NDArray[np.float64], float]:
        """Equals transformers' float32 logits of the pairs, and how far a float32 engine may be from them."""
        pairs = self._work.pairs
        digest = hashlib.sha256(b"".join([*(row.tobytes() for row in (*pairs.ids, *pairs.types))])).hexdigest()[:16]
        path = self._model.path.parent / f"reference-{digest}-{len(pairs.ids)}.npz"
        if not path.exists():
            self._log.print("[dim]reference: transformers eager, float32 and float64[/dim]")
            found = []
            for name, part in (("reference-float32", pairs), ("reference-float64", pairs.head(FLOOR_PAIRS))):
                with self._worker(name) as worker:
                    worker.call("load")
                    worker.call("take", part)
                    found.append(worker.call("scores")[1])
            np.savez(path, float32=found[0], float64=found[1])
        with np.load(path) as stored:
            single, double = stored["float32"], stored["float64"]
        floor = float(np.abs(single[: len(double)] - double).max())
        # Half a unit in the last place of the largest logit, in case the few pairs happen to agree exactly.
        return single, FLOOR_FACTOR * max(floor, float(np.abs(single).max()) * 2.0**-24)

    def prepare(self, name: str, reference: NDArray[np.float64], bound: float) -> tuple[EngineResult, Worker | None]:
        """Converts, loads, sweeps and checks one engine; the worker is None unless it may be timed."""
        kind = rivals.ENGINES[name]
        result = EngineResult(name, kind.precision, kind in rivals.OURS + rivals.NAMED, kind.on_text, kind.setup)
        if missing := kind.missing():
            result.state, result.detail = "not installed", f"missing modules: {', '.join(missing)}"
            return result, None
        worker = None
        try:
            result.version = kind.version()
            if kind.convert is not Engine.convert:
                with self._worker(name) as converter:
                    converter.call("convert", self._work.calibration if kind.calibrated else [])
            worker = self._worker(name)
            result.load_seconds = worker.call("load")
            worker.call("take", self._work.pairs)
            self._sweep(worker, kind, result)
            result.check = agreement(worker.call("scores")[1], reference)
        except EngineError as error:
            result.state, result.detail = "failed", str(error)
        else:
            exact, delta, tau = kind.precision == "float32", result.check["max_delta"], result.check["tau"]
            if delta <= bound if exact else tau >= TAU_FLOOR:  # false for NaN
                return result, worker
            wanted = f"at most {bound:.1e} allowed" if exact else f"tau of at least {TAU_FLOOR} expected"
            result.state, result.detail = "WRONG", f"max |difference| {delta:.1e}, Kendall tau {tau:.3f}; {wanted}"
        if worker is not None:
            worker.close()
        return result, None

    def _sweep(self, worker: Worker, kind: type[Engine], result: EngineResult) -> None:
        settings = kind.settings
        if self._options.quick and settings:
            settings = ({"batch": 8} | {key: value for key, value in settings[0].items() if key != "batch"},)
        for setting in settings:
            worker.call("use", setting)
            if len(settings) > 1:
                worker.call("scores")  # engines that compile per shape do it here
                result.sweep.append((setting, min(worker.call("scores")[0] for _ in range(2))))
        if settings:
            best = min(result.sweep, key=lambda entry: entry[1])[0] if result.sweep else settings[0]
            worker.call("use", best)
            result.setting = best

    def host_peaks(self) -> dict[str, float]:
        """Equals operations/s that this host sustains in registers, per precision; empty without fastrerank."""
        ours = rivals.OURS[0]
        if ours.missing():
            return {}
        with self._worker(ours.name) as worker:
            return {dtype: worker.call("host_peak", dtype, self._options.threads) for dtype in PRECISIONS}

    def rounds(
        self, title: str, runs: Mapping[str, Callable[[], float]], count: int = 0
    ) -> tuple[dict[str, list[float]], dict[str, str]]:
        """Equals `interleave` with a progress bar; what fails is also said there."""
        from rich.progress import Progress

        count = count or self._options.rounds
        with Progress(console=self._log, transient=True) as progress:
            task = progress.add_task(title, total=count * len(runs))
            seconds, failed = interleave(runs, count, lambda: progress.advance(task))
        for message in failed.values():
            self._log.print(f"[red]{message}[/red]", highlight=False)
        return seconds, failed

    def latencies(
        self, names: Sequence[str], workers: Mapping[str, Worker]
    ) -> tuple[dict[str, dict[int, list[float]]], dict[str, dict[str, list[float]]]]:
        """Equals seconds from text to ranked list per engine and request size, and seconds per stage of ours at 100."""
        requests = self._work.requests
        latency: dict[str, dict[int, list[float]]] = {name: {} for name in names}
        stages: dict[str, dict[str, list[float]]] = {}
        for size in SIZES:

            def ranker(name: str, size: int = size) -> Callable[[], float]:
                queue = iter(requests * 2)

                def once() -> float:
                    query, documents = next(queue)
                    seconds, parts = workers[name].call("rank", query, documents[:size])
                    parts.pop("total", None)  # the sum of the others
                    if size == 100 and parts:
                        for stage, value in (parts | {"whole call": seconds}).items():
                            stages.setdefault(name, {}).setdefault(stage, []).append(value)
                    return float(seconds)

                return once

            count = min(2 * self._options.rounds, len(requests))
            times, _ = self.rounds(f"{size} documents", {name: ranker(name) for name in names}, count)
            for name, seconds in times.items():
                latency[name][size] = seconds
        return latency, stages

    def peak_memory(self, result: EngineResult) -> int:
        """Equals the peak resident bytes of a fresh process that loads the engine and scores the pairs."""
        with self._worker(result.name) as worker:
            worker.call("load")
            worker.call("take", self._work.pairs)
            if result.setting:
                worker.call("use", result.setting)
            worker.call("scores")
            return int(worker.call("peak_bytes"))

    def variants(self, names: Sequence[str]) -> dict[str, dict[str, list[float]]]:
        """Equals seconds of ours, per engine, with all threads, with one thread, and at the AVX2 level."""
        kinds: dict[str, tuple[int, dict[str, str]]] = {
            "as measured": (self._options.threads, {}),
            "avx2 level": (self._options.threads, {"FASTRERANK_ISA": "avx2"}),
        }
        if self._options.threads > 1:
            kinds["1 thread"] = (1, {})
        found: dict[str, dict[str, list[float]]] = {}
        for name in names:
            with ExitStack() as stack:
                workers = {}
                for label, (threads, environment) in kinds.items():
                    worker = stack.enter_context(self._worker(name, threads=threads, environment=environment))
                    try:
                        worker.call("load")
                    except EngineError as error:
                        self._log.print(f"[yellow]{name}, {label}: {error}[/yellow]", highlight=False)
                        continue
                    worker.call("take", self._work.pairs)
                    workers[label] = worker
                found[name], _ = self.rounds(name, {label: _scores(worker) for label, worker in workers.items()})
        return found

    def quality(self, rows: Sequence[EngineResult]) -> dict[str, float]:
        """Equals nDCG@10 on DL19 of all-MiniLM-L6-v2's late interaction in each of our precisions."""
        if not rows:
            return {}
        try:
            from fastrerank import LateInteractionReranker
            from fastrerank.evaluation import evaluate
        except ImportError as error:
            self._log.print(f"[yellow]nDCG@10 is left out: {error}[/yellow]", highlight=False)
            return {}
        found = {}
        for row in rows:
            self._log.print(f"[dim]nDCG@10 in {row.precision}[/dim]")
            reranker = LateInteractionReranker(
                str(models.minilm_folder()), dtype=row.precision, num_threads=self._options.threads
            )
            found[row.name] = float(evaluate(reranker, self._options.data / data.DL19).metrics["nDCG@10"])
        return found


def _scores(worker: Worker) -> Callable[[], float]:
    return lambda: float(worker.call("scores")[0])


def _fastest(findings: Findings) -> list[str]:
    """Ours, sentence-transformers, and the two fastest other rivals."""
    chosen = [row.name for row in findings.measured() if row.ours or row.on_text]
    others = [row for row in findings.measured() if row.name not in chosen]
    return chosen + [row.name for row in sorted(others, key=lambda row: float(np.median(row.seconds)))[:2]]
