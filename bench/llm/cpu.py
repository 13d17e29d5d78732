"""The LLM comparison on a CPU: checks every engine's scores, then times them in interleaved rounds; peak memory."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.cross_encoder.cpu import FLOOR_FACTOR, FLOOR_PAIRS
from bench.harness.data import Pairs
from bench.harness.engine import Engine
from bench.harness.host import NOT_INSTALLED, host, versions
from bench.harness.timing import EngineError, Worker, agreement, interleave, tie_band
from bench.llm import engines as llm_engines
from bench.llm import models as llm_models
from fastrerank.engine.prefixes import share_prefixes

DTYPES = tuple(llm_engines.BY_DTYPE)
SWEPT = 32  # documents on which batch sizes are tried
# A bfloat16 engine may err this many times as much as transformers' bfloat16 does, in the mean and at worst.
BFLOAT16_FACTOR = 2.0
_PACKAGES = ("torch", "transformers", "sentence-transformers", "tokenizers", "safetensors", "numpy")


@dataclass(frozen=True)
class Options:
    """What to run; see `python -m bench.run llm --help`."""

    dtypes: tuple[str, ...]
    documents: int
    rounds: int
    threads: int
    memory: bool
    tiny: bool
    data: Path
    cache: Path
    command: str


@dataclass
class Row:
    """One engine: `state` is "ok", "not installed", "failed" or "WRONG" (with `detail`); times in seconds.

    `tokens`: that passed through the network, padding not counted; `memory`: the process's high-water mark in bytes
    after imports, after loading and after scoring; `flop`: of the tokens that passed.
    """

    name: str
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
    tokens: int = 0
    forwards: int = 0
    prefix_tokens: int = 0
    flop: float = 0.0
    memory: dict[str, int] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)


@dataclass
class Result:
    """One precision. `bounds` on the scores' error; `peak` in operations/s, `copy` in bytes/s read plus written.

    `floors`: seconds that no engine can be under which shares prefixes: operations at the peak, weights read once.
    """

    command: str
    versions: dict[str, str]
    bounds: dict[str, float] = field(default_factory=dict)
    spread: float = 0.0
    rows: list[Row] = field(default_factory=list)
    peak: float = 0.0
    copy: float = 0.0
    floors: dict[str, float] = field(default_factory=dict)

    def measured(self) -> list[Row]:
        """Equals the engines that have times."""
        return [row for row in self.rows if row.seconds]


@dataclass
class Findings:
    """Everything a run found, per precision."""

    host: dict[str, Any]
    workload: dict[str, Any]
    results: dict[str, Result] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Equals whether every installed engine was measured."""
        return all(row.state in ("ok", "not installed") for result in self.results.values() for row in result.rows)


def run(options: Options, log: Any, save: Callable[[Findings], None] = lambda _: None) -> Findings:
    """Equals the findings of all precisions; `log` is a rich console for progress, `save` gets what there is.

    Raises
    ------
    ValueError: an unknown precision. FileNotFoundError: no DL19 file.
    """
    for dtype in options.dtypes:
        if dtype not in DTYPES:
            raise ValueError(f"--dtype {dtype!r} is unknown; valid are {', '.join(DTYPES)}")
    findings = Findings(host(options), {})
    for dtype in options.dtypes:
        bench = _Bench(options, dtype, log)
        findings.workload = bench.workload()
        findings.notes = [bench.model.note]
        findings.results[dtype] = bench.result
        bench.run(lambda: save(findings))
    return findings


