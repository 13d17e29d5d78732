"""A comparison as one HTML page that needs nothing else: no script, no font, no picture from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING

from fastrerank.evaluation import plots
from fastrerank.evaluation.statistics import ALPHA, RESAMPLES, PairedTest
from fastrerank.evaluation.table import best, failed, highest, interval, mark, mebibytes, milliseconds, p_value

if TYPE_CHECKING:
    from fastrerank.evaluation.comparison import Comparison

__all__ = ["to_html"]

_EXAMPLES = 5  # queries that gain and lose most, for each system
_TEXTS = {"what", "options", "text"}  # columns that are not numbers
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_STYLE = """
:root { color-scheme: light dark;
  --ground: #fcfcfb; --card: #ffffff; --ink: #1c1e21; --soft: #5c636b; --line: #dfe2e6; --strong: #9aa1a9;
  --up: #1a7f5a; --down: #b4443c; --mark: #eef6f2;
  --s0: #6b7280; --s1: #0b63b5; --s2: #c2500b; --s3: #0f7b5f; --s4: #8a3fa0; --s5: #9a6b00; --s6: #b3266b;
  --s7: #0a7c93; }
@media (prefers-color-scheme: dark) { :root {
  --ground: #14161a; --card: #1b1e23; --ink: #e7e9ec; --soft: #a2a9b2; --line: #32373e; --strong: #6d757f;
  --up: #4cc38a; --down: #ef7a70; --mark: #1d2c26;
  --s0: #a3abb5; --s1: #63aef5; --s2: #f59b5b; --s3: #4fcaa2; --s4: #cf93e6; --s5: #e0b64f; --s6: #f284b4;
  --s7: #5fcbe0; } }
* { box-sizing: border-box; }
body { font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: var(--ink);
  background: var(--ground); max-width: 70rem; margin: 0 auto; padding: 2.2rem 1.2rem 4rem; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; } h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.8rem 0 .3rem; }
p, ul { margin: .4rem 0; } .soft, figcaption, caption { color: var(--soft); font-size: .87rem; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .42rem .7rem; text-align: right; white-space: nowrap; border-top: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; font-weight: 500; }
thead th, thead th:first-child { border-top: 0; color: var(--soft); font-weight: 600; font-size: .87rem; }
th.text, td.text { text-align: left; white-space: normal; font-weight: 400; overflow-wrap: anywhere; }
tr.baseline { background: var(--mark); }
.sign { display: inline-block; width: 1em; text-align: center; font-weight: 400; }
.best { font-weight: 700; } .up { color: var(--up); fill: var(--up); } .down { color: var(--down); fill: var(--down); }
.swatch { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .55em; }
.plots { display: grid; gap: 1rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem; }
svg { display: block; max-width: 100%; height: auto; margin: 0 auto; font-size: 12px; }
svg text { fill: var(--soft); } svg text.name { font-weight: 600; }
.grid { stroke: var(--line); } .axis { stroke: var(--strong); }
.frontier { stroke: var(--strong); stroke-dasharray: 2 4; fill: none; } .area { fill: var(--s1); opacity: .75; }
.hit { fill: transparent; } g:hover > .hit { fill: var(--line); opacity: .5; }
.error { border-left: 4px solid var(--down); padding: .4rem .9rem; background: var(--card); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .8rem; max-height: 24rem; overflow: auto; }
details { margin: .5rem 0; } summary { cursor: pointer; color: var(--soft); }
@media print { body { max-width: none; padding: 0; } figure, .scroll { break-inside: avoid; } }
"""


def to_html(comparison: Comparison) -> str:
    """Return the page: tables, plots, per-query differences, failures, and how all of it was made.

    Colours follow the reader's light or dark setting. A bar's or point's values show where it is pointed at.

    Example:
        >>> Path("report.html").write_text(to_html(comparison))                          # doctest: +SKIP
    """
    names = ", ".join(comparison.datasets)
    body = [f"<h1>Reranking on {_escape(names)}</h1>", f'<p class="soft">{_escape(_subtitle(comparison))}</p>']
    body += [_failures(comparison)]
    if len(comparison.datasets) > 1:
        body += ["<h2>Mean of the data sets</h2>", _means(comparison)]
    for dataset in comparison.datasets:
        body += _dataset(comparison, dataset)
    body += ["<h2>Systems</h2>", _systems(comparison), "<h2>How this was made</h2>", _method(comparison)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{_escape(names)}: {len(comparison.systems)} systems</title>\n<style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body></html>\n"
    )


def _subtitle(comparison: Comparison) -> str:
    about = comparison.about
    parts = [f"{len(comparison.systems)} systems", f"baseline {comparison.baseline}", str(about["processor"])]
    return ", ".join([*parts, f"{about['threads']} threads", f"fastrerank {about['fastrerank']}", str(about["time"])])


def _dataset(comparison: Comparison, dataset: str) -> list[str]:
    pool, results = comparison.datasets[dataset], comparison.results[dataset]
    first = comparison.measures[0]
    counts = sorted(pool.candidates)
    spread = str(counts[0]) if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"
    parts = [f"<h2>{_escape(dataset)}</h2>"]
    parts.append(f'<p class="soft">{len(pool.queries)} queries, {pool.judged} judged, {spread} candidates each.</p>')
    parts.append(_table(comparison, dataset))
    parts += [
        f'<p class="soft">{_escape(f"{name} {note}.")}</p>' for name, result in results.items() for note in result.notes
    ]
    if not results:
        return parts
    colours = {name: number for number, name in enumerate(comparison.systems)}
    points = [
        plots.Point(name, colours[name], _ms(result.latency(50)), result.metrics[first])
        for name, result in results.items()
    ]
    caption = (
        f"{first} and time: up and left is better. The dotted line joins what nothing else beats in both; dashed lines "
        "were not timed."
    )
    overview = [_figure(plots.scatter(points, "median milliseconds per query", first), caption)]
    tests = comparison.tests(dataset, first)
    if tests:
        label = f"difference in {first} from {comparison.baseline}"
        overview.append(_figure(plots.forest(tests, colours, label), "Means over the judged queries, 95 % intervals."))
    for kind in ("nDCG", "Recall"):
        series = {name: result.curves[kind] for name, result in results.items() if result.curves[kind]}
        if series:
            overview.append(_figure(plots.curves(series, colours, f"{kind}@k"), f"{kind} by cut-off."))
    parts += [_plots(overview)]
    if tests:
        parts += [f"<h3>Tests against {_escape(comparison.baseline)}</h3>", _tests(tests, first)]
    others = [name for name in results if name != comparison.baseline]
    if comparison.baseline in results and others:
        parts += [f"<h3>Query by query: {_escape(first)} less that of {_escape(comparison.baseline)}</h3>"]
        parts += [_plots(_bars(comparison, dataset, name) for name in others)]
        parts += ["<details><summary>Queries that gain and lose most</summary>"]
        parts += [_examples(comparison, dataset, name) for name in others]
        parts += ["</details>"]
    return parts


def _table(comparison: Comparison, dataset: str) -> str:
    measures, first = comparison.measures, comparison.measures[0]
    tests = {measure: comparison.tests(dataset, measure) for measure in measures}
    bold = {measure: best(comparison, dataset, measure) for measure in measures}
    gpu = any(system["peak_gpu_bytes"] is not None for system in comparison.systems.values())
    header = ["system", *measures, f"Δ {first} [95 %]", "p50 ms", "p95 ms", "peak MiB", *(["GPU MiB"] if gpu else [])]
    rows = []
    for number, (name, system) in enumerate(comparison.systems.items()):
        cells = [
            f'<td><span class="swatch" style="background:var(--s{number % plots.COLOURS})"></span>{_escape(name)}</td>'
        ]
        if failed(comparison, dataset, name):
            cells.append(f'<td class="down" colspan="{len(header) - 1}" style="text-align:left">failed</td>')
        else:
            result = comparison.results[dataset][name]
            for measure in measures:
                sign = mark(tests[measure].get(name))
                shown = f'<span class="sign {"up" if sign == "▲" else "down"}">{sign}</span>'
                style = ' class="best"' if name in bold[measure] else ""
                cells.append(f"<td{style}>{result.metrics[measure]:.4f}{shown}</td>")
            numbers = [interval(tests[first].get(name)), *(milliseconds(result.latency(p)) for p in (50, 95))]
            numbers += [mebibytes(system["peak_bytes"])] + ([mebibytes(system["peak_gpu_bytes"])] if gpu else [])
            cells += [f"<td>{number}</td>" for number in numbers]
        kind = ' class="baseline"' if name == comparison.baseline else ""
        rows.append(f"<tr{kind}>{''.join(cells)}</tr>")
    note = (
        f"Bold: best. ▲ ▼: better or worse than {comparison.baseline}, p &lt; {ALPHA} by the randomisation test after "
        "Holm's correction."
    )
    return _html_table(header, rows) + f'<p class="soft">{note}</p>'


def _tests(tests: dict[str, PairedTest], measure: str) -> str:
    header = ["system", f"Δ {measure}", "95 % interval", "effect d", "p randomisation", "p Holm", "p t-test"]
    header += ["better / equal / worse"]
    rows = []
    for name, test in tests.items():
        cells = [
            f"{test.difference:+.4f}",
            f"{test.low:+.4f} … {test.high:+.4f}",
            "" if test.effect is None else f"{test.effect:+.2f}",
        ]
        cells += [p_value(p) for p in (test.p_randomisation, test.p_holm, test.p_t)]
        cells += [f"{test.better} / {test.equal} / {test.worse}"]
        rows.append(f"<tr><td>{_escape(name)}</td>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    return _html_table(header, rows)


def _query_differences(comparison: Comparison, dataset: str, name: str) -> dict[str, tuple[float, float, float]]:
    """Query id -> (baseline's value, the system's, their difference), the largest gain first."""
    first = comparison.measures[0]
    own = comparison.results[dataset][name].per_query
    against = comparison.results[dataset][comparison.baseline].per_query
    rows = {qid: (against[qid][first], own[qid][first], own[qid][first] - against[qid][first]) for qid in own}
    return dict(sorted(rows.items(), key=lambda entry: -entry[1][2]))


def _bars(comparison: Comparison, dataset: str, name: str) -> str:
    texts = comparison.datasets[dataset].queries
    values = {
        qid: (difference, f"{_clean(texts[qid])} ({before:.3f} → {after:.3f})")
        for qid, (before, after, difference) in _query_differences(comparison, dataset, name).items()
    }
    counts = [sum(difference > 0 for difference, _ in values.values()), sum(d < 0 for d, _ in values.values())]
    label = f"{name}: {counts[0]} better, {len(values) - sum(counts)} equal, {counts[1]} worse"
    return _figure(plots.differences(values, label), "")


def _examples(comparison: Comparison, dataset: str, name: str) -> str:
    found = list(_query_differences(comparison, dataset, name).items())
    shown = [entry for entry in found[:_EXAMPLES] if entry[1][2] > 0]
    shown += [entry for entry in found[-_EXAMPLES:] if entry[1][2] < 0]
    rows = [
        f'<tr><td>{_escape(qid)}</td><td class="text">{_escape(comparison.datasets[dataset].queries[qid])}</td>'
        f'<td>{before:.4f}</td><td>{after:.4f}</td><td class="{"up" if difference > 0 else "down"}">'
        f"{difference:+.4f}</td></tr>"
        for qid, (before, after, difference) in shown
    ]
    return _html_table(["query", "text", comparison.baseline, name, "Δ"], rows) if rows else ""


def _means(comparison: Comparison) -> str:
    means = comparison.means()
    bold = {m: highest({name: metrics[m] for name, metrics in means.items()}) for m in comparison.measures}
    rows = []
    for name, metrics in means.items():
        cells = [f'<td class="{"best" if name in bold[m] else ""}">{metrics[m]:.4f}</td>' for m in comparison.measures]
        rows.append(f"<tr><td>{_escape(name)}</td>{''.join(cells)}</tr>")
    return _html_table(["system", *comparison.measures], rows)


def _systems(comparison: Comparison) -> str:
    rows = []
    for name, system in comparison.systems.items():
        what = str(system.get("model") or system.get("run") or system.get("ranker"))
        options = ", ".join(f"{key}={value}" for key, value in system.get("options", {}).items())
        seconds = "" if system["load_seconds"] is None else f"{system['load_seconds']:.2f}"
        rows.append(
            f'<tr><td>{_escape(name)}</td><td class="text">{_escape(what)}</td><td class="text">{_escape(options)}</td>'
            f"<td>{seconds}</td></tr>"
        )
    return _html_table(["system", "what", "options", "load s"], rows)


def _failures(comparison: Comparison) -> str:
    return "".join(
        f'<div class="error"><b>{_escape(failure.system)}</b> failed'
        f"{_escape(f' on {failure.dataset}') if failure.dataset else ''}: {_escape(failure.error)}"
        + (
            f"<details><summary>details</summary><pre>{_escape(failure.detail)}</pre></details>"
            if failure.detail
            else ""
        )
        + "</div>"
        for failure in comparison.failures
    )


def _method(comparison: Comparison) -> str:
    about = comparison.about
    sources = "; ".join(f"{name}: {pool.source}" for name, pool in comparison.datasets.items())
    depth = "all candidates" if about["top_k"] is None else f"the first {about['top_k']} candidates"
    points = [
        f"Data: {sources}. Every system reranks {depth} of each query; runs that were read are measured as they are.",
        f"Measures are those of ir_measures (trec_eval), means over the judged queries; a grade of at least "
        f"{comparison.min_relevance} is relevant where a measure does not say it. A document's place is its rank, also "
        "where scores tie.",
        "Time: seconds of each query from text to ranking, one query at a time, in a process that runs one system and "
        f"nothing else, after {about['warmup']} warm-up queries. Peak MiB: the most resident memory of that process, "
        "Python, libraries and the data set's texts included.",
        f"Tests compare each system with {comparison.baseline} on the same queries, two-sided: paired randomisation "
        f"(sign flips, {RESAMPLES:,} or all there are; Smucker et al. 2007) and Student's paired t. Holm's correction "
        "is for all systems of one data set and measure. Intervals are Student's, not corrected; effect d is the mean "
        "difference in standard deviations of the differences.",
        f"Machine: {about['processor']}, {about['platform']}, kernels {about['cpu level']}, {about['threads']} "
        f"threads; fastrerank {about['fastrerank']}, Python {about['python']}.",
    ]
    if about["command"]:
        points.append(f"Command: {about['command']}")
    return "<ul>" + "".join(f"<li>{_escape(point)}</li>" for point in points) + "</ul>"


def _html_table(header: Iterable[str], rows: Iterable[str]) -> str:
    head = "".join(f'<th class="{"text" if name in _TEXTS else ""}">{_escape(name)}</th>' for name in header)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _plots(figures: Iterable[str]) -> str:
    return f'<div class="plots">{"".join(figures)}</div>'


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}{f'<figcaption>{_escape(caption)}</figcaption>' if caption else ''}</figure>"


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def _clean(text: str) -> str:
    return _CONTROL.sub("\ufffd", text)


def _escape(text: str) -> str:
    return escape(_clean(text))
