"""Attention read-outs on a GPU: Llama-3.1-8B's shape in bfloat16, random weights made on the device.

All engines share one process. From token ids (random documents) to masses: a plain forward, the published two passes
re-implemented on current transformers, and ours with all heads and with few. From texts to the documents' scores: the
two passes with the published text work and with one tokenisation, and ours. Results are checked before they are timed.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.cross_encoder import gpu_models
from bench.cross_encoder.gpu_engines import failing_as
from bench.harness.host import gpu_host
from bench.harness.tables import Table, show_tables
from bench.harness.timing import EngineError, interleave, percentile, ratio
from bench.icr import engines as icr_engines
from bench.icr import gpu_texts as gpu_icr_texts
from bench.icr.cpu import _error
from bench.icr.engines import Forward, IcrPrompt, TwoPass, core_heads, random_prompt, reading_of
from bench.icr.gpu_texts import (
    Asked,
    InTwoPasses,
    Ours,
    OursCore,
    OursSeen,
    Published,
    Request,
    TextEngine,
    TokenisedOnce,
)
from bench.llm import models as llm_models
from fastrerank.rerankers.attention import filtered_sum

PARTS = ("ids", "texts")
SIZES, TINY_SIZES = (20, 50, 100), (2, 4)
EACH = 100  # tokens of a document
# Ours may differ from the two passes in float32 this many times as much as the two passes in bfloat16 do.
FACTOR = 2.0
MIB = 2.0**20


@dataclass(frozen=True)
class Options:
    """What to run: `parts` on `device`, with tiny shapes, in so many rounds; `data`: folders that may hold texts."""

    device: str
    tiny: bool
    rounds: int
    parts: tuple[str, ...]
    data: tuple[Path, ...]
    cache: Path
    command: str


@dataclass
class Row:
    """One engine at one number of documents.

    `peak`: bytes that it holds beside the weights; not measured from texts. `error`: of the masses. From texts,
    `score_error` is that of the documents' scores, and `tokenising` the seconds of text work that are part of
    `seconds`.
    """

    name: str
    documents: int
    tokens: int
    state: str = "ok"
    detail: str = ""
    error: float | None = None
    score_error: float | None = None
    seconds: list[float] = field(default_factory=list)
    tokenising: list[float] = field(default_factory=list)
    peak: int = 0


@dataclass
class Findings:
    """Everything a run found; `bounds`: the error that is allowed, by number of documents."""

    host: dict[str, Any]
    model: str
    command: str
    bounds: dict[int, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    text_bounds: dict[int, float] = field(default_factory=dict)
    text_rows: list[Row] = field(default_factory=list)
    texts: str = ""
    setups: dict[str, str] = field(default_factory=dict)

    @property
    def sound(self) -> bool:
        """Equals whether every engine was measured."""
        rows = (*self.rows, *self.text_rows)
        return bool(rows) and all(row.state == "ok" for row in rows)


def run(options: Options, log: Any, save: Callable[[Findings], None] = lambda _: None) -> Findings:
    """Equals the findings of all sizes; `log` is a rich console for progress, `save` gets what there is after each.

    Raises
    ------
    ValueError: no usable GPU, an unknown part, or more rounds than there are requests with new documents.
    """
    for part in options.parts:
        if part not in PARTS:
            raise ValueError(f"part {part!r} is unknown; valid are {', '.join(PARTS)}")
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"torch {torch.__version__} finds no usable CUDA device")
    bench = _Bench(options, log)
    for count, prompt in bench.prompts.items():
        bench.say(f"{count} documents of random tokens")
        bench.ids(count, prompt)
        save(bench.found)
    for count in bench.text_sizes:
        bench.say(f"{count} documents as text")
        bench.texts(count)
        save(bench.found)
    return bench.found


class _Bench:
    """The models, the prompts, and the two parts of one run."""

    def __init__(self, options: Options, log: Any) -> None:
        self._options, self._log, self._device = options, log, torch.device(options.device)
        self._start = time.perf_counter()
        whole = llm_models.SHAPES["llama-3.1-8b"]
        self._shape = llm_models.tiny(whole) if options.tiny else whole
        self._settings = self._shape.settings
        note = self._shape.note.removesuffix(", Qwen3-Reranker's prompt")
        self.found = Findings(gpu_host(options.device), note, options.command)
        sizes = TINY_SIZES if options.tiny else SIZES
        vocabulary = self._settings["vocab_size"] // 2
        self.prompts: dict[int, IcrPrompt] = {}
        if "ids" in options.parts:
            self.prompts = {count: random_prompt(count * EACH, vocabulary, seed=count) for count in sizes}
        self.text_sizes = sizes if "texts" in options.parts else ()
        if self.text_sizes:
            self._read_texts()
        self._load()

    def say(self, what: str) -> None:
        self._log.print(f"[dim]{time.perf_counter() - self._start:5.0f} s  {what}[/dim]", highlight=False)

    def _read_texts(self) -> None:
        self.say("texts and tokenizer")
        folder, note = gpu_models.corpus(self._options.data)
        if folder is None:
            self._options.cache.mkdir(parents=True, exist_ok=True)
            folder = gpu_models.synthetic(self._options.cache, documents=10 if self._options.tiny else 200)
        self.found.texts = f"{note}, joined and cut to {EACH} tokens"
        self._tokenizer = gpu_icr_texts.make_tokenizer(folder, self._shape.first_special)
        self._requests = gpu_icr_texts.requests(folder, self._tokenizer, max(self.text_sizes), EACH)
        most = len(self._requests) - 1  # the first one is for the check
        if self._options.rounds > most:
            raise ValueError(f"--rounds must be at most {most}: there are so many requests with new documents")

    def _load(self) -> None:
        """One body for transformers' engines, one for ours, and of that for few heads the layers that they need."""
        from fastrerank.engine.torch.attention import AttentionScorer

        icr_engines.register_two_pass()
        self.say("transformers' model")
        self._model = self._body(self._settings["num_hidden_layers"])
        self._two_pass = self._on_model(TwoPass)
        self.say("reference in float32")
        with _InFloat32(self._model):
            self._ready("two-pass")
            self._expected = {count: self._two_pass.scores(prompt) for count, prompt in self.prompts.items()}
            self._expected_texts = {count: self._reference(count) for count in self.text_sizes}
        _free(self._device)
        self.say("our models")
        heads = core_heads(self._settings["num_hidden_layers"], self._settings["num_attention_heads"])
        self._scorers = {}
        for name, chosen in (("fastrerank", None), ("fastrerank-core", heads)):
            layers = self._settings["num_hidden_layers"] if chosen is None else max(chosen)[0] + 1
            self._scorers[name] = AttentionScorer.from_model(
                self._body(layers), chosen, dtype="bfloat16", device=self._options.device
            )

    def _body(self, layers: int) -> Any:
        """The decoder without its head; fewer layers are the first ones of the whole model, weights and all."""
        shape = replace(self._shape, settings=self._settings | {"num_hidden_layers": layers})
        model = llm_models.random_model(shape, self._options.device, "bfloat16").model
        _free(self._device)
        return model

    def _on_model(self, kind: type[Any]) -> Any:
        engine = kind(Path(), Path(), 1)
        engine._model = self._model
        return engine

    def _reference(self, count: int) -> Asked:
        query, documents = self._requests[0]
        return TokenisedOnce(self._tokenizer, self._two_pass).explained(query, documents[:count])

    def _ready(self, name: str) -> None:
        """Sets the attention that an engine wants of the model that it shares; not timed."""
        if not name.startswith("fastrerank"):
            self._model.set_attn_implementation("sdpa" if name == "forward" else TwoPass.attention)

    def _timed(self, name: str, call: Callable[[], Any]) -> float:
        self._ready(name)
        _wait(self._device)
        start = time.perf_counter()
        call()
        _wait(self._device)
        return time.perf_counter() - start

    def ids(self, count: int, prompt: IcrPrompt) -> None:
        """From token ids to masses."""
        forward, reading, expected = self._on_model(Forward), reading_of(prompt), self._expected[count]
        engines: dict[str, Callable[[], Any]] = {
            "forward": lambda: forward.scores(prompt),
            "two-pass": lambda: self._two_pass.scores(prompt),
        }
        for name, scorer in self._scorers.items():
            engines[name] = lambda scorer=scorer: scorer.masses(reading)[0]
        self._ready("two-pass")
        bound = self.found.bounds[count] = FACTOR * _error(engines["two-pass"](), expected)
        calls: dict[str, Callable[[], float]] = {}
        rows = [Row(name, count, prompt.tokens) for name in engines]
        self.found.rows += rows
        for row in rows:
            call = engines[row.name]
            self._ready(row.name)
            value = call()
            if row.name in ("two-pass", "fastrerank"):
                row.error = _error(np.asarray(value, np.float64), expected)
                if not row.error <= bound:
                    row.state = "WRONG"
                    continue
            row.peak = _peak(self._device, call)
            calls[row.name] = lambda name=row.name, call=call: self._timed(name, call)
        self._rounds(rows, calls)

    def texts(self, count: int) -> None:
        """From texts to the documents' scores; each round has a request of its own, the first one is for the check."""
        tokenizer, (query, documents) = self._tokenizer, self._requests[0]
        ours = Ours(tokenizer, self._scorers["fastrerank"])
        seen = OursSeen(tokenizer, self._scorers["fastrerank"])
        engines: list[TextEngine] = [
            TokenisedOnce(tokenizer, self._two_pass),
            Published(tokenizer, self._two_pass),
            ours,
            seen,
            OursCore(tokenizer, self._scorers["fastrerank-core"]),
        ]
        self.found.setups = {engine.name: engine.setup for engine in engines}
        prompt = self._expected_texts[count].prompt
        rows = [Row(engine.name, count, prompt.tokens) for engine in engines]
        self.found.text_rows += rows
        calls: dict[str, Callable[[], float]] = {}
        for row, engine in zip(rows, engines, strict=True):
            self._ready(row.name)
            try:
                with failing_as(EngineError, row.name):
                    self._check(row, engine, engine.explained(query, documents[:count]))
            except EngineError as error:
                row.state, row.detail = "failed", str(error)
            if row.state == "ok":
                some = [self._requests[0]] * self._options.rounds if engine is seen else self._requests[1:]
                calls[row.name] = self._asking(row, engine, [(query, texts[:count]) for query, texts in some])
        self._rounds(rows, calls)

    def _check(self, row: Row, engine: TextEngine, found: Asked) -> None:
        """WRONG are other tokens than the reference's, masses further off than allowed, and scores that are not theirs.

        A document's score jumps where a token's mass passes the filter's threshold, in one engine here, in another
        there: so its error, relative to the scores' root mean square, is told but has no bound.
        """
        expected = self._expected_texts[row.documents]
        for what in ("context", "tail", "empty_tail", "spans"):
            if not np.array_equal(getattr(found.prompt, what), getattr(expected.prompt, what)):
                row.state, row.detail = "WRONG", f"{what}: other tokens than those of the whole prompt"
                return
        sums = np.array([filtered_sum(masses.astype(np.float32)) for masses in found.masses])
        if not np.allclose(found.scores, sums, rtol=1e-6, atol=1e-6 * np.abs(sums).max()):
            row.state, row.detail = "WRONG", "scores are not the filtered sums of the masses"
        if isinstance(engine, OursCore):  # other heads
            return
        row.error = _error(np.concatenate(found.masses), np.concatenate(expected.masses))
        row.score_error = float(np.linalg.norm(found.scores - expected.scores) / np.linalg.norm(expected.scores))
        bounds = self.found.text_bounds
        if isinstance(engine, InTwoPasses):
            bounds.setdefault(row.documents, FACTOR * row.error)
        if row.documents not in bounds:
            row.state, row.detail = "failed", "no error of the two passes in bfloat16 to compare its own with"
            return
        bound = bounds[row.documents]
        if not row.error <= bound:
            row.state, row.detail = "WRONG", f"error {row.error:.1e}, at most {bound:.1e} allowed"

    def _asking(self, row: Row, engine: TextEngine, asked: list[Request]) -> Callable[[], float]:
        queue = iter(asked)

        def once() -> float:
            request = next(queue)
            with failing_as(EngineError, row.name):
                seconds = self._timed(row.name, lambda: engine.scores(*request))
            row.tokenising.append(engine.tokenising)
            return seconds

        return once

    def _rounds(self, rows: list[Row], calls: dict[str, Callable[[], float]]) -> None:
        times, failed = interleave(calls, self._options.rounds, settle=0)
        for row in rows:
            row.seconds = times.get(row.name, [])
            if row.name in failed:
                row.state, row.detail = "failed", failed[row.name]


