"""Checks of tokenizer.json: parts that would crash the process or never finish are refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from fastrerank.inputs.backend import is_panic

if TYPE_CHECKING:
    import tokenizers

__all__ = ["check_parts", "check_strings", "load_fast", "loaded"]

# The Rust library frees a vocabulary's trie recursively: a piece of some 100,000 bytes overflows the stack.
_LONGEST = 8192
# By how much a normalizer may multiply a text's length, and how many characters it may put before one.
_MOST_GROWTH, _MOST_PREPENDED = 256, 64
_PROBES = ("", "a", "The owl, 7 mice.", "東京 é\u0301", "\n\t x\0")

T = TypeVar("T")


def check_strings(file: Path) -> None:
    """Raise ValueError if a string in tokenizer.json is too long for a token, a regular expression or a name."""
    data = np.fromfile(file, np.uint8)
    quotes = np.flatnonzero(data == ord('"'))
    quotes = quotes[(quotes > 0) & (data[quotes - 1] != ord("\\"))]
    for place in np.flatnonzero(np.diff(quotes) > _LONGEST).tolist():
        begin, end = int(quotes[place]), int(quotes[place + 1])
        before = data[max(0, begin - 48) : begin].tobytes()
        if b"precompiled_charsmap" not in before and data[begin + 1 : end].tobytes().strip():
            raise ValueError(
                f"{file}: not a usable tokenizer (a string of {end - begin:,} bytes, and {_LONGEST:,} are the most)"
            )


def check_parts(tokenizer: tokenizers.Tokenizer, file: Path) -> None:
    """Raise ValueError if a part of a loaded tokenizer is not safe to use, or fails on texts."""
    for name in ("normalizer", "pre_tokenizer"):
        part = getattr(tokenizer, name)
        if part is None:
            continue
        growth = 1.0
        for node in _nodes(_state(part)):
            pattern = node.get("pattern")
            shape = next(iter(pattern.values()), "") if isinstance(pattern, dict) else ""
            if isinstance(shape, str) and "\\g<" in shape and "Regex" in (pattern or {}):
                raise ValueError(f"{file}: not a usable tokenizer (its {name} calls a regular expression in itself)")
            if node.get("type") == "Replace":
                literal = isinstance(pattern, dict) and "String" in pattern
                growth *= max(1.0, len(str(node.get("content", ""))) / max(1, len(shape) if literal else 1))
            if node.get("type") == "Prepend" and len(str(node.get("prepend", ""))) > _MOST_PREPENDED:
                growth = float("inf")
        if growth > _MOST_GROWTH:
            raise ValueError(f"{file}: not a usable tokenizer (its {name} makes texts {growth:.0f} times as long)")
    loaded(lambda: [_probe(tokenizer, text) for text in _PROBES], file)


def loaded(call: Callable[[], T], file: Path) -> T:
    """`call()`, or ValueError naming the file where the Rust library fails or panics."""
    try:
        return call()
    except BaseException as error:
        # The library raises a plain Exception for every kind of damaged file.
        if is_panic(error) or type(error) is Exception:
            raise ValueError(f"{file}: not a readable tokenizer ({str(error)[:300]})") from None
        raise


def load_fast(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Equals transformers' `AutoTokenizer.from_pretrained`; ValueError naming the file that cannot be used."""
    from transformers import AutoTokenizer

    file = folder / "tokenizer.json"
    if file.is_file():
        check_strings(file)
    tokenizer = loaded(lambda: AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code), file)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        check_parts(backend, file)
    return tokenizer


def _state(part: Any) -> Any:
    try:
        return json.loads(part.__getstate__())
    except Exception:  # a part written in Python has no state
        return None


def _nodes(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
        node = list(node.values())
    for item in node if isinstance(node, list) else ():
        yield from _nodes(item)


def _probe(tokenizer: tokenizers.Tokenizer, text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False))
