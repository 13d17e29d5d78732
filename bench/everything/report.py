"""Tables of the GPU comparison, for the terminal and for Markdown."""

from __future__ import annotations

import numpy as np

from bench.everything.comparison import Findings, ModelResult, Row
from bench.harness.tables import Table, show_tables
from bench.harness.timing import percentile, ratio
from bench.kernels import KernelResult
from bench.llm.gpu import LlmResult

BASE = "sentence-transformers"
_ERROR = "Error: rms against float64 over the rms of the result; checked before timing, as in the tests."


def show(findings: Findings, *, markdown: bool) -> None:
    """Prints the report to standard output."""
    host = findings.host
    gpu = host.get("gpu", {}).get("name", "no GPU: tiny shapes on a CPU, the times mean nothing")
    driver = next((one.get("driver_version", "") for one in host["clocks before"]), "")
    versions = ", ".join(f"{name} {version}" for name, version in host["versions"].items())
    head = [f"{gpu}" + (f", driver {driver}" if driver else ""), versions, host["command"], *findings.notes]
    head += [f"{part} FAILED: {error.strip().splitlines()[-1]}" for part, error in findings.failures.items()]
    show_tables(head, tables(findings), markdown=markdown)


def tables(findings: Findings) -> list[Table]:
    """Equals the report's tables, those that have no rows left out."""
    found = [
        _ceilings(findings),
        _kernels(
            findings,
            findings.attention,
            "Attention alone, forward",
            "Floors: q, k, v and output moved once at the copy rate; products inside documents at the matmul rate.",
        ),
        _kernels(
            findings,
            findings.attention_mass,
            "Attention mass alone: weighted rows on every key",
            "Floors: q, k, logarithms and masses moved once at the copy rate; products at the matmul rate.",
        ),
        _kernels(
            findings,
            findings.label_logits,
            "Label logits alone: final norm, label rows, order",
            "Floors: states, label rows, logits and order moved once at the copy rate; products at the matmul rate.",
        ),
        _kernels(
            findings,
            findings.cur,
            "Scan of packed items: the best k of queries",
            "Floors: int8 values and scales read once at the copy rate, for the rivals too, which read bfloat16.",
            "Error: share of the exact best that is missing. ops.cur_topk waits for the answer, its kernels do not.",
        ),
    ]
    for model in findings.models:
        found += [_engines(model, findings.ceilings.get("matmul")), _latency(model), _profile(model)]
    for llm in findings.llms:
        found += [_llm(llm, size, findings.ceilings.get("matmul")) for size in llm.tokens]
    return [table for table in found if table.rows]


def _ceilings(findings: Findings) -> Table:
    units = {
        "matmul": ("bfloat16 product, 8192^3", 1e12, "TFLOP/s"),
        "copy": ("device-to-device copy, read plus written", 1e9, "GB/s"),
        "read": ("ops.bandwidth, read only", 1e9, "GB/s"),
    }
    rows = [
        [units[name][0], f"{value / units[name][1]:.0f}", units[name][2]] for name, value in findings.ceilings.items()
    ]
    return Table("Ceilings, measured on random data", ["what", "rate", "unit"], rows, [])


def _kernels(
    findings: Findings, results: list[KernelResult], title: str, floors_note: str, error_note: str = _ERROR
) -> Table:
    by_name = {case["name"]: case for case in findings.cases}
    rows = []
    for one in results:
        if one.state != "ok":
            rows.append([one.case, one.way, one.state, *[""] * 5])
            continue
        case, best = by_name[one.case], float(np.median(one.graph or one.call))
        floors = _floors(case, findings.ceilings)
        rows.append(
            [
                one.case,
                one.way,
                f"{1e6 * float(np.median(one.graph)):.1f}" if one.graph else "",
                f"{1e6 * float(np.median(one.call)):.1f}",
                *(f"{1e6 * floor:.1f}" if floor else "" for floor in floors),
                f"{max(floors) / best:.0%}" if any(floors) else "",
                f"{one.error:.1e}",
            ]
        )
    columns = ["case", "way", "in a graph, us", "a call, us", "bytes floor", "flops floor", "of floor", "error"]
    details = {(one.way, one.detail) for one in results if one.detail}
    notes = [f"{way}: {detail}" for way, detail in sorted(details)]
    notes.append(floors_note)
    notes.append(error_note)
    return Table(title, columns, rows, notes)


def _floors(case: dict[str, float], ceilings: dict[str, float]) -> tuple[float, float]:
    if not ceilings:
        return 0.0, 0.0
    return case["bytes"] / ceilings["copy"], case["flop"] / ceilings["matmul"]


def _engines(model: ModelResult, peak: float | None) -> Table:
    sizes = list(model.tokens)
    base = next((row.seconds for row in model.rows if row.name == BASE), {})
    rows = []
    for row in model.rows:
        if not row.seconds:
            rows.append([row.name, row.state, *[""] * (3 * len(sizes) + 2)])
            continue
        cells = [row.name, str(row.batch or "")]
        for size in sizes:
            seconds = row.seconds.get(size)
            cells += _timed(seconds, base.get(size), model.flop[size], peak) if seconds else ["failed", "", ""]
        rows.append([*cells, f"{row.peak_bytes / 2**20:.0f}" if row.peak_bytes else "", f"{row.check['tau']:.3f}"])
    columns = ["engine", "batch"]
    for size in sizes:
        columns += [f"{size} docs, ms", "times faster", "of peak"]
    tokens = ", ".join(f"{size} documents {count}" for size, count in model.tokens.items())
    notes = [f"{model.note}. Tokens: {tokens}.", *_details(model.rows)]
    notes.append(f"Times faster: than {BASE}, median of the ratios within each round. Tau: ranking against float32.")
    notes.append("Of peak: real tokens' operations, padding not counted, over the measured bfloat16 product.")
    return Table(f"{model.name}: from token ids to scores", [*columns, "peak MiB", "tau"], rows, notes)


