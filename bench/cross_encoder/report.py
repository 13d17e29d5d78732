"""Tables of the cross-encoder comparison, for the terminal and for Markdown."""

from __future__ import annotations

import numpy as np

from bench.cross_encoder.cpu import SIZES, EngineResult, Findings
from bench.harness.tables import Table, show_tables
from bench.harness.timing import percentile, ratio

BASE = "sentence-transformers"


def tables(findings: Findings) -> list[Table]:
    """Equals the report's tables, those that have no rows left out."""
    found = [_check(findings), _main(findings), _ratios(findings)]
    found += [_latency(findings), _split(findings), _variants(findings)]
    return [table for table in found if table.rows]


def show(findings: Findings, *, markdown: bool) -> None:
    """Prints the report to standard output."""
    host, work = findings.host, findings.workload
    head = [
        f"{work['model']}; 1 query x {work['documents']} DL19 passages, {work['tokens']} tokens "
        f"(longest {work['longest']}), {findings.flop / 1e9:.0f} GFLOP",
        f"{host['cpu']}, {host['threads']} threads of {host['cores']}; Python {host['python']}, {host['system']}",
        f"{host['command']}",
    ]
    show_tables(head, tables(findings), markdown=markdown)


def _main(findings: Findings) -> Table:
    rows = []
    base = _seconds(findings, BASE)
    for row in findings.engines:
        label = [row.name + (" (on text)" if row.on_text else ""), _setting(row)]
        if not row.seconds:
            rows.append([*label, row.state, *[""] * 5])
            continue
        speed = findings.flop / float(np.median(row.seconds))
        peak = findings.peaks.get(row.precision)
        rows.append(
            [
                *label,
                f"{percentile(row.seconds, 50):.0f}",
                f"{percentile(row.seconds, 5):.0f}-{percentile(row.seconds, 95):.0f}",
                f"{ratio(base, row.seconds):.2f}" if base else "",
                f"{speed / 1e9:.0f}",
                f"{speed / peak:.0%}" if peak else "",
                f"{row.peak_bytes / 2**20:.0f}" if row.peak_bytes else "",
            ]
        )
    columns = ["engine", "batch", "ms", "5-95 %", "times faster", "GFLOP/s", "of peak", "peak MiB"]
    notes = [f"{row.name}: {row.state}: {row.detail}" for row in findings.engines if row.state != "ok"]
    notes += [
        f"Times faster: than {BASE}, median of the ratios within each of {_rounds(findings)} interleaved rounds.",
        "GFLOP/s: real tokens of the whole model; padding is not counted, pruning not credited.",
    ]
    if findings.peaks:
        peaks = ", ".join(f"{name} {value / 1e9:.0f}" for name, value in findings.peaks.items())
        notes.append(f"Peak of this host in registers, in 1e9 operations/s: {peaks}.")
    for row in findings.measured():
        if row.tokenise_seconds is not None:
            notes.append(f"{row.name}: {1e3 * row.tokenise_seconds:.0f} ms of its time is tokenising.")
    return Table("From token ids to scores", columns, rows, notes)


def _check(findings: Findings) -> Table:
    rows = [
        [
            row.name,
            row.version,
            f"{row.check['relative']:.1e}",
            f"{row.check['tau']:.3f}",
            f"{row.check['top10']:.0%}",
            row.state,
        ]
        for row in findings.engines
        if row.check
    ]
    notes = [
        "error: max |logit - transformers eager float32| over the range of its logits; Kendall's tau with its ranking.",
        f"A float32 engine whose logits are off by more than {findings.bound:.1e} is WRONG and not timed.",
    ]
    columns = ["engine", "version", "error", "tau", "same top 10", "state"]
    return Table("Scores, checked first", columns, rows, notes)


def _ratios(findings: Findings) -> Table:
    ours = [row for row in findings.measured() if row.ours]
    theirs = [row for row in findings.measured() if not row.ours]
    rows = [[them.name, *(f"{ratio(them.seconds, us.seconds):.2f}" for us in ours)] for them in theirs]
    notes = ["How many times faster ours is: median of the ratios within each round."]
    return Table("Ours against each rival", ["rival", *(us.name for us in ours)], rows if ours else [], notes)


def _latency(findings: Findings) -> Table:
    rows = []
    for name, sizes in findings.latency.items():
        cells = [
            f"{percentile(sizes[size], 50):.0f} / {percentile(sizes[size], 95):.0f}" if size in sizes else "failed"
            for size in SIZES
        ]
        rows.append([name, *cells])
    samples = {len(seconds) for sizes in findings.latency.values() for seconds in sizes.values()}
    notes = [f"Each of {', '.join(map(str, sorted(samples)))} requests is another query."]
    return Table("Text to ranked list, ms, p50 / p95", ["documents", *map(str, SIZES)], rows, notes)


def _split(findings: Findings) -> Table:
    names = sorted({stage for stages in findings.stages.values() for stage in stages if stage != "whole call"})
    rows = []
    for engine, stages in findings.stages.items():
        whole = np.asarray(stages["whole call"])
        parts = [np.asarray(stages.get(name, np.zeros_like(whole))) for name in names]
        rest = whole - np.sum(parts, axis=0)
        rows.append([engine, *(f"{percentile(part, 50):.1f}" for part in [*parts, rest, whole])])
    return Table("Where a request of 100 documents goes, ms", ["engine", *names, "rest", "whole call"], rows, [])


def _variants(findings: Findings) -> Table:
    rows = []
    for name, times in findings.variants.items():
        full = times.get("as measured", [])
        single, avx2 = times.get("1 thread", []), times.get("avx2 level", [])
        rows.append(
            [
                name,
                f"{percentile(full, 50):.0f}" if full else "",
                f"{percentile(single, 50):.0f}" if single else "",
                f"{ratio(single, full):.2f}" if single and full else "",
                f"{percentile(avx2, 50):.0f}" if avx2 else "",
                f"{findings.quality[name]:.4f}" if name in findings.quality else "",
            ]
        )
    threads = f"{findings.host['threads']} threads"
    columns = ["engine", f"{threads}, ms", "1 thread, ms", "scaling", "AVX2 level, ms", "nDCG@10"]
    notes = ["nDCG@10: all-MiniLM-L6-v2's MaxSim on DL19's BM25 lists (a trained model, unlike the head timed here)."]
    return Table("Threads, instruction set, quality", columns, rows, notes)


def _setting(row: EngineResult) -> str:
    if "batch" not in row.setting:
        return "32" if row.name.startswith(BASE) else ""
    return f"{row.setting['batch']}" + (" x streams" if row.setting.get("streams") == "threads" else "")


def _seconds(findings: Findings, name: str) -> list[float] | None:
    return next((row.seconds for row in findings.measured() if row.name == name), None)


def _rounds(findings: Findings) -> int:
    return max((len(row.seconds) for row in findings.measured()), default=0)
