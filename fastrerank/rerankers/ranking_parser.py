"""Parsers of written rankings: any text gives every document a place, and tells whether it was well-formed."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

__all__ = ["after_thinking", "answer_of", "identified", "parse_label", "parse_permutation"]

_SEPARATOR = re.compile(r"[,;>](?:\s*and\b)?|\band\b")
_BRACKET = re.compile(r"([\[\]])")
# Look-behinds keep the search linear in a long run of digits.
_IDENTIFIERS = {"numeric": r"(?<![0-9])([0-9]+)", "alphabetic": r"\b([A-Z])"}
_BARE = {"numeric": re.compile(r"[0-9]+"), "alphabetic": re.compile(r"\b[A-Z]\b")}
# The identifier before a closing bracket.
_LAST = {kind: re.compile(rf"{pattern}[ \t]*\Z") for kind, pattern in _IDENTIFIERS.items()}
# One entry of a list that holds nothing else: an identifier, within brackets or quotes or not, ...
_ENTRY = {kind: re.compile(rf"[\s\[\"'*]*{pattern}[\s\]\"'*]*") for kind, pattern in _IDENTIFIERS.items()}
# ... or behind a word that all entries of the list have: "Document 3, Document 1".
_NAMED_ENTRY = {
    "numeric": re.compile(r"[\s\"'*]*([A-Za-z]+[ .:#]*)?([0-9]+)[\s\"'*]*"),
    "alphabetic": re.compile(r"[\s\"'*]*([A-Za-z]+[ .:#]+)?([A-Z])[\s\"'*]*"),
}
_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
# More digits name no document, and int() refuses thousands of them.
_MOST_DIGITS = 9


def parse_permutation(text: str, n: int, identifiers: str = "numeric") -> tuple[list[int], bool]:
    """Read "[3] > [1] > ..." as positions 0..n-1, best first, and whether every identifier stood there exactly once.

    The first mention of an identifier counts, duplicates and unknown identifiers are dropped, missing ones are
    appended in their order. A bracket may hold one identifier or a list of them ("[3, 1, 2]"). Brackets are not needed
    where the text has none, or is a list of identifiers and nothing else.

    Args:
        text: what the model wrote. n: documents in the prompt.
        identifiers: "numeric" ([1]..[n]) or "alphabetic" ([A]..[Z], n up to 26).

    Raises ValueError for other identifiers, and for more letters than there are.
    Source: RankGPT, Sun et al. 2023, arXiv 2304.09542; castorini/rank_llm.

    Example:
        >>> parse_permutation("[3] > [1] > [3] > [9]", 3)
        ([2, 0, 1], False)
        >>> parse_permutation("The order is [3, 1, 2].", 3)
        ([2, 0, 1], True)
        >>> parse_permutation("B] > [A]", 2, "alphabetic")
        ([1, 0], True)
    """
    named = identified(text, n, identifiers)
    order = list(dict.fromkeys(i for i in named if 0 <= i < n))
    complete = len(order) == n == len(named)
    present = set(order)
    return order + [i for i in range(n) if i not in present], complete


def parse_label(text: str, n: int, identifiers: str = "numeric") -> tuple[int, bool]:
    """Read "<answer>[3]</answer>" as the position of the best document; (0, False) where no document is named.

    Without <answer> tags the text behind the thoughts counts; well-formed is an answer with one identifier.
    Source: Rank-R1, Zhuang et al. 2025, arXiv 2503.06034: a comparison that cannot be read keeps the heap's root.

    Example:
        >>> parse_label("<think>[1] or [2]?</think> <answer>[2]</answer>", 3)
        (1, True)
        >>> parse_label("all of them", 3)
        (0, False)
    """
    answer, tagged = answer_of(text)
    named = identified(answer, n, identifiers)
    known = [i for i in named if 0 <= i < n]
    return (known[0], tagged and len(named) == 1) if known else (0, False)


def after_thinking(text: str) -> str:
    """Return what follows the last </think>, or the text without one (DeAR, Qwen3).

    Example:
        >>> after_thinking("<think>[1]?</think>[2] > [1]")
        '[2] > [1]'
    """
    return text.rpartition("</think>")[2]


def answer_of(text: str) -> tuple[str, bool]:
    """Return the last <answer>...</answer> behind the thoughts, or all that is behind them, and whether it had tags.

    An answer whose closing tag was cut off or used as the stop string counts as tagged.

    Example:
        >>> answer_of("<think><answer>[1]</answer></think><answer>[2] > [1]</answer>")
        ('[2] > [1]', True)
    """
    text = after_thinking(text)
    begin: int | None = None
    closed: str | None = None
    for tag in _TAG.finditer(text):
        if not tag.group(1):
            begin = tag.end()
        elif begin is not None:
            closed, begin = text[begin : tag.start()], None
    if closed is None and begin is not None:
        closed = text[begin:]
    return (text, False) if closed is None else (closed, True)


def identified(text: str, n: int, identifiers: str) -> list[int]:
    """Return the numbers of the documents that a text names, in its order, from 0; -1 for a number beyond all bounds.

    Example:
        >>> identified("[2] > [1]", 2, "numeric")
        [1, 0]
    """
    if identifiers not in _BARE:
        raise ValueError(f"identifiers must be 'numeric' or 'alphabetic', got {identifiers!r}")
    if identifiers == "alphabetic" and n > 26:
        raise ValueError(f"26 letters cannot name {n} documents")
    found: Sequence[str] = _whole_list(text, identifiers) or _bracketed(text, identifiers)
    found = found or _BARE[identifiers].findall(text)
    if identifiers == "alphabetic":
        return [string.ascii_uppercase.index(letter) for letter in found]
    return [int(digits) - 1 if len(digits) <= _MOST_DIGITS else -1 for digits in found]


def _whole_list(text: str, identifiers: str) -> list[str]:
    """The identifiers of a text that is a list of them and nothing else, brackets or none; else []."""
    entries = [_ENTRY[identifiers].fullmatch(part) for part in _SEPARATOR.split(text)]
    found = [entry.group(1) for entry in entries if entry is not None]
    return found if len(found) == len(entries) else []


def _bracketed(text: str, identifiers: str) -> list[str]:
    """The identifiers within brackets: one before each closing bracket, or all of a list.

    The opening bracket may stand in the prompt: a prompt that ends in "[" is answered with "B] > [A]".
    """
    found: list[str] = []
    pieces = _BRACKET.split(text)  # texts and brackets in turn
    for i in range(1, len(pieces), 2):
        if pieces[i] == "]":
            found += _listed(pieces[i - 1], identifiers)
    return found


def _listed(content: str, identifiers: str) -> list[str]:
    parts = _SEPARATOR.split(content) if _SEPARATOR.search(content) else content.split()
    entries = [_NAMED_ENTRY[identifiers].fullmatch(part) for part in parts]
    if len(parts) > 1 and all(entry is not None and entry.group(1) == entries[0].group(1) for entry in entries):  # type: ignore[union-attr]
        return [entry.group(2) for entry in entries if entry is not None]
    last = _LAST[identifiers].search(content)
    return [] if last is None else [last.group(1)]
