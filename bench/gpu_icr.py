"""Attention read-outs on a GPU: Llama-3.1-8B's shape in bfloat16, random weights made on the device, random documents.

All engines share one process and get the same token ids: a plain forward, the published two passes re-implemented on
current transformers, and ours with all heads and with few. Masses are checked before anything is timed.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import gpu_host, icr_engines, llm_models
from bench.icr import _error
from bench.icr_engines import Forward, TwoPass, core_heads, random_prompt, reading_of
from bench.report import Table, show_tables
from bench.timing import interleave, percentile, ratio

SIZES, TINY_SIZES = (20, 50, 100), (2, 4)
EACH, TINY_EACH = 100, 100  # tokens of a document
# Ours may differ from the two passes in float32 this many times as much as the two passes in bfloat16 do.
FACTOR = 2.0
MIB = 2.0**20


@dataclass(frozen=True)
class Options:
    """What to run: on `device`, with tiny shapes, in so many rounds."""

    device: str
    tiny: bool
    rounds: int
    command: str


@dataclass
class Row:
    """One engine at one number of documents; `peak` is what it holds beside the weights, in bytes."""

    name: str
    documents: int
    tokens: int
    state: str = "ok"
    error: float | None = None
    seconds: list[float] = field(default_factory=list)
    peak: int = 0


@dataclass
class Findings:
    """Everything a run found; `bounds`: the error that is allowed, by number of documents."""

    host: dict[str, Any]
    model: str
    command: str
    bounds: dict[int, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Equals whether every engine was measured."""
        return bool(self.rows) and all(row.state == "ok" for row in self.rows)


def run(options: Options, log: Any, save: Callable[[Findings], None] = lambda _: None) -> Findings:
    """Equals the findings of all sizes; `log` is a rich console for progress, `save` gets what there is after each."""
    from fastrerank.engine.attention_scorer import AttentionScorer

    whole = llm_models.SHAPES["llama-3.1-8b"]
    shape = llm_models.tiny(whole) if options.tiny else whole
    device = torch.device(options.device)
    found = Findings(gpu_host.host(options.device), shape.note, options.command)

    def body() -> Any:
        model = llm_models.random_model(shape, options.device, "bfloat16").model
        gc.collect()
        return model

    layers, heads = shape.settings["num_hidden_layers"], shape.settings["num_attention_heads"]
    log.print("[dim]making the models[/dim]", highlight=False)
    engines: dict[str, Any] = {"forward": _shared(Forward, body(), "sdpa")}
    icr_engines.register_two_pass()
    engines["two-pass"] = _shared(TwoPass, body(), "bench-two-pass")
    for name, chosen in (("fastrerank", None), ("fastrerank-core", core_heads(layers, heads))):
        engines[name] = AttentionScorer.from_model(body(), chosen, dtype="bfloat16", device=options.device)
    each, vocabulary = TINY_EACH if options.tiny else EACH, shape.settings["vocab_size"] // 2
    sizes = TINY_SIZES if options.tiny else SIZES
    prompts = {count: random_prompt(count * each, vocabulary, seed=count) for count in sizes}
    log.print("[dim]reference in float32[/dim]", highlight=False)
    two = engines["two-pass"]
    with _InFloat32(two._model):
        expected = {count: two.scores(prompt) for count, prompt in prompts.items()}
    for count, prompt in prompts.items():
        log.print(f"[dim]{count} documents[/dim]", highlight=False)
        _size(found, engines, count, prompt, expected[count], options, device)
        save(found)
    return found


def _shared(kind: type[Any], model: Any, attention: str) -> Any:
    engine = kind(Path(), Path(), 1)
    model.set_attn_implementation(attention)
    engine._model = model
    return engine


def _size(
    found: Findings, engines: dict[str, Any], count: int, prompt: Any, expected: Any, options: Options,
    device: torch.device,
) -> None:  # fmt: skip
    reading = reading_of(prompt)

    def call(name: str) -> Any:
        engine = engines[name]
        return engine.masses(reading)[0] if name.startswith("fastrerank") else engine.scores(prompt)

    bound = FACTOR * _error(engines["two-pass"].scores(prompt), expected)
    found.bounds[count] = bound
    calls: dict[str, Callable[[], float]] = {}
    for name in engines:
        row = Row(name, count, prompt.tokens)
        found.rows.append(row)
        value = call(name)
        if name in ("two-pass", "fastrerank"):
            row.error = _error(np.asarray(value, np.float64), expected)
            if not row.error <= bound:
                row.state = "WRONG"
                continue
        row.peak = _peak(device, lambda name=name: call(name))
        calls[name] = lambda name=name: _timed(device, lambda: call(name))
    times, failed = interleave(calls, options.rounds)
    for row in found.rows:
        if row.documents == count:
            row.seconds = times.get(row.name, [])
            row.state = "failed" if row.name in failed else row.state


class _InFloat32:
    """A model in float32 while the block runs; its weights are in host memory meanwhile, and come back as they were."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.kept = {name: value.data.cpu() for name, value in self.model.named_parameters()}
        for value in self.model.parameters():
            value.data = value.data.float()

    def __exit__(self, *_: object) -> None:
        for name, value in self.model.named_parameters():
            value.data = self.kept[name].to(value.device)


def _timed(device: torch.device, call: Callable[[], Any]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _peak(device: torch.device, call: Callable[[], Any]) -> int:
    if device.type != "cuda":
        return 0
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return int(torch.cuda.max_memory_allocated() - before)


def write_json(findings: Findings, path: Path) -> None:
    """Writes everything that was found."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(findings), indent=1) + "\n")


def show(findings: Findings, *, markdown: bool) -> None:
    """Prints the report to standard output."""
    by_size: dict[int, dict[str, Row]] = {}
    for row in findings.rows:
        by_size.setdefault(row.documents, {})[row.name] = row
    rows = []
    for some in by_size.values():
        for row in some.values():
            if not row.seconds:
                rows.append([row.name, str(row.documents), str(row.tokens), row.state, "", "", "", "", ""])
                continue
            rows.append(
                [
                    row.name, str(row.documents), str(row.tokens), f"{1e3 * float(np.median(row.seconds)):.1f}",
                    f"{percentile(row.seconds, 5):.1f}-{percentile(row.seconds, 95):.1f}",
                    f"{ratio(row.seconds, some['forward'].seconds):.2f}" if some["forward"].seconds else "",
                    f"{ratio(some['two-pass'].seconds, row.seconds):.2f}" if some["two-pass"].seconds else "",
                    "" if row.error is None else f"{row.error:.1e}", f"{row.peak / MIB:.0f}",
                ]
            )  # fmt: skip
    notes = [
        "error: of the masses, over the largest of the two passes in float32; allowed: "
        + ", ".join(f"{bound:.1e} at {count}" for count, bound in findings.bounds.items()),
        "MiB: peak beside the weights. of a forward: the share of its time; x two-pass: times faster.",
    ]
    columns = ["engine", "documents", "tokens", "ms", "5-95 %", "of a forward", "x two-pass", "error", "MiB"]
    host = findings.host
    place = host.get("gpu", {}).get("name", "CPU")
    head = [findings.model, f"{place}; Python {host['python']}, {host['system']}", findings.command]
    show_tables(head, [Table("from token ids to masses", columns, rows, notes)], markdown=markdown)
