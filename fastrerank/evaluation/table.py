"""A comparison on a terminal, and as tab-separated values elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from fastrerank.evaluation.statistics import ALPHA, PairedTest

if TYPE_CHECKING:
    from fastrerank.evaluation.comparison import Comparison

__all__ = [
    "best",
    "failed",
    "highest",
    "interval",
    "mark",
    "mebibytes",
    "milliseconds",
    "p_value",
    "print_comparison",
    "tab_separated",
]

_WIDE = 124  # columns from which differences and their intervals have room


def mark(test: PairedTest | None) -> str:
    """Return ▲ or ▼ where the corrected p is below 0.05, by the sign of the difference; else ""."""
    if test is None or test.p_holm >= ALPHA:
        return ""
    return "▲" if test.difference > 0 else "▼"


def best(comparison: Comparison, dataset: str, measure: str) -> set[str]:
    """Return the systems whose mean is the highest as printed, with four decimals; none where all are equal."""
    return highest({name: result.metrics[measure] for name, result in comparison.results[dataset].items()})


def highest(values: Mapping[str, float]) -> set[str]:
    """Return the names of the highest values as printed, with four decimals; none where all are equal.

    Example:
        >>> highest({"a": 0.50001, "b": 0.50002, "c": 0.4}) == {"a", "b"}
        True
    """
    shown = {name: round(value, 4) for name, value in values.items()}
    return {name for name, value in shown.items() if min(shown.values()) < value == max(shown.values())}


def failed(comparison: Comparison, dataset: str, system: str) -> bool:
    """Whether the system has no result on this data set."""
    return system not in comparison.results[dataset]


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print a table for each data set, best values in bold; or, away from a terminal, one of tab-separated values."""
    if not console.is_terminal:
        for row in tab_separated(comparison):
            print("\t".join(row))
        return
    for dataset in comparison.datasets:
        wide = console.width >= _WIDE
        _print_whole(console, comparison, partial(_table, comparison, dataset, wide=wide))
        for name, result in comparison.results[dataset].items():
            for note in result.notes:
                console.print(Text(f"{name} {note}", style="dim"))
    if len(comparison.datasets) > 1:
        _print_whole(console, comparison, lambda names: _means(comparison, names))


def _print_whole(console: Console, comparison: Comparison, table: Callable[[Mapping[str, str]], Table]) -> None:
    """Print a table with the systems' names whole: where they do not fit, with numbers, and the names below it."""
    names = list(comparison.systems)
    made = table({name: name for name in names})
    if _width(made) <= console.width:
        console.print(made)
        return
    numbers = {name: str(number) for number, name in enumerate(names, start=1)}
    made = table(numbers)
    # numbers are not cut: a table of many measures may be wide
    console.print(made, width=max(console.width, _width(made)), crop=False)
    for name, number in numbers.items():
        console.print(Text(f"{number}  {name}"), soft_wrap=True)


def _width(table: Table) -> int:
    """Columns of a terminal that the table needs for nothing in it to be broken or cut."""
    wide = Console(width=10_000)
    return Measurement.get(wide, wide.options, table).maximum


def _table(comparison: Comparison, dataset: str, names: Mapping[str, str], *, wide: bool) -> Table:
    pool = comparison.datasets[dataset]
    caption = f"{len(pool.queries)} queries, {pool.judged} judged; ▲ ▼: p < {ALPHA} against {comparison.baseline}"
    if wide:
        caption += f" (randomisation test, Holm); Δ {comparison.measures[0]} with 95 % interval, p corrected"
    table = Table(title=Text(dataset), caption=Text(caption))
    table.add_column("system", no_wrap=True)
    for measure in comparison.measures:
        table.add_column(Text(measure), justify="right", no_wrap=True)
    extra = ["Δ", "p"] if wide else []
    for name in [*extra, "p50 ms", "p95 ms", "MiB"]:
        table.add_column(name, justify="right", no_wrap=True)
    tests = {measure: comparison.tests(dataset, measure) for measure in comparison.measures}
    bold = {measure: best(comparison, dataset, measure) for measure in comparison.measures}
    for name in comparison.systems:
        if failed(comparison, dataset, name):
            table.add_row(
                Text(names[name]), Text("failed", style="red"), *[""] * (len(comparison.measures) + len(extra) + 2)
            )
            continue
        result = comparison.results[dataset][name]
        cells = [Text(names[name])]
        for measure in comparison.measures:
            text = f"{result.metrics[measure]:.4f}{mark(tests[measure].get(name)) or ' '}"
            cells.append(Text(text, style="bold" if name in bold[measure] else ""))
        if wide:
            test = tests[comparison.measures[0]].get(name)
            cells += [Text(interval(test)), Text(p_value(test.p_holm) if test else "")]
        cells += [Text(milliseconds(result.latency(p))) for p in (50, 95)]
        cells.append(Text(mebibytes(comparison.systems[name]["peak_bytes"])))
        table.add_row(*cells)
    return table


def _means(comparison: Comparison, names: Mapping[str, str]) -> Table:
    table = Table(title=f"mean of {len(comparison.datasets)} data sets")
    table.add_column("system", no_wrap=True)
    for measure in comparison.measures:
        table.add_column(Text(measure), justify="right", no_wrap=True)
    means = comparison.means()
    bold = {m: highest({name: metrics[m] for name, metrics in means.items()}) for m in comparison.measures}
    for name, metrics in means.items():
        cells = (Text(f"{metrics[m]:.4f}", style="bold" if name in bold[m] else "") for m in comparison.measures)
        table.add_row(Text(names[name]), *cells)
    return table


def tab_separated(comparison: Comparison) -> list[list[str]]:
    """Return the header and one row for each data set and system; the cells of a failed one are empty."""
    first = comparison.measures[0]
    header = ["dataset", "system", *comparison.measures, f"{first} difference", "low", "high", "p t-test"]
    header += ["p randomisation", "p holm", "p50 ms", "p95 ms", "peak MiB"]
    rows = [header]
    for dataset in comparison.datasets:
        tests = comparison.tests(dataset, first)
        for name, system in comparison.systems.items():
            row = [dataset, name]
            if not failed(comparison, dataset, name):
                result = comparison.results[dataset][name]
                row += [f"{result.metrics[measure]:.4f}" for measure in comparison.measures]
                test = tests.get(name)
                numbers = (
                    [test.difference, test.low, test.high, test.p_t, test.p_randomisation, test.p_holm] if test else []
                )
                row += [f"{number:.4g}" for number in numbers] or [""] * 6
                row += [milliseconds(result.latency(50)), milliseconds(result.latency(95))]
                row += [mebibytes(system["peak_bytes"])]
            rows.append(row + [""] * (len(header) - len(row)))
    return rows


def interval(test: PairedTest | None) -> str:
    """Return "+0.0123 [+0.0012, +0.0234]"; "" without a test."""
    return "" if test is None else f"{test.difference:+.4f} [{test.low:+.4f}, {test.high:+.4f}]"


def p_value(p: float) -> str:
    """Return p with three decimals, or "<0.001"."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def milliseconds(seconds: float | None) -> str:
    """Return seconds as milliseconds; "" for None."""
    return "" if seconds is None else f"{1e3 * seconds:.1f}"


def mebibytes(count: int | None) -> str:
    """Return bytes as MiB; "" for None."""
    return "" if count is None else f"{count / 2**20:.0f}"
