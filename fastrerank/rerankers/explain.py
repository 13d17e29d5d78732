"""Tokens coloured by the attention that they get, on a terminal and as a self-contained HTML page."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

__all__ = ["print_tokens", "to_html"]

# Colours of masses above and below zero; they suit dark and light backgrounds.
_ABOVE, _BELOW = (46, 139, 87), (178, 74, 90)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.6 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
li {{ margin: 1rem 0; }}
p {{ white-space: pre-wrap; overflow-wrap: anywhere; margin: .2rem 0; }}
small {{ opacity: .7; }}
span {{ border-radius: 3px; }}
</style></head><body>
<h1>{title}</h1>
<p><small>The attention that each token gets from the query, less what it gets from "N/A": green above zero, red below.
Point at a token for its value.</small></p>
<ol>
{items}
</ol></body></html>
"""


def print_tokens(console: Console, hits: Sequence[Mapping[str, Any]]) -> None:
    """Print ranked documents. A token's background colour grows stronger with its mass.

    `hits` are what `AttentionReranker.rank(..., explain=True)` returns. A line begins with the document's rank, its
    score and its number in the input, from 0: the `corpus_id` of a hit. Without colours, a token's mass follows it.
    """
    largest = _largest(hits)
    wide = max((len(str(hit["corpus_id"])) for hit in hits), default=1)
    for place, hit in enumerate(hits, start=1):
        line = Text(f"{place:>3} {hit['score']:9.4f}  document {hit['corpus_id']:>{wide}}: ")
        for token, mass in hit["tokens"]:
            shown = _clean(token)
            if console.color_system is None:
                line.append(f"{shown}({mass:+.4f})")
            else:
                red, green, blue = _mixed(mass, largest)
                line.append(shown, style=f"white on rgb({red},{green},{blue})" if abs(mass) > 0.02 * largest else "")
        console.print(line, soft_wrap=console.color_system is None)


def to_html(query: str, hits: Sequence[Mapping[str, Any]]) -> str:
    """Return the same as a self-contained page, without scripts, fonts or pictures.

    Example:
        >>> "rgba" in to_html("who?", [{"corpus_id": 0, "score": 1.0, "tokens": [("owl", 1.0)]}])
        True
    """
    largest = _largest(hits)
    items = []
    for hit in hits:
        spans = []
        for token, mass in hit["tokens"]:
            if not token:
                continue
            color = ",".join(map(str, _ABOVE if mass > 0 else _BELOW))
            strength = min(1.0, abs(mass) / largest)
            text = html.escape(_CONTROL.sub("\ufffd", token))
            spans.append(f'<span title="{mass:.6f}" style="background:rgba({color},{strength:.3f})">{text}</span>')
        number = html.escape(str(hit["corpus_id"]))
        items.append(f"<li><small>document {number}, score {hit['score']:.4f}</small><p>{''.join(spans)}</p></li>")
    return _PAGE.format(title=html.escape(_CONTROL.sub("\ufffd", query)), items="\n".join(items))


def _largest(hits: Sequence[Mapping[str, Any]]) -> float:
    return max((abs(mass) for hit in hits for _, mass in hit["tokens"]), default=0.0) or 1.0


def _mixed(mass: float, largest: float) -> tuple[int, ...]:
    strength = min(1.0, abs(mass) / largest) ** 0.5
    return tuple(int(32 + (channel - 32) * strength) for channel in (_ABOVE if mass > 0 else _BELOW))


def _clean(token: str) -> str:
    return re.sub(r"\s+", " ", _CONTROL.sub("\ufffd", token))
