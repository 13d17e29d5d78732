"""The comparison of attention read-outs on a CPU: checks every engine's masses, then times them, then their memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.cross_encoder.cpu import FLOOR_FACTOR
from bench.harness import data
from bench.harness.host import host, versions
from bench.harness.results import write_precisions
from bench.harness.tables import Table, show_tables
from bench.harness.timing import EngineError, Worker, interleave, percentile, ratio
from bench.icr import engines as icr_engines
from bench.icr.engines import IcrEngine, IcrPrompt, document_scores, increments, of_prompt, random_prompt
from bench.llm import models as llm_models

DTYPES = tuple(icr_engines.BY_DTYPE)
SHAPE = llm_models.Shape(
    "qwen2.5-0.5b",
    "qwen2",
    {
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 32768,
        "head_dim": 64,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    151643,
    "Qwen2.5-0.5B's shape (24 layers, 896 wide, 14 heads, 2 key-value heads): random weights",
)
CONTEXT, TINY_CONTEXT = 2048, 400
SHORT = 4  # documents of the prompt that float64 runs too
MEMORY, TINY_MEMORY = (1024, 2048, 4096, 8192), (128, 256, 512)
# A bfloat16 engine may err this many times as much as eager bfloat16 does.
BFLOAT16_FACTOR = 2.0
MIB = 2.0**20


@dataclass(frozen=True)
class Options:
    """What to run; see `python -m bench.run icr --help`."""

    dtypes: tuple[str, ...]
    rounds: int
    threads: int
    memory: bool
    tiny: bool
    data: Path
    cache: Path
    command: str


@dataclass
class Row:
    """One engine: `state` is "ok", "failed" or "WRONG"; times in seconds; `check`: errors relative to the largest mass.

    `memory`: (context tokens, peak bytes while a prompt of so many was read).
    """

    name: str
    setup: str
    version: str
    reads: str
    state: str = "ok"
    detail: str = ""
    check: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    load_seconds: float = 0.0
    seconds: list[float] = field(default_factory=list)
    memory: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class Result:
    """One precision, and the bound on its engines' errors."""

    bound: float = 0.0
    rows: list[Row] = field(default_factory=list)


@dataclass
class Findings:
    """Everything a run found, per precision."""

    host: dict[str, Any]
    workload: dict[str, Any]
    results: dict[str, Result] = field(default_factory=dict)

    @property
    def sound(self) -> bool:
        """Equals whether every engine was measured."""
        return all(row.state == "ok" for result in self.results.values() for row in result.rows)


def run(options: Options, log: Any, save: Callable[[Findings], None] = lambda _: None) -> Findings:
    """Equals the findings of all precisions; `log` is a rich console for progress, `save` gets what there is.

    Raises
    ------
    ValueError: an unknown precision. FileNotFoundError: no DL19 file.
    """
    for dtype in options.dtypes:
        if dtype not in DTYPES:
            raise ValueError(f"--dtype {dtype!r} is unknown; valid are {', '.join(DTYPES)}")
    packages = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
    findings = Findings(host(options) | {"versions": versions(packages)}, {})
    for dtype in options.dtypes:
        bench = _Bench(options, dtype, log)
        findings.workload = bench.workload()
        findings.results[dtype] = bench.result
        bench.run(lambda: save(findings))
    return findings


