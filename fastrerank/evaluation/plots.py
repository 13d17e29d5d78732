"""Plots as inline SVG: colours come from the page's style (`--s0` ... and `--line`), so they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from fastrerank.evaluation.statistics import PairedTest

__all__ = ["COLOURS", "Point", "curves", "differences", "forest", "scatter"]

COLOURS = 8  # of the page's style; further systems repeat them with another dash
_DASHES = ("", "6 3", "2 3")
_WIDTH = 540  # of a plot, in the units of its 12 px type
_CHARACTER, _BOLD = 6.7, 7.6  # mean width of a character of 12 px type
_BARS = 400  # with more queries, bars become one area


@dataclass(frozen=True)
class Point:
    """One system of the scatter: its place (x is None where it was not timed) and the number of its colour."""

    name: str
    colour: int
    x: float | None
    y: float


def scatter(points: Sequence[Point], x_label: str, y_label: str) -> str:
    """Return quality against time on a logarithmic axis. A system that was not timed is a horizontal line."""
    width, height, left, right, top, bottom = _WIDTH, 340, 60, 14, 14, 44
    timed = [(point, point.x) for point in points if point.x is not None]
    low, high = _log_range([x for _, x in timed])
    ticks = _ticks(*_widened([point.y for point in points]), 6)
    floor, ceiling = ticks[0], ticks[-1]

    def at_x(value: float) -> float:
        return left + (math.log10(value) - low) / (high - low) * (width - left - right)

    def at_y(value: float) -> float:
        return height - bottom - (value - floor) / (ceiling - floor) * (height - top - bottom)

    parts = [_text(left + (width - left - right) / 2, height - 8, x_label, "middle")]
    parts += [_text(14, top + (height - top - bottom) / 2, y_label, "middle", turned=True)]
    for tick in ticks:
        parts += [_line(left, at_y(tick), width - right, at_y(tick), "grid")]
        parts += [_text(left - 8, at_y(tick) + 4, _number(tick, ticks), "end")]
    for value in _log_ticks(low, high):
        parts += [_line(at_x(value), top, at_x(value), height - bottom, "grid")]
        parts += [_text(at_x(value), height - bottom + 18, f"{value:g}", "middle")]
    taken: list[tuple[float, float, float, float]] = []
    for point in points:
        if point.x is None:
            y = at_y(point.y)
            parts.append(_stroke(f"M{left} {y:.1f}H{width - right}", point.colour, 1.5, "5 4", point.name, point.y))
            parts.append(_label(point.name, left + 8, y - 6, "start", point.colour))
            taken.append((left + 8, y - 17, left + 8 + _BOLD * len(point.name), y - 3))
    taken += [(at_x(x) - 7, at_y(point.y) - 7, at_x(x) + 7, at_y(point.y) + 7) for point, x in timed]
    best = -math.inf
    frontier = []
    for point, x in sorted(timed, key=lambda entry: (entry[1], -entry[0].y)):
        if point.y > best:
            frontier.append(f"{at_x(x):.1f} {at_y(point.y):.1f}")
            best = point.y
    if len(frontier) > 1:
        parts.append(f'<path class="frontier" d="M{" L".join(frontier)}"/>')
    for point, x in timed:
        title = f"{point.name}: {y_label} {point.y:.4f}, {x:.1f} ms"
        parts.append(
            f'<circle cx="{at_x(x):.1f}" cy="{at_y(point.y):.1f}" r="6" fill="var(--s{point.colour % COLOURS})">'
            f"<title>{escape(title)}</title></circle>"
        )
        parts.append(_placed(point, at_x(x), at_y(point.y), taken, (left, width - right)))
    return _svg(width, height, f"{y_label} against {x_label}", parts)


def curves(series: Mapping[str, Mapping[int, float]], colours: Mapping[str, int], y_label: str) -> str:
    """Return lines of value by cut-off, cut-offs on a logarithmic axis; the names stand right of their ends."""
    longest = max((len(name) for name in series), default=0)
    width, height, left, top, bottom = _WIDTH, 310, 60, 14, 44
    right = min(200, 20 + _BOLD * longest)
    cutoffs = sorted({k for values in series.values() for k in values})
    ticks = _ticks(*_widened([value for values in series.values() for value in values.values()]), 6)
    low, high = _log_range([float(k) for k in cutoffs], whole=False)

    def at_x(value: float) -> float:
        return left + (math.log10(value) - low) / (high - low) * (width - left - right)

    def at_y(value: float) -> float:
        return height - bottom - (value - ticks[0]) / (ticks[-1] - ticks[0]) * (height - top - bottom)

    parts = [_text(left + (width - left - right) / 2, height - 8, "cut-off k", "middle")]
    parts += [_text(14, top + (height - top - bottom) / 2, y_label, "middle", turned=True)]
    for tick in ticks:
        parts += [_line(left, at_y(tick), width - right, at_y(tick), "grid")]
        parts += [_text(left - 8, at_y(tick) + 4, _number(tick, ticks), "end")]
    edge = -math.inf
    for k in cutoffs:
        if at_x(k) - edge > 8 + _CHARACTER * len(str(k)):
            parts += [_text(at_x(k), height - bottom + 18, str(k), "middle")]
            edge = at_x(k)
    ends = []
    for name, values in series.items():
        points = [(at_x(k), at_y(value)) for k, value in sorted(values.items())]
        if not points:
            continue
        path = "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        dash = _DASHES[colours[name] // COLOURS % len(_DASHES)]
        parts.append(_stroke(path, colours[name], 2, dash, name, list(values.values())[-1]))
        for (x, y), (k, value) in zip(points, sorted(values.items()), strict=True):
            title = f"{name}: {y_label.replace('k', str(k))} {value:.4f}"
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="var(--s{colours[name] % COLOURS})">'
                f"<title>{escape(title)}</title></circle>"
            )
        ends.append((points[-1][1], points[-1][0], name))
    for y, (_, x, name) in zip(
        _apart([end[0] for end in sorted(ends)], 15, top, height - bottom), sorted(ends), strict=True
    ):
        parts.append(_label(name, x + 10, y + 4, "start", colours[name], longest=int((right - 12) / _BOLD)))
    return _svg(width, height, f"{y_label} by cut-off", parts)


def forest(tests: Mapping[str, PairedTest], colours: Mapping[str, int], label: str) -> str:
    """Return each system's mean difference from the baseline with its 95 % interval."""
    width, top, bottom, right = _WIDTH, 12, 44, 18
    row = max(30.0, 284 / len(tests))  # as high as the scatter plot beside it, or higher for many tests
    left = min(200, 22 + _CHARACTER * max(len(name) for name in tests))
    height = top + row * len(tests) + bottom
    edges = [0.0, *(edge for test in tests.values() for edge in (test.low, test.high))]
    ticks = _ticks(*_widened(edges), 7)

    def at(value: float) -> float:
        return left + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (width - left - right)

    parts = [_text(left + (width - left - right) / 2, height - 8, label, "middle")]
    for tick in ticks:
        parts += [_line(at(tick), top, at(tick), height - bottom, "axis" if abs(tick) < 1e-12 else "grid")]
        parts += [_text(at(tick), height - bottom + 18, _signed(tick, ticks), "middle")]
    for number, (name, test) in enumerate(tests.items()):
        y = top + row * (number + 0.5)
        title = f"{name}: {test.difference:+.4f} [{test.low:+.4f}, {test.high:+.4f}]"
        colour = f"var(--s{colours[name] % COLOURS})"
        parts.append(_text(left - 10, y + 4, _short(name, int((left - 12) / _CHARACTER)), "end"))
        parts.append(
            f'<g><title>{escape(title)}</title><path d="M{at(test.low):.1f} {y:.1f}H{at(test.high):.1f}" '
            f'stroke="{colour}" stroke-width="2.5" fill="none"/>'
            f'<circle cx="{at(test.difference):.1f}" cy="{y:.1f}" r="5" fill="{colour}"/></g>'
        )
    return _svg(width, height, label, parts)