class _InFloat32:
    """A bfloat16 model in float32 while the block runs; its weights come back bit for bit."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __enter__(self) -> None:
        for value in self.model.parameters():
            value.data = value.data.float()

    def __exit__(self, *_: object) -> None:
        for value in self.model.parameters():
            value.data = value.data.bfloat16()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _peak(device: torch.device, call: Callable[[], Any]) -> int:
    if device.type != "cuda":
        return 0
    _free(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return int(torch.cuda.max_memory_allocated() - before)


def show(findings: Findings, *, markdown: bool) -> None:
    """Prints the report to standard output."""
    host = findings.host
    place = host.get("gpu", {}).get("name", "CPU")
    head = [findings.model, f"{place}; Python {host['python']}, {host['system']}", findings.command]
    tables = [_ids_table(findings), _texts_table(findings)]
    show_tables(head, [table for table in tables if table.rows], markdown=markdown)


def _ids_table(findings: Findings) -> Table:
    rows = []
    for row in findings.rows:
        some = {one.name: one for one in findings.rows if one.documents == row.documents}
        rows.append(
            [
                *_begin(row),
                _times(some["forward"], row, share=True),
                _times(some["two-pass"], row),
                _scientific(row.error),
                f"{row.peak / MIB:.0f}",
            ]
        )
    notes = [
        _error_note(findings.bounds),
        "MiB: peak beside the weights. of a forward: the share of its time; x two-pass: times faster.",
    ]
    columns = ["engine", "documents", "tokens", "ms", "5-95 %", "of a forward", "x two-pass", "error", "MiB"]
    return Table("from token ids to masses", columns, rows, notes)


def _texts_table(findings: Findings) -> Table:
    rows = []
    for row in findings.text_rows:
        some = {one.name: one for one in findings.text_rows if one.documents == row.documents}
        text = f"{1e3 * float(np.median(row.tokenising)):.1f}" if row.seconds else ""
        rows.append(
            [
                *_begin(row),
                text,
                _times(some[Published.name], row),
                _times(some[TokenisedOnce.name], row),
                _scientific(row.error),
                _scientific(row.score_error),
            ]
        )
    notes = [
        f"{findings.texts}; a byte-level BPE tokenizer trained on them; every round asks about other documents.",
        *(f"{name}: {setup}." for name, setup in findings.setups.items()),
        _error_note(findings.text_bounds),
        "of scores: root mean square, relative to those of the two passes in float32; a token near the filter's "
        "threshold counts in one engine and not in another. tokenising: the part of the ms that is text work.",
        *(f"{row.name}, {row.documents} documents: {row.detail}" for row in findings.text_rows if row.detail),
    ]
    columns = [
        "engine",
        "documents",
        "tokens",
        "ms",
        "5-95 %",
        "tokenising",
        "x published",
        "x once",
        "error",
        "of scores",
    ]
    return Table("from texts to the documents' scores", columns, rows, notes)


def _begin(row: Row) -> list[str]:
    """The cells that both tables begin with."""
    cells = [row.name, str(row.documents), str(row.tokens)]
    if not row.seconds:
        return [*cells, row.state, ""]
    middle = f"{1e3 * float(np.median(row.seconds)):.1f}"
    return [*cells, middle, f"{percentile(row.seconds, 5):.1f}-{percentile(row.seconds, 95):.1f}"]


def _times(base: Row, row: Row, *, share: bool = False) -> str:
    """How often the base's time holds the row's; the row's share of it."""
    if not (base.seconds and row.seconds):
        return ""
    return f"{ratio(row.seconds, base.seconds) if share else ratio(base.seconds, row.seconds):.2f}"


def _scientific(error: float | None) -> str:
    return "" if error is None else f"{error:.1e}"


def _error_note(bounds: dict[int, float]) -> str:
    allowed = ", ".join(f"{bound:.1e} at {count}" for count, bound in bounds.items())
    return (
        f"error: of the masses, over the largest of the two passes in float32; allowed: {allowed}. Those of "
        f"{OursCore.name}, of other heads, have nothing to be compared with."
    )