class _Bench:
    """The steps of one precision."""

    def __init__(self, options: Options, dtype: str, log: Any) -> None:
        self._options, self._dtype, self._log = options, dtype, log
        shape = llm_models.tiny(SHAPE) if options.tiny else SHAPE
        self.model = llm_models.build(shape, options.cache, options.data, dtype)
        self.prompt = workload(self.model, options.data, TINY_CONTEXT if options.tiny else CONTEXT)
        self.result = Result()

    def workload(self) -> dict[str, Any]:
        prompt = self.prompt
        return {
            "model": self.model.shape.note,
            "shape": self.model.shape.settings,
            "documents": len(prompt.spans),
            "context": len(prompt.context),
            "tail": len(prompt.tail),
            "empty_tail": len(prompt.empty_tail),
        }

    def run(self, save: Callable[[], None]) -> None:
        reference = self._reference()
        with ExitStack() as stack:
            workers: dict[str, Worker] = {}
            for kind in icr_engines.BY_DTYPE[self._dtype]:
                assert issubclass(kind, IcrEngine)
                self._say(f"{kind.name}: setting up")
                row = Row(kind.name, kind.setup, kind.version(), kind.reads)
                self.result.rows.append(row)
                worker = self._prepare(row, reference)
                if worker is not None:
                    workers[kind.name] = stack.enter_context(worker)
            times, failed = interleave(
                {name: lambda worker=worker: float(worker.call("scores")[0]) for name, worker in workers.items()},
                self._options.rounds,
            )
            for row in self.result.rows:
                row.seconds = times.get(row.name, [])
                if row.name in failed:
                    row.state, row.detail = "failed", failed[row.name]
        save()
        if self._options.memory:
            for row in self.result.rows:
                if row.seconds:
                    self._say(f"{row.name}: memory")
                    row.memory = self._memory(row)
            save()

    def _say(self, what: str) -> None:
        self._log.print(f"[dim]{self._dtype}: {what}[/dim]", highlight=False)

    def _worker(self, name: str) -> Worker:
        folder = self.model.path
        return Worker(f"icr/{name}", folder, folder.parent, threads=self._options.threads)

    def _masses(self, name: str, prompt: IcrPrompt) -> NDArray[np.float64]:
        with self._worker(name) as worker:
            worker.call("load")
            worker.call("take", prompt)
            masses: NDArray[np.float64] = worker.call("scores")[1]
            return masses

    def _reference(self) -> NDArray[np.float64]:
        """Equals eager float32 masses; and sets what float32 engines may differ from them."""
        self._say("reference: transformers eager, float32 and (a short prompt) float64")
        short = self.prompt.head(SHORT)
        double = self._masses("reference-float64", short)
        error = _error(self._masses("reference-float32", short), double)
        if self._dtype == "float32":
            self.result.bound = FLOOR_FACTOR * max(error, 2.0**-23)
        return self._masses("reference-float32", self.prompt)

    def _prepare(self, row: Row, reference: NDArray[np.float64]) -> Worker | None:
        worker = self._worker(row.name)
        try:
            row.load_seconds = worker.call("load")
            worker.call("take", self.prompt)
            masses = worker.call("scores")[1]
            row.tokens = worker.call("spent")["tokens"]
        except EngineError as error:
            row.state, row.detail = "failed", str(error)
        else:
            if row.reads == "all":
                self._check(row, masses, reference)
        if row.state == "ok":
            return worker
        worker.close()
        return None

    def _check(self, row: Row, masses: NDArray[np.float64], reference: NDArray[np.float64]) -> None:
        ours, theirs = (document_scores(values, self.prompt) for values in (masses, reference))
        row.check = {
            "mass": _error(masses, reference),
            "score": float(np.abs(ours - theirs).max() / np.abs(theirs).max()),
            "tau": _tau(ours, theirs),
        }
        if not self.result.bound:  # bfloat16: the first engine is the yardstick
            self.result.bound = BFLOAT16_FACTOR * row.check["mass"]
        if not row.check["mass"] <= self.result.bound:
            row.state = "WRONG"
            row.detail = f"error {row.check['mass']:.1e}, at most {self.result.bound:.1e} allowed"

    def _memory(self, row: Row) -> list[tuple[int, int]]:
        """Equals the peaks of a fresh process that reads prompts of growing length, each peak taken anew."""
        found = []
        eager = row.name.startswith("eager")
        lengths = TINY_MEMORY if self._options.tiny else MEMORY[:2] if eager else MEMORY
        with self._worker(row.name) as worker:
            worker.call("load")
            for length in lengths:
                worker.call("take", random_prompt(length, self.model.shape.first_special))
                worker.call("reset_peak")
                worker.call("scores")
                found.append((length, worker.call("peak_bytes")))
        return found


def workload(model: llm_models.LlmModel, folder: Path, context: int) -> IcrPrompt:
    """Equals the prompt of preset "icr" for the query that `harness.data` chooses, with `context` tokens or more."""
    prompts = _prompts(model)
    chosen = data.load(folder, data.PairTokenizer(model.path), documents=100, length="natural").pairs
    count = 1
    while len(prompts.encode(chosen.query, chosen.documents[:count]).context) < context:
        count += 1
    return of_prompt(prompts.encode(chosen.query, chosen.documents[:count]))


def _prompts(model: llm_models.LlmModel) -> Any:
    from transformers import AutoTokenizer

    from fastrerank.inputs.prompts.attention_policy import Policy
    from fastrerank.inputs.prompts.attention_prompts import AttentionPrompts

    policy, tokenizer = Policy.load("icr"), AutoTokenizer.from_pretrained(str(model.path))
    return AttentionPrompts(
        tokenizer, policy, model_type=model.shape.kind, instruction=policy.instructions["ie"], words=policy.words
    )


