"""The picture of a comparison: `python -m bench.chart bench/results/cpu-minilm.json docs/images/cpu-minilm.svg`.

Horizontal bars of median milliseconds per request, ours in colour; a plain SVG without fonts or scripts of its own.
"""

from __future__ import annotations

import json
import sys
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

WIDTH, BAR, GAP, LABEL = 760, 18, 8, 210
OURS, THEIRS, INK = "#d9480f", "#adb5bd", "#495057"


def chart(result: dict[str, Any]) -> str:
    """Return the SVG of one result of `bench.run cross-encoder --json`; engines that failed are left out."""
    timed = [engine for engine in result["engines"] if engine["state"] == "ok" and engine["seconds"]]
    bars = sorted((1e3 * median(engine["seconds"]), engine["name"], engine["ours"]) for engine in timed)
    if not bars:
        raise ValueError("the result holds no timed engine")
    longest = bars[-1][0]
    work, host = result["workload"], result["host"]
    title = f"1 query x {work['documents']} passages, {work['tokens']} tokens, {host['threads']} threads: milliseconds"
    height = 40 + len(bars) * (BAR + GAP)
    rows = []
    for i, (ms, name, ours) in enumerate(bars):
        y = 34 + i * (BAR + GAP)
        length = max(2.0, ms / longest * (WIDTH - LABEL - 70))
        rows.append(
            f'<text x="{LABEL - 8}" y="{y + 13}" text-anchor="end" fill="{INK}">{escape(name)}</text>'
            f'<rect x="{LABEL}" y="{y}" width="{length:.1f}" height="{BAR}" rx="2" fill="{OURS if ours else THEIRS}"/>'
            f'<text x="{LABEL + length + 6:.1f}" y="{y + 13}" fill="{INK}">{ms:.0f}</text>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="sans-serif" font-size="13" role="img" aria-label="{escape(title)}">'
        f'<rect width="100%" height="100%" fill="white"/><text x="8" y="20" fill="{INK}">{escape(title)}</text>'
        + "".join(rows)
        + "</svg>\n"
    )


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m bench.chart RESULT.json PICTURE.svg")
    Path(sys.argv[2]).write_text(chart(json.loads(Path(sys.argv[1]).read_text())))
