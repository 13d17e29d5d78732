"""The GPU comparison: checks every engine's scores, then times them in interleaved rounds; kernels, a profile."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench import kernels as gpu_kernels
from bench.cross_encoder import gpu_engines, gpu_models
from bench.cross_encoder.cpu import TAU_FLOOR
from bench.cross_encoder.gpu_engines import GpuEngine, NotHere, failing_as
from bench.cross_encoder.gpu_models import GpuModel
from bench.cur import gpu as gpu_cur
from bench.everything import profile as gpu_profile
from bench.harness import data
from bench.harness.host import clocks, gpu_host
from bench.harness.timing import EngineError, agreement, interleave
from bench.llm import gpu as gpu_llm
from bench.llm import models as llm_models

PARTS = ("ceilings", "attention", "attention_mass", "label_logits", "cur", "engines", "latency", "profile", "llm")
# Seconds of torch.compile per layer, before the first compilation of this run has been timed.
_COMPILE_GUESS = 3.0


@dataclass(frozen=True)
class Options:
    """What to run; see `python -m bench.run all --help`. `seconds`: compiled engines start only while they last."""

    device: str
    tiny: bool
    rounds: int
    parts: tuple[str, ...]
    models: tuple[str, ...]
    llms: tuple[str, ...]
    compile: bool
    seconds: float
    data: tuple[Path, ...]
    cache: Path
    command: str

    @property
    def sizes(self) -> tuple[int, int]:
        """Equals the documents of a small request, whose launches count, and of a usual one."""
        return (6, 40) if self.tiny else (20, 100)


@dataclass
class Row:
    """One engine on one model. `state`: "ok", "not here", "left out", "failed" or "WRONG", with `detail`.

    `seconds`: from token ids to logits on the host, per documents; `peak_bytes`: device memory at its highest, weights
    included, other engines not; `graphs`: tokens of the CUDA graphs that were replayed.
    """

    name: str
    setup: str
    state: str = "ok"
    detail: str = ""
    batch: int | None = None
    sweep: dict[int, float] = field(default_factory=dict)
    check: dict[str, float] = field(default_factory=dict)
    load_seconds: float = 0.0
    first_seconds: float = 0.0
    peak_bytes: int | None = None
    graphs: list[int] = field(default_factory=list)
    seconds: dict[int, list[float]] = field(default_factory=dict)


@dataclass
class ModelResult:
    """One model: `tokens` and `flop` per documents, and the rms error that engines are allowed."""

    name: str
    note: str
    tokens: dict[int, int]
    flop: dict[int, float]
    bound: float
    rows: list[Row] = field(default_factory=list)
    latency: dict[str, list[float]] = field(default_factory=dict)
    profile: gpu_profile.Profile | None = None


@dataclass
class Findings:
    """Everything a run found; times in seconds, rates per second."""

    host: dict[str, Any]
    ceilings: dict[str, float] = field(default_factory=dict)
    cases: list[dict[str, Any]] = field(default_factory=list)
    attention: list[gpu_kernels.KernelResult] = field(default_factory=list)
    attention_mass: list[gpu_kernels.KernelResult] = field(default_factory=list)
    label_logits: list[gpu_kernels.KernelResult] = field(default_factory=list)
    cur: list[gpu_kernels.KernelResult] = field(default_factory=list)
    models: list[ModelResult] = field(default_factory=list)
    llms: list[gpu_llm.LlmResult] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def sound(self) -> bool:
        """Equals whether nothing failed and nothing was wrong."""
        if self.failures:
            return False
        states = [row.state for model in self.models for row in model.rows]
        states += [row.state for llm in self.llms for row in llm.rows]
        states += [one.state for one in (*self.attention, *self.attention_mass, *self.label_logits, *self.cur)]
        return all(state in ("ok", "not here", "left out") for state in states)


def run(options: Options, log: Any, save: Callable[[Findings], None] = lambda _: None) -> Findings:
    """Equals the findings of all parts; `save` gets what there is after each.

    Raises
    ------
    ValueError: an unknown part or model, or a CPU without `tiny`; RuntimeError: no usable GPU.
    """
    shapes, llms = tuple(gpu_models.SHAPES), tuple(llm_models.SHAPES)
    for what, given, valid in (
        ("part", options.parts, PARTS),
        ("model", options.models, shapes),
        ("language model", options.llms, llms),
    ):
        for one in given:
            if one not in valid:
                raise ValueError(f"{what} {one!r} is unknown; valid are {', '.join(valid)}")
    device = torch.device(options.device)
    if device.type != "cuda" and not options.tiny:
        raise ValueError("device 'cpu' runs tiny shapes only, to try the benchmark out: give --tiny")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} finds no usable CUDA device")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    bench = _Bench(options, device, log)
    bench.run(save)
    return bench.findings


class _Bench:
    """The steps of one run."""

    def __init__(self, options: Options, device: torch.device, log: Any) -> None:
        self._options, self._device, self._log = options, device, log
        self._start = time.perf_counter()
        self._compile_cost = 0.5 if options.tiny else _COMPILE_GUESS
        about = {"command": options.command, "device": options.device, "tiny": options.tiny, "rounds": options.rounds}
        self.findings = Findings(about | gpu_host(options.device))

    def run(self, save: Callable[[Findings], None]) -> None:
        options, findings, self._save = self._options, self.findings, save
        folder, tokenizer = self._texts()
        parts: list[tuple[str, Callable[[], None]]] = [
            ("ceilings", self._ceilings),
            ("attention", lambda: self._attention(folder, tokenizer)),
            ("attention_mass", self._attention_mass),
            ("label_logits", self._label_logits),
            ("cur", self._cur),
        ]
        todo = [(name, part) for name, part in parts if name in options.parts]
        if {"engines", "latency", "profile"} & {*options.parts}:
            todo += [(name, lambda name=name: self._build(name, folder, tokenizer)) for name in options.models]
        if "llm" in options.parts:
            todo += [(name, lambda name=name: self._llm(name, folder)) for name in options.llms]
        for name, part in todo:
            try:
                part()
            except Exception as error:
                findings.failures[name] = "".join(traceback.format_exception(error, limit=-4))
                self._say(f"{name}: failed: {type(error).__name__}: {error}")
            self._settle()
            findings.seconds = time.perf_counter() - self._start
            save(findings)
        findings.host["clocks after"] = clocks()
        findings.seconds = time.perf_counter() - self._start
        save(findings)

    def _ceilings(self) -> None:
        self._say("ceilings")
        self.findings.ceilings = gpu_kernels.ceilings(
            self._device, tiny=self._options.tiny, rounds=self._options.rounds
        )

    def _build(self, name: str, folder: Path, tokenizer: Path) -> None:
        self._say(f"{name}: building")
        options = self._options
        model = gpu_models.build(name, options.cache, tokenizer, tiny=options.tiny, device=str(self._device))
        self._model(model, self._workload(model, folder))

    def _llm(self, name: str, folder: Path) -> None:
        options, result = self._options, gpu_llm.LlmResult(name, "", {}, {})
        self.findings.llms.append(result)
        gpu_llm.measure(
            name,
            result,
            folder,
            options.cache,
            self._device,
            tiny=options.tiny,
            rounds=min(options.rounds, 5),
            say=self._say,
        )

    def _settle(self) -> None:
        gc.collect()
        if self._device.type == "cuda":
            with suppress(RuntimeError):  # an error that a kernel left behind, which its part has said
                torch.cuda.empty_cache()

    def _say(self, what: str) -> None:
        self._log.print(f"[dim]{time.perf_counter() - self._start:5.0f} s  {what}[/dim]", highlight=False)

    def _texts(self) -> tuple[Path, Path]:
        self._options.cache.mkdir(parents=True, exist_ok=True)
        folder, note = gpu_models.corpus(self._options.data)
        real = folder is not None
        if folder is None:
            documents = 40 if self._options.tiny else 200
            folder = gpu_models.synthetic(self._options.cache, documents=documents)
        tokenizer, what = gpu_models.tokenizer_of(folder, self._options.cache, real_text=real)
        self.findings.notes = [f"Texts: {note}.", f"Tokens: {what}."]
        return folder, tokenizer

    def _workload(self, model: GpuModel, folder: Path) -> data.Workload:
        documents = self._options.sizes[-1]
        return data.load(folder, data.PairTokenizer(model.path), documents=documents, length="natural")

    def _attention(self, folder: Path, tokenizer: Path) -> None:
        self._say("attention alone")
        pairs = data.load(
            folder, data.PairTokenizer(tokenizer.parent), documents=self._options.sizes[-1], length="natural"
        ).pairs
        shapes = {name: gpu_models.SHAPES[name].heads for name in self._options.models}
        if self._options.tiny:
            shapes = {name: (2, size) for name, (_, size) in shapes.items()}
        for case in gpu_kernels.attention_cases(pairs.lengths, shapes, tiny=self._options.tiny):
            itemsize = getattr(torch, gpu_engines.DTYPE).itemsize
            self.findings.cases.append({"name": case.name, "flop": case.flop, "bytes": case.bytes(itemsize)})
            self.findings.attention += gpu_kernels.attention(case, self._device, 3 * self._options.rounds)

    def _attention_mass(self) -> None:
        self._say("attention mass alone")
        itemsize = getattr(torch, gpu_engines.DTYPE).itemsize
        for case in gpu_kernels.mass_cases(tiny=self._options.tiny):
            self.findings.cases.append({"name": case.name, "flop": case.flop, "bytes": case.bytes(itemsize)})
            self.findings.attention_mass += gpu_kernels.attention_mass(case, self._device, 3 * self._options.rounds)

    def _label_logits(self) -> None:
        self._say("label logits alone")
        itemsize = getattr(torch, gpu_engines.DTYPE).itemsize
        for case in gpu_kernels.label_cases(tiny=self._options.tiny):
            self.findings.cases.append({"name": case.name, "flop": case.flop, "bytes": case.bytes(itemsize)})
            self.findings.label_logits += gpu_kernels.label_logits(case, self._device, 3 * self._options.rounds)

    def _cur(self) -> None:
        for case in gpu_cur.cases(tiny=self._options.tiny):
            self._say(f"scan of {case.name}")
            self.findings.cases.append({"name": case.name, "flop": case.flop, "bytes": case.bytes})
            self.findings.cur += gpu_cur.measure(case, self._device, 3 * self._options.rounds)
            self._save(self.findings)
            gc.collect()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()

    def _model(self, model: GpuModel, work: data.Workload) -> None:
        options, sizes = self._options, self._options.sizes
        whole = {size: work.pairs.head(size) for size in sizes}
        result = ModelResult(
            model.shape.name,
            model.note,
            {size: int(pairs.lengths.sum()) for size, pairs in whole.items()},
            {size: model.flop(pairs.lengths) for size, pairs in whole.items()},
            0.0,
        )
        self.findings.models.append(result)
        if "engines" in options.parts:
            self._say(f"{model.shape.name}: reference")
            reference = self._reference(model, whole[sizes[-1]])
            engines = self._engines(model, result, whole, reference)
            for size, pairs in whole.items():
                self._rounds(result, engines, size, pairs)
                self._save(self.findings)
            engines.clear()
        if "latency" in options.parts and model.shape.name == "minilm":
            self._say(f"{model.shape.name}: from text to ranked list")
            self._latency(model, result, work.requests)
        if "profile" in options.parts:
            self._say(f"{model.shape.name}: profile")
            engine = gpu_engines.Eager(model, self._device)
            engine.load()
            result.profile = gpu_profile.profile(lambda: engine.scores(whole[sizes[-1]]), self._device)
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _reference(self, model: GpuModel, pairs: data.Pairs) -> NDArray[np.float64]:
        engine = gpu_engines.Reference(model, self._device)
        engine.load()
        return engine.scores(pairs).astype(np.float64)

    def _engines(
        self, model: GpuModel, result: ModelResult, whole: dict[int, data.Pairs], reference: NDArray[np.float64]
    ) -> dict[str, GpuEngine]:
        """Loads and checks all engines; those that are sound. The first one's error is everyone's yardstick."""
        kinds = (*gpu_engines.RIVALS, *gpu_engines.OURS, *(gpu_engines.COMPILED if self._options.compile else ()))
        engines: dict[str, GpuEngine] = {}
        layers = int(model.config["num_hidden_layers"])
        for kind in kinds:
            row = Row(kind.name, kind.setup)
            result.rows.append(row)
            wanted, left = (
                1.5 * self._compile_cost * layers,
                self._options.seconds - (time.perf_counter() - self._start),
            )
            if kind.compiled and wanted > left:
                row.state, row.detail = "left out", f"compiling may take {wanted:.0f} s, {max(left, 0):.0f} s are left"
                continue
            self._say(f"{model.shape.name}: {kind.name}")
            engine = kind(model, self._device)
            try:
                with failing_as(EngineError, kind.name), self._memory(row):
                    self._prepare(engine, row, whole)
                if kind.compiled:
                    self._compile_cost = max(0.1, (row.load_seconds + row.first_seconds) / layers)
                self._check(engine, row, result, whole, reference)
            except NotHere as reason:
                row.state, row.detail = "not here", str(reason)
            except EngineError as error:
                row.state, row.detail = "failed", str(error)
            if row.state == "ok":
                engines[kind.name] = engine
            elif not engines and kind is kinds[0]:
                raise RuntimeError(f"{kind.name}, the yardstick, is {row.state} on {model.shape.name}: {row.detail}")
        return engines

    def _prepare(self, engine: GpuEngine, row: Row, whole: dict[int, data.Pairs]) -> None:
        start = time.perf_counter()
        engine.load()
        row.load_seconds = time.perf_counter() - start
        pairs = whole[self._options.sizes[-1]]
        start = time.perf_counter()
        engine.scores(pairs)
        row.first_seconds = time.perf_counter() - start
        for batch in engine.settings:
            engine.batch = batch
            engine.scores(pairs)
            row.sweep[batch] = min(_seconds(engine, pairs) for _ in range(3))
        if row.sweep:
            engine.batch = min(row.sweep, key=lambda batch: row.sweep[batch])
        row.batch = engine.batch
        if row.sweep and self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)  # the other batch sizes' peak is not this one's
        for part in whole.values():
            engine.scores(part)

    @contextmanager
    def _memory(self, row: Row) -> Iterator[None]:
        """Measures the highest device memory inside the context, above what was held before."""
        if self._device.type != "cuda":
            yield
            return
        gc.collect()
        torch.cuda.synchronize(self._device)
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        yield
        row.peak_bytes = torch.cuda.max_memory_allocated(self._device) - before

    def _check(
        self,
        engine: GpuEngine,
        row: Row,
        result: ModelResult,
        whole: dict[int, data.Pairs],
        reference: NDArray[np.float64],
    ) -> None:
        """WRONG is an engine whose rms error against float32 is over twice that of sentence-transformers' default.

        Twice its error on the larger request. The squared errors of the smaller one's n scores are some of all N, whose
        sum is at most N times the square of the bound: so sqrt(N / n) times it is allowed there.
        """
        for size, pairs in reversed(whole.items()):
            with failing_as(EngineError, engine.name):
                logits = engine.scores(pairs).astype(np.float64)
            rms = float(np.sqrt(np.mean((logits - reference[:size]) ** 2)))
            row.check[f"rms at {size}"] = rms
            if size == max(whole):
                row.check |= agreement(logits, reference)
                if engine.name == gpu_engines.RIVALS[0].name:
                    result.bound = 2 * rms
            allowed = result.bound * (max(whole) / size) ** 0.5
            if not rms <= allowed:  # false for NaN
                row.state = "WRONG"
                row.detail = f"rms error {rms:.2e} on {size} documents, at most {allowed:.2e} allowed"
        model = getattr(getattr(engine, "encoder", None), "model", None)
        graphs = getattr(getattr(model, "runner", None), "graphs", None)
        if graphs is not None:
            row.graphs = sorted(graphs._graphs)
            if graphs.failed:
                row.state, row.detail = "failed", "a CUDA graph could not be captured; see the log"

    def _rounds(self, result: ModelResult, engines: dict[str, GpuEngine], size: int, pairs: data.Pairs) -> None:
        def once(engine: GpuEngine) -> Callable[[], float]:
            def timed() -> float:
                with failing_as(EngineError, engine.name):
                    engine.scores(pairs)  # untimed: the engine before has left other things in the caches
                    return _seconds(engine, pairs)

            return timed

        runs = {name: once(engine) for name, engine in engines.items()}
        times, failed = interleave(runs, self._options.rounds, settle=0)
        for row in result.rows:
            if row.name in failed:
                row.state, row.detail = "failed", failed[row.name]
            elif row.name in times:
                row.seconds[size] = times[row.name]

    def _latency(self, model: GpuModel, result: ModelResult, requests: Sequence[tuple[str, list[str]]]) -> None:
        """Seconds of `rank`, from a query and its passages as text, one request per sample."""
        from sentence_transformers import CrossEncoder as Theirs

        from fastrerank import CrossEncoder as Ours

        size, device = self._options.sizes[-1], str(self._device)
        ours = Ours(str(model.path), device=device, engine="torch", dtype=gpu_engines.DTYPE)
        kwargs = {"dtype": getattr(torch, gpu_engines.DTYPE), "attn_implementation": "sdpa"}
        rankers: dict[str, Any] = {
            "fastrerank": ours,
            "sentence-transformers": Theirs(str(model.path), device=device, model_kwargs=kwargs),
        }
        scores = []
        for ranker in rankers.values():
            ranked = {}
            for query, documents in requests[:3]:  # warm: every batch size is captured, every kernel compiled
                ranked = {row["corpus_id"]: row["score"] for row in ranker.rank(query, documents[:size])}
            scores.append(np.array([float(ranked[i]) for i in range(size)]))
        tau = agreement(scores[0], scores[1])["tau"]
        if tau < TAU_FLOOR:
            raise RuntimeError(f"rank: Kendall tau {tau:.3f} between fastrerank and sentence-transformers: not timed")
        queue = {name: iter(requests) for name in rankers}

        def once(name: str) -> Callable[[], float]:
            def timed() -> float:
                query, documents = next(queue[name])
                start = time.perf_counter()
                rankers[name].rank(query, documents[:size])
                return time.perf_counter() - start

            return timed

        runs = {name: once(name) for name in rankers}
        result.latency, _ = interleave(runs, len(requests) if not self._options.tiny else 2, settle=0)


def _seconds(engine: GpuEngine, pairs: data.Pairs) -> float:
    start = time.perf_counter()
    engine.scores(pairs)
    return time.perf_counter() - start
