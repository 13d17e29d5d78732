"""Tables of the LLM comparison on a CPU, for the terminal and for Markdown, and its JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bench.harness.results import write_precisions
from bench.harness.tables import Table, show_tables
from bench.harness.timing import percentile, ratio
from bench.llm.cpu import Findings, Result, Row

MIB = 2.0**20


def show(findings: Findings, *, markdown: bool) -> None:
    """Prints the report to standard output."""
    host, work = findings.host, findings.workload
    head = [
        f"{work['model']}; Qwen3-Reranker's prompts of 1 query x {work['documents']} DL19 passages, {work['tokens']} "
        f"tokens ({work['shortest']} to {work['longest']}); tokenising them takes {1e3 * work['tokenise_seconds']:.0f} "
        "ms, which only sentence-transformers' times include",
        *findings.notes,
        f"{host['cpu']}, {host['threads']} threads of {host['cores']}; Python {host['python']}, {host['system']}",
        f"{host['command']}",
    ]
    show_tables(head, tables(findings), markdown=markdown)


def write_json(findings: Findings, path: Path) -> None:
    """Write everything that was found; precisions that a file of the same host and workload has besides are kept."""
    write_precisions(findings, path, lambda old, new: _subject(old) == _subject(new))


def _subject(found: dict[str, Any]) -> Any:
    changing = ("command", "tokenise_seconds")
    return [{k: v for k, v in found[part].items() if k not in changing} for part in ("host", "workload")]


def tables(findings: Findings) -> list[Table]:
    """Equals the report's tables, those that have no rows left out."""
    found = []
    for dtype, result in findings.results.items():
        found += [_check(dtype, result), _times(dtype, result), _memory(dtype, result)]
    return [table for table in found if table.rows]


def _check(dtype: str, result: Result) -> Table:
    rows = [
        [
            row.name,
            row.version,
            f"{row.check['max_delta']:.1e}",
            f"{row.check['rms']:.1e}",
            f"{row.check['tau']:.3f}",
            f"{row.check['swaps']:.0f}",
            f"{row.check['widest_swap']:.1e}",
            row.state,
        ]
        for row in result.rows
        if row.check
    ]
    allowed = ", ".join(f"{name} {value:.1e}" for name, value in result.bounds.items())
    notes = [
        f"Scores logit(yes) - logit(no) against transformers eager float32, prompt by prompt; they span "
        f"{result.spread:.2f}. Allowed: {allowed}. What is over is WRONG and not timed.",
        "swaps: pairs in another order than the reference's; widest: their largest difference in the reference.",
    ]
    columns = ["engine", "version", "max error", "rms", "tau", "swaps", "widest", "state"]
    return Table(f"{dtype}: scores, checked first", columns, rows, notes)


def _times(dtype: str, result: Result) -> Table:
    measured = {row.name: row for row in result.measured()}
    theirs = [row for row in measured.values() if not row.ours]
    ours = next((row for row in measured.values() if row.ours), None)
    rows = []
    for row in result.rows:
        if not row.seconds:
            rows.append([row.name, row.state, *[""] * (6 + len(theirs))])
            continue
        median = float(np.median(row.seconds))
        rows.append(
            [
                row.name + (" (on text)" if row.on_text else ""),
                str(row.setting.get("batch", "")),
                f"{1e3 * median:.0f}",
                f"{percentile(row.seconds, 5):.0f}-{percentile(row.seconds, 95):.0f}",
                *(f"{ratio(them.seconds, row.seconds):.2f}" for them in theirs),
                f"{row.tokens}",
                f"{row.flop / 1e9:.0f}",
                f"{row.flop / median / 1e9:.0f}",
                f"{row.flop / median / result.peak:.0%}" if result.peak else "",
            ]
        )
    notes = [f"{row.name}: {row.state}: {row.detail}" for row in result.rows if row.state != "ok"]
    rounds = max((len(row.seconds) for row in measured.values()), default=0)
    notes.append(f"Times faster: median of the ratios within each of {rounds} interleaved rounds.")
    if ours is not None and theirs:
        notes.append(
            f"{ours.name}: {ours.tokens} of {theirs[0].tokens} tokens pass, {1 - ours.tokens / theirs[0].tokens:.0%} "
            f"fewer; {ours.prefix_tokens} of them are shared prefixes, in {ours.forwards} forwards."
        )
    notes.append("GFLOP: of the tokens that pass, padding not counted; theirs include the head's whole vocabulary.")
    if result.floors:
        floors = result.floors
        notes.append(
            f"Floors of sharing: {floors['flop'] / 1e9:.0f} GFLOP at {result.peak / 1e9:.0f} GFLOP/s (registers) "
            f"{1e3 * floors['operations']:.0f} ms; layers' weights once per forward, {floors['bytes'] / 1e6:.0f} MB at "
            f"{result.copy / 1e9:.1f} GB/s (copy) {1e3 * floors['memory']:.0f} ms."
        )
    notes += [
        f"{row.name}: {1e3 * row.tokenise_seconds:.0f} ms of its time is tokenising."
        for row in theirs
        if row.tokenise_seconds is not None
    ]
    against = [f"x {row.name.rsplit('-', 1)[0]}" for row in theirs]
    columns = ["engine", "batch", "ms", "5-95 %", *against, "tokens", "GFLOP", "GFLOP/s", "of peak"]
    return Table(f"{dtype}: from token ids to scores", columns, rows, notes)


def _memory(dtype: str, result: Result) -> Table:
    measured = [row for row in result.measured() if row.memory]
    theirs = next((row for row in measured if not row.ours), None)
    rows = []
    for row in measured:
        marks = [row.memory[name] for name in ("imports", "load", "scores")]
        rows.append([row.name, *(f"{mark / MIB:.0f}" for mark in marks), f"{above_imports(row) / MIB:.0f}"])
        if theirs is not None:
            above = above_imports(row)
            rows[-1].append(f"{theirs.memory['scores'] / row.memory['scores']:.2f}")
            rows[-1].append(f"{above_imports(theirs) / above:.2f}" if above else "")
    notes = ["High-water marks of a fresh process (VmHWM) after imports, after loading, after scoring; the ratios:"]
    notes.append(f"how many times less than {theirs.name if theirs else 'nothing'}, in all and above imports.")
    columns = ["engine", "imports, MiB", "loaded", "scored", "above imports"]
    return Table(f"{dtype}: peak memory", columns + (["x less", "x less above"] if theirs else []), rows, notes)


def above_imports(row: Row) -> int:
    """Equals the bytes that loading and scoring added to what the libraries take."""
    return row.memory["scores"] - row.memory["imports"]