def differences(values: Mapping[str, tuple[float, str]], label: str) -> str:
    """Return one bar for each query, the largest gain first; `values`: query id -> (difference, what its tip says)."""
    width, height, left, right, top, bottom = _WIDTH, 170, 60, 14, 10, 26
    ordered = sorted(values.items(), key=lambda entry: -entry[1][0])
    largest = max((abs(difference) for _, (difference, _) in ordered), default=0.0) or 1.0
    middle = top + (height - top - bottom) / 2
    scale = (height - top - bottom) / 2 / largest
    step = (width - left - right) / max(1, len(ordered))
    parts = []
    for edge in (largest, 0.0, -largest):
        parts += [_line(left, middle - edge * scale, width - right, middle - edge * scale, "grid" if edge else "axis")]
        parts += [_text(left - 8, middle - edge * scale + 4, f"{edge:+.2f}" if edge else "0", "end")]
    parts.append(_text(left + (width - left - right) / 2, height - 6, label, "middle"))
    if len(ordered) > _BARS:
        corners = " L".join(
            f"{left + (i + 0.5) * step:.1f} {middle - difference * scale:.1f}"
            for i, (_, (difference, _)) in enumerate(ordered)
        )
        parts.append(f'<path class="area" d="M{left} {middle:.1f} L{corners} L{width - right} {middle:.1f}Z"/>')
        return _svg(width, height, label, parts)
    for i, (qid, (difference, tip)) in enumerate(ordered):
        tall = abs(difference) * scale
        y = middle - tall if difference > 0 else middle
        parts.append(
            f"<g><title>{escape(f'{qid}: {tip}')}</title>"
            f'<rect class="hit" x="{left + i * step:.2f}" y="{top}" width="{step:.2f}" '
            f'height="{height - top - bottom}"/>'
            f'<rect class="{"up" if difference > 0 else "down"}" x="{left + (i + 0.1) * step:.2f}" y="{y:.2f}" '
            f'width="{0.8 * step:.2f}" height="{tall:.2f}"/></g>'
        )
    return _svg(width, height, label, parts)