def _error(ours: NDArray[np.float64], expected: NDArray[np.float64]) -> float:
    return float(np.abs(ours - expected).max() / np.abs(expected).max())


def _tau(ours: NDArray[np.float64], expected: NDArray[np.float64]) -> float:
    a, b = (np.sign(values[:, None] - values[None]) for values in (ours, expected))
    pairs = len(ours) * (len(ours) - 1)
    return float((a * b).sum() / pairs) if pairs else 1.0


def write_json(findings: Findings, path: Path) -> None:
    """Write everything that was found; precisions that a file of the same host and workload has besides are kept."""
    write_precisions(findings, path, _same)


def _same(old: dict[str, Any], new: dict[str, Any]) -> bool:
    return bool(old["workload"] == new["workload"] and old["host"]["cpu"] == new["host"]["cpu"])


def show(findings: Findings, *, markdown: bool) -> None:
    """Prints the report to standard output."""
    found, work = findings.host, findings.workload
    head = [
        f"{work['model']}; {work['documents']} DL19 passages in a context of {work['context']} tokens, {work['tail']} "
        f"rows behind it with the query and {work['empty_tail']} with N/A",
        f"{found['cpu']}, {found['threads']} threads of {found['cores']}; Python {found['python']}, {found['system']}",
        f"{found['command']}",
    ]
    tables = []
    for dtype, result in findings.results.items():
        tables += [_checks(dtype, result), _times(dtype, result), _peaks(dtype, result)]
    show_tables(head, [table for table in tables if table.rows], markdown=markdown)


def _checks(dtype: str, result: Result) -> Table:
    rows = [
        [
            row.name,
            row.version,
            *(f"{row.check[name]:.1e}" for name in ("mass", "score")),
            f"{row.check['tau']:.3f}",
            row.state,
        ]
        for row in result.rows
        if row.check
    ]
    notes = [
        "Largest error of a token's mass and of a document's score, over the largest of transformers' eager float32; "
        f"allowed of the masses: {result.bound:.1e}. What is over is WRONG and not timed."
    ]
    return Table(f"{dtype}: masses, checked first", ["engine", "version", "mass", "score", "tau", "state"], rows, notes)


def _times(dtype: str, result: Result) -> Table:
    by_name = {row.name: row.seconds for row in result.rows if row.seconds}
    base = {short: by_name.get(f"{short}-{dtype}") for short in ("eager", "two-pass", "forward")}
    rows = []
    for row in result.rows:
        if not row.seconds:
            rows.append([row.name, row.state, *[""] * 5])
            continue
        cells = [f"{ratio(them, row.seconds):.2f}" if them else "" for them in (base["eager"], base["two-pass"])]
        share = f"{ratio(row.seconds, base['forward']):.2f}" if base["forward"] else ""
        rows.append(
            [
                row.name,
                f"{1e3 * float(np.median(row.seconds)):.0f}",
                f"{percentile(row.seconds, 5):.0f}-{percentile(row.seconds, 95):.0f}",
                *cells,
                share,
                str(row.tokens),
            ]
        )
    notes = [f"{row.name}: {row.setup}" for row in result.rows]
    notes += [f"{row.name}: {row.state}: {row.detail}" for row in result.rows if row.state != "ok"]
    rounds = max((len(row.seconds) for row in result.rows), default=0)
    notes.append(
        f"Ratios: medians within each of {rounds} interleaved rounds. x: times faster; of a forward: the share."
    )
    columns = ["engine", "ms", "5-95 %", "x eager", "x two-pass", "of a forward", "tokens"]
    return Table(f"{dtype}: from token ids to masses", columns, rows, notes)


def _peaks(dtype: str, result: Result) -> Table:
    lengths = sorted({length for row in result.rows for length, _ in row.memory})
    rows = []
    for row in result.rows:
        if row.memory:
            peaks = dict(row.memory)
            slopes = increments(row.memory)
            rows.append(
                [
                    row.name,
                    *(f"{peaks[n] / MIB:.0f}" if n in peaks else "" for n in lengths),
                    f"{slopes[-1] / 1024:.0f}",
                    f"{slopes[-1] / slopes[0]:.2f}" if len(slopes) > 1 and slopes[0] else "",
                ]
            )
    notes = [
        "Peak of the process's resident memory while a prompt is read, weights included, MiB; KiB per further token"
    ]
    notes.append("between the longest two, and what that is over the same between the shortest two (1: linear).")
    columns = ["engine", *(f"{n}" for n in lengths), "KiB/token", "growth"]
    return Table(f"{dtype}: peak memory by context tokens", columns, rows, notes)