class _Bench:
    """The steps of one precision."""

    def __init__(self, options: Options, dtype: str, log: Any) -> None:
        self._options, self._dtype, self._log = options, dtype, log
        shape = llm_models.tiny(llm_models.CPU_SHAPE) if options.tiny else llm_models.CPU_SHAPE
        self.model = llm_models.build(shape, options.cache, options.data, dtype)
        self.pairs = self.model.workload(options.data, options.documents)
        installed = {name: found for name, found in versions(_PACKAGES).items() if found != NOT_INSTALLED}
        self.result = Result(options.command, installed)

    def workload(self) -> dict[str, Any]:
        lengths, tokenizer, seconds = self.pairs.lengths, self.model.tokenizer(), []
        for _ in range(3):
            start = time.perf_counter()
            self.model.prompts(self.pairs, tokenizer)
            seconds.append(time.perf_counter() - start)
        return {
            "model": self.model.shape.note,
            "shape": self.model.shape.settings,
            "query": self.pairs.query,
            "documents": len(lengths),
            "tokens": int(lengths.sum()),
            "longest": int(lengths.max()),
            "shortest": int(lengths.min()),
            "tokenise_seconds": min(seconds),
        }

    def run(self, save: Callable[[], None]) -> None:
        result = self.result
        reference = self._reference()
        result.spread = float(np.ptp(reference))
        with ExitStack() as stack:
            workers: dict[str, Worker] = {}
            for kind in llm_engines.BY_DTYPE[self._dtype]:
                self._say(f"{kind.name}: setting up")
                row = Row(kind.name, issubclass(kind, llm_engines.FastRerank), kind.on_text, kind.setup)
                result.rows.append(row)
                worker = self._prepare(kind, row, reference)
                if worker is not None:
                    workers[kind.name] = stack.enter_context(worker)
            result.peak = self._peak(workers)
            times, failed = interleave(
                {name: _scores(worker) for name, worker in workers.items()}, self._options.rounds
            )
            # Whatever else runs on the machine only lowers what is measured, so the higher peak counts.
            result.peak = max(result.peak, self._peak(workers))
            for row in result.rows:
                row.seconds = times.get(row.name, [])
                if row.name in failed:
                    row.state, row.detail = "failed", failed[row.name]
        result.copy = _copy_rate(self._options.threads)
        self._floors()
        save()
        if self._options.memory:
            for row in result.measured():
                self._say(f"{row.name}: memory")
                row.memory = self._memory(row)
            save()

    def _say(self, what: str) -> None:
        self._log.print(f"[dim]{self._dtype}: {what}[/dim]", highlight=False)

    def _worker(self, name: str) -> Worker:
        folder = self.model.path
        return Worker(f"llm/{name}", folder, folder.parent, threads=self._options.threads)

    def _reference(self) -> NDArray[np.float64]:
        """Equals transformers' float32 scores, prompt by prompt, of the weights as this precision stores them."""
        digest = hashlib.sha256(b"".join(row.tobytes() for row in self.pairs.ids)).hexdigest()[:16]
        path = self.model.path.parent / f"reference-{digest}-{len(self.pairs.ids)}.npz"
        if not path.exists():
            self._say("reference: transformers eager, float32 and float64")
            found = []
            names = (("llm-reference-float32", self.pairs), ("llm-reference-float64", self.pairs.head(FLOOR_PAIRS)))
            for name, part in names:
                with self._worker(name) as worker:
                    worker.call("load")
                    worker.call("take", part)
                    found.append(worker.call("scores")[1])
            np.savez(path, float32=found[0], float64=found[1])
        with np.load(path) as stored:
            single, double = stored["float32"], stored["float64"]
        floor = float(np.abs(single[: len(double)] - double).max())
        if self._dtype == "float32":
            # Half a unit in the last place of a logit of 1, in case the few prompts happen to agree exactly.
            self.result.bounds = {"max_delta": FLOOR_FACTOR * max(floor, 2.0**-24)}
        return single

    def _prepare(self, kind: type[Engine], row: Row, reference: NDArray[np.float64]) -> Worker | None:
        """Loads, sweeps and checks one engine; None unless it may be timed."""
        if missing := kind.missing():
            row.state, row.detail = "not installed", f"missing modules: {', '.join(missing)}"
            return None
        row.version = kind.version()
        worker = self._worker(kind.name)
        try:
            row.load_seconds = worker.call("load")
            worker.call("take", self.pairs)
            if kind.on_text:
                row.tokenise_seconds = min(worker.call("tokenise") for _ in range(3))
            self._sweep(worker, kind, row)
            scores = worker.call("scores")[1]
            self._count(row, worker.call("spent") if row.ours else None)
        except EngineError as error:
            row.state, row.detail = "failed", str(error)
        else:
            self._check(row, scores, reference)
        if row.state == "ok":
            return worker
        worker.close()
        return None

    def _sweep(self, worker: Worker, kind: type[Engine], row: Row) -> None:
        worker.call("take", self.pairs.head(SWEPT))
        for setting in kind.settings:
            worker.call("use", setting)
            row.sweep.append((setting, min(worker.call("scores")[0] for _ in range(2))))
        worker.call("take", self.pairs)
        if row.sweep:
            row.setting = min(row.sweep, key=lambda entry: entry[1])[0]
            worker.call("use", row.setting)

    def _check(self, row: Row, scores: NDArray[np.float64], reference: NDArray[np.float64]) -> None:
        rms = float(np.sqrt(np.mean((scores - reference) ** 2)))
        row.check = agreement(scores, reference) | {"rms": rms} | tie_band(scores, reference)
        bounds = self.result.bounds
        if not bounds:  # bfloat16: the first engine is the yardstick
            bounds |= {name: BFLOAT16_FACTOR * row.check[name] for name in ("max_delta", "rms")}
        # Scores nearer than this in the reference may change places.
        bounds["tie band"] = 2 * bounds["max_delta"]
        pairs = {"max_delta": "max_delta", "rms": "rms", "tie band": "widest_swap"}
        for bound, measure in pairs.items():
            if bound in bounds and not row.check[measure] <= bounds[bound]:  # false for NaN
                row.state = "WRONG"
                row.detail = f"{measure} {row.check[measure]:.1e}, at most {bounds[bound]:.1e} allowed"

    def _count(self, row: Row, spent: dict[str, int] | None) -> None:
        lengths, shape = self.pairs.lengths, self.model.shape
        if spent is None:
            row.tokens, row.flop = int(lengths.sum()), shape.flop(lengths, shape.settings["vocab_size"])
            row.forwards = -(-len(lengths) // row.setting["batch"])
            return
        row.tokens, row.forwards, row.prefix_tokens = spent["tokens"], spent["forwards"], spent["prefix_tokens"]
        row.flop = shape.shared_flop(groups_of(self.pairs) if row.prefix_tokens else [(0, lengths)])

    def _floors(self) -> None:
        best = [row for row in self.result.measured() if row.prefix_tokens]
        if not best:
            return
        row, shape = best[0], self.model.shape
        itemsize = {"float32": 4, "bfloat16": 2}[self._dtype]
        weights = shape.settings["num_hidden_layers"] * shape.linear()
        moved = itemsize * (row.forwards * weights + row.tokens * shape.settings["hidden_size"])
        self.result.floors = {
            "flop": row.flop,
            "operations": row.flop / self.result.peak,
            "bytes": moved,
            "memory": moved / self.result.copy,
        }

    def _peak(self, workers: dict[str, Worker]) -> float:
        names = [kind.name for kind in llm_engines.BY_DTYPE[self._dtype] if issubclass(kind, llm_engines.FastRerank)]
        ours = next((workers[name] for name in names if name in workers), None)
        return 0.0 if ours is None else float(ours.call("host_peak", self._dtype, self._options.threads))

    def _memory(self, row: Row) -> dict[str, int]:
        """Equals the high-water marks of a fresh process, in the setting that was timed."""
        found = {}
        with self._worker(row.name) as worker:
            worker.call("imports")
            found["imports"] = worker.call("peak_bytes")
            worker.call("load")
            found["load"] = worker.call("peak_bytes")
            worker.call("take", self.pairs)
            if row.setting:
                worker.call("use", row.setting)
            worker.call("scores")
            found["scores"] = worker.call("peak_bytes")
        return found


def groups_of(pairs: Pairs) -> list[tuple[int, NDArray[np.int64]]]:
    """Equals the groups that our engine finds, as `Shape.shared_flop` takes them."""
    lengths = pairs.lengths
    return [(group.length, lengths[list(group.members)]) for group in share_prefixes(pairs.ids)]


def _scores(worker: Worker) -> Callable[[], float]:
    return lambda: float(worker.call("scores")[0])


def _copy_rate(threads: int) -> float:
    """Bytes/s read plus written of a copy of 256 MiB."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        source = torch.ones(1 << 26)
        target = torch.empty_like(source)
        seconds = []
        for _ in range(6):
            start = time.perf_counter()
            target.copy_(source)
            seconds.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return 2.0 * source.nbytes / min(seconds)