def _svg(width: int, height: float, label: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height:g}" width="{width}" role="img" aria-label="{escape(label)}">'
        + "".join(parts)
        + "</svg>"
    )


def _text(x: float, y: float, text: str, anchor: str, turned: bool = False) -> str:
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{turn}>{escape(text)}</text>'


def _label(name: str, x: float, y: float, anchor: str, colour: int, longest: int = 40) -> str:
    return (
        f'<text class="name" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" style="fill:var(--s{colour % COLOURS})">'
        f"{escape(_short(name, longest))}</text>"
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<path class="{kind}" d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}"/>'


def _stroke(path: str, colour: int, width: float, dash: str, name: str, value: float) -> str:
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<path d="{path}" fill="none" stroke="var(--s{colour % COLOURS})" stroke-width="{width}"{dashes}>'
        f"<title>{escape(f'{name}: {value:.4f}')}</title></path>"
    )


def _placed(
    point: Point, x: float, y: float, taken: list[tuple[float, float, float, float]], edges: tuple[float, float]
) -> str:
    """The name of a point, right, left, above or below it, where it overlaps least with other parts."""
    length = _BOLD * len(_short(point.name, 40))
    choices: list[tuple[float, int, tuple[float, float, float, float], str, int, int]] = []
    for anchor, dx, dy in (("start", 11, 4), ("end", -11, 4), ("middle", 0, -12), ("middle", 0, 20)):
        begin = x + dx - {"start": 0.0, "middle": length / 2, "end": length}[anchor]
        box = (begin, y + dy - 11, begin + length, y + dy + 3)
        covered = sum(_overlap(box, other) for other in taken)
        outside = max(0.0, edges[0] - box[0]) + max(0.0, box[2] - edges[1])
        choices.append((covered + 14 * outside, len(choices), box, anchor, dx, dy))
    _, _, box, anchor, dx, dy = min(choices)
    taken.append(box)
    return _label(point.name, x + dx, y + dy, anchor, point.colour)


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _apart(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending places, moved as little as needed to keep `gap` between them and to stay below `high`."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + gap) if moved else max(place, low))
    for i in range(len(moved) - 1, -1, -1):
        moved[i] = min(moved[i], high if i == len(moved) - 1 else moved[i + 1] - gap)
    return moved


def _widened(values: Sequence[float]) -> tuple[float, float]:
    """The range of the values with a margin, which stays within 0 to 1 where the values do."""
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 0.5
    below, above = low - margin, high + margin
    return max(0.0, below) if low >= 0 else below, min(1.0, above) if high <= 1 else above


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, about `count` of them."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * i for i in range(first, last + 1)]


def _log_range(values: Sequence[float], whole: bool = True) -> tuple[float, float]:
    """The range of the values' logarithms, with a margin if `whole`; never empty."""
    low, high = (math.log10(min(values)), math.log10(max(values))) if values else (0.0, 1.0)
    if whole:
        margin = max(0.15, 0.1 * (high - low))
        return low - margin, high + margin
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _log_ticks(low: float, high: float) -> list[float]:
    factors = (1, 2, 5) if high - low < 3 else (1,)
    ticks = [factor * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for factor in factors]
    return [tick for tick in ticks if low <= math.log10(tick) <= high]


def _digits(ticks: Sequence[float]) -> int:
    step = ticks[1] - ticks[0]
    return next(digits for digits in range(1, 8) if abs(round(step, digits) - step) < 1e-3 * step)


def _number(tick: float, ticks: Sequence[float]) -> str:
    return f"{tick:.{_digits(ticks)}f}"


def _signed(tick: float, ticks: Sequence[float]) -> str:
    return "0" if abs(tick) < 1e-12 else f"{tick:+.{_digits(ticks)}f}"


def _short(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: max(1, longest - 1)] + "…"