def _timed(seconds: list[float], base: list[float] | None, flop: float, peak: float | None) -> list[str]:
    used = flop / float(np.median(seconds))
    return [
        f"{percentile(seconds, 50):.2f}",
        f"{ratio(base, seconds):.2f}" if base else "",
        f"{used / peak:.0%}" if peak else "",
    ]


def _details(rows: list[Row]) -> list[str]:
    notes = [f"{row.name}: {row.state}: {row.detail}" for row in rows if row.state != "ok"]
    graphs = [f"{row.name} replayed CUDA graphs of {row.graphs} tokens" for row in rows if row.graphs]
    return notes + [f"{note}; larger batches ran without." for note in graphs]


def _latency(model: ModelResult) -> Table:
    rows = [
        [name, f"{percentile(seconds, 50):.2f}", f"{percentile(seconds, 95):.2f}", str(len(seconds))]
        for name, seconds in model.latency.items()
    ]
    notes = [f"{max(model.tokens)} documents per request, every request another query."]
    title = f"{model.name}: `rank`, from text to ranked list"
    return Table(title, ["engine", "p50, ms", "p95, ms", "requests"], rows, notes)


def _profile(model: ModelResult) -> Table:
    found = model.profile
    if found is None:
        return Table("", [], [], [])
    busy = sum(found.kinds.values())
    parts = sorted(found.kinds.items(), key=lambda part: -part[1])
    rows = [[name, f"{1e3 * value:.3f}", f"{value / found.span:.0%}"] for name, value in parts]
    rows += [["gaps between kernels", f"{1e3 * found.gaps:.3f}", f"{found.gaps / found.span:.0%}"]]
    rows += [["whole span", f"{1e3 * found.span:.3f}", f"{busy / found.span:.0%} busy"]]
    notes = [f"{found.launches} launches. One forward of {max(model.tokens)} documents, no CUDA graph. The longest:"]
    notes += [f"{1e3 * value:8.3f} ms in {count:4d}: {name[:90]}" for name, count, value in found.longest[:8]]
    return Table(f"{model.name}: where a packed forward goes", ["kind", "ms", "of the span"], rows, notes)


def _llm(model: LlmResult, size: int, peak: float | None) -> Table:
    """One language model at so many documents: times faster than each rival, MFU, memory."""
    measured = [row for row in model.rows if size in row.seconds]
    theirs = [row for row in measured if not row.name.startswith("fastrerank")]
    rows = []
    for row in model.rows:
        if row not in measured:
            rows.append([row.name, row.state, *[""] * (7 + len(theirs))])
            continue
        seconds = row.seconds[size]
        speed = row.flop[size] / float(np.median(seconds))
        rows.append(
            [
                row.name + (" (on text)" if row.on_text else ""),
                str(row.batch or ""),
                f"{percentile(seconds, 50):.1f}",
                *(f"{ratio(them.seconds[size], seconds):.2f}" for them in theirs),
                f"{row.tokens[size]}",
                f"{row.flop[size] / 1e12:.2f}",
                f"{speed / 1e12:.1f}",
                f"{speed / peak:.0%}" if peak else "",
                f"{row.peak_bytes[size] / 2**20:.0f}" if row.peak_bytes else "",
                f"{row.check['tau']:.3f}",
            ]
        )
    notes = [f"{model.note}. {size} documents, {model.tokens[size]} tokens of prompts."]
    notes += [f"{row.name}: {row.state}: {row.detail}" for row in model.rows if row.state != "ok"]
    for row in measured:
        if row.prefix_tokens[size]:
            saved = 1 - row.tokens[size] / model.tokens[size]
            notes.append(f"{row.name}: {saved:.0%} fewer tokens pass; {row.prefix_tokens[size]} are shared prefixes.")
        if row.tokenise_seconds:
            notes.append(f"{row.name}: {1e3 * row.tokenise_seconds[size]:.1f} ms of its time is tokenising.")
    if peak:
        floors = [f"{row.name} {1e3 * row.flop[size] / peak:.1f}" for row in measured]
        notes.append(f"Floors, ms, of its tokens' operations at the measured bfloat16 product: {', '.join(floors)}.")
    notes.append("TFLOP: of the tokens that pass, padding not counted; theirs include the head's whole vocabulary.")
    notes.append(f"Allowed rms error against float32 on the first documents: {model.bound:.1e}. Tau: ranking of them.")
    against = [f"x {row.name}" for row in theirs]
    columns = ["engine", "batch", "ms", *against, "tokens", "TFLOP", "TFLOP/s", "MFU", "peak MiB", "tau"]
    return Table(f"{model.name}: {size} documents, from token ids to scores", columns, rows, notes)
