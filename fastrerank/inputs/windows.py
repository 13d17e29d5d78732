"""Long texts tokenised window by window, so that memory follows the tokens that count and not the characters.

A window is joined to the next one at a place between two tokens, where the next window begins. One window sees the text
before that place, the other the text far behind it. The join holds if both give the same tokens over thousands of
characters. docs/explanation/numerics.md says for each kind of tokenizer why the ids then equal those of the whole text.
"""

from __future__ import annotations

import json
import re
import threading
import unicodedata
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from fastrerank.inputs.backend import encodable, encode_one

if TYPE_CHECKING:
    import tokenizers

__all__ = ["CHARS_PER_TOKEN", "Windows", "most_whole"]

CHARS_PER_TOKEN = 8
# Characters: of a window (a multiple of every small number, so that repetitions fill it); of the overlap on which two
# windows must agree; of the window's end, where its cut may change tokens.
_WINDOW, _OVERLAP, _MARGIN = 15120, 1 << 11, 1 << 8
# A token or a gap that is longer than a window is represented by this many of its first characters.
_KEPT = 1 << 11
_TRIES = 12
_SPARE = 64
# Zero width joiners and halfwidth voice marks: they join to the character before them.
_JOINING = "\u200c\u200d\uff9e\uff9f"
_WHOLE = 1 << 16
# White space as `tokenizers` defines it. Python's `\s` has four separators more.
_GAP = re.compile(r"[^\S\x1c-\x1f]{64,}")


def most_whole(room: int | None) -> int:
    """Up to how many characters a text is tokenised whole if its first `room` tokens are wanted."""
    return _WHOLE if room is None else min(_WHOLE, 2 * CHARS_PER_TOKEN * room + 4 * _OVERLAP)


class _Window(NamedTuple):
    """Tokens of a window and where they start and end; `origin` + place is the place in the text, behind `kept`.

    The first `skipped` tokens are left out: they are parts of tokens of the window before.
    """

    origin: int
    size: int
    kept: str
    source: int  # the place in the text of `kept`
    ids: list[int]
    starts: list[int]
    ends: list[int]
    skipped: int = 0

    def places(self, count: int) -> tuple[list[int], list[int]]:
        """Where the first `count` tokens start and end in the text."""
        if not self.kept:
            return [self.origin + one for one in self.starts[:count]], [self.origin + one for one in self.ends[:count]]
        some = [
            [(self.source if one < len(self.kept) else self.origin) + one for one in part[:count]]
            for part in (self.starts, self.ends)
        ]
        return some[0], some[1]


class Piece(NamedTuple):
    """Tokens that follow one another in a stripped text, their window, and where the next piece begins in it."""

    ids: list[int]
    window: _Window
    end: int


class _Stripped(NamedTuple):
    """A text without its long gaps, and what maps its places to those of the whole text.

    Attributes:
        text: the text without the gaps.
        places: for each gap, the place in `text` where it was.
        lengths: for each gap, the characters that it and the gaps before it had.
    """

    text: str
    places: list[int]
    lengths: list[int]

    def start(self, place: int) -> int:
        """Return where a token that starts at `place` in `text` starts in the whole text."""
        before = bisect_right(self.places, place)
        return place + (self.lengths[before - 1] if before else 0)

    def end(self, place: int) -> int:
        """Return where a token that ends at `place` in `text` ends in the whole text."""
        before = bisect_left(self.places, place)
        return place + (self.lengths[before - 1] if before else 0)


class Windows:
    """Ids of long texts by a tokenizer, equal to those of the whole text, in memory that does not grow with it.

    Args:
        tokenizer: the `tokenizers.Tokenizer`, without truncation and padding.

    One object serves any number of threads. The tokenizers that it needs are made when the first long text comes.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._given = tokenizer
        self._made: _Tokenizers | None = None
        self._lock = threading.Lock()

    def ids(self, text: str, room: int | None = None, *, left: bool = False, first: int = 0) -> array[int]:
        """Ids of `text` without special tokens: all of them, or at least `room` + 1 if it has so many.

        Args:
            text: the text.
            room: how many tokens count; None for all.
            left: the ids are the text's last ones, in place of its first ones.
            first: with `left`, this many of the text's first ids stand before its last ones.
        """
        found = array("i")
        for piece in self._stream(self._tokenizers().stripped(encodable(text)).text, None if left else room):
            found.extend(piece.ids)
            if room is not None:
                if not left and len(found) > room:
                    break
                if left and len(found) > first + 4 * (room + _WINDOW):
                    del found[first : len(found) - room - 1]
        return found

    def end(self, text: str, room: int) -> int | None:
        """The number of characters that hold the first `room` + 1 tokens and perhaps some more; None without so many.

        Tokens of that beginning, tokenised with `_OVERLAP` characters more, are those of the whole text.
        """
        count = 0
        stripped = self._tokenizers().stripped(encodable(text))
        for piece in self._stream(stripped.text, room):
            count += len(piece.ids)
            if count > room:
                return stripped.end(piece.end)
        return None

    def bounded(self, text: str, room: int | None, tail: int = _OVERLAP) -> str:
        """`text`, or where it is long its beginning and its end, whose first `room` + 1 tokens are those of the whole.

        The last `tail` characters stay, so that tokens of what follows the text are also those behind the whole.
        """
        if room is None or len(text) <= most_whole(room):
            return text
        end = self.end(text, room + _SPARE)
        if end is None or end + _OVERLAP + tail >= len(text):
            return text
        return text[: end + _OVERLAP] + text[len(text) - tail :]

    def spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of `text` and where each token starts and ends in it."""
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        stripped = self._tokenizers().stripped(encodable(text))
        for piece in self._stream(stripped.text):
            ids += piece.ids
            starts, ends = piece.window.places(len(piece.ids))
            spans += zip(map(stripped.start, starts), map(stripped.end, ends), strict=True)
        return ids, spans

    def _stream(self, text: str, room: int | None = None) -> Iterator[Piece]:
        """The tokens of a stripped text in order; `room` is how many of them the caller is likely to take."""
        made = self._tokenizers()
        taken = 0

        def size() -> int:  # size of the next window: little is tokenised behind the tokens that are taken
            return _OVERLAP + (
                _WINDOW if room is None else min(_WINDOW, CHARS_PER_TOKEN * max(0, room - taken) + _OVERLAP)
            )

        window = made.window(text, 0, size(), inside=False)
        inside = False
        while window.origin + window.size < len(text):
            begin = _long_token(window)
            if begin is not None:
                # A token, or a gap without tokens, goes on to the window's end. Nothing but its two ends tells what it
                # is, so its first characters stand for what the window leaves behind.
                source = window.source if window.kept else window.origin
                place = window.origin + window.size - _OVERLAP
                place = _behind_repeats(text, place) if window.kept else place
                kept = _beginning(text, source, source + begin + _KEPT, place)
                window = made.window(text, place, _WINDOW + _OVERLAP, inside=inside, kept=kept, source=source)
                continue
            last = _last_boundary(window)
            if last == 0 or window.ends[last - 1] < len(window.kept):  # a token ends too near to the window's end
                place, long = window.origin + len(window.kept), window.size - len(window.kept) + _WINDOW
                window = made.window(text, place, long, inside=inside, kept=window.kept, source=window.source)
                continue
            count, following = _joined(made, text, window, size())
            yield Piece(window.ids[:count], window, following.origin)
            taken += count
            # Windows of the same characters have the same tokens, and the same join behind them.
            shift, long = following.origin - window.origin, window.size
            content = text[window.origin : window.origin + long] if inside and not window.kept else ""
            alike = following.size == long and following.skipped == window.skipped
            while content and alike and following.origin + shift + long < len(text):
                begin = following.origin
                if text[begin : begin + long] != content or text[begin + shift : begin + shift + long] != content:
                    break
                yield Piece(window.ids[:count], following, begin + shift)
                taken += count
                following = following._replace(origin=begin + shift)
            window, inside = following, True
        yield Piece(window.ids, window, len(text))

    def _tokenizers(self) -> _Tokenizers:
        with self._lock:
            if self._made is None:
                self._made = _Tokenizers(self._given)
            return self._made


class _Tokenizers:
    """The tokenizer for the beginning of a text, and the one for windows inside it; both leave spans untrimmed."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        data = json.loads(tokenizer.to_str())
        self.first = self.inside = tokenizer
        if "trim_offsets" in json.dumps(data["post_processor"]):
            data["post_processor"] = None
            self.first = self.inside = type(tokenizer).from_str(json.dumps(data))
        added = sorted((one for one in data["added_tokens"] if one["content"]), key=lambda one: -len(one["content"]))
        contents = [_pattern(one) for one in added]
        # The normalizer sees a text in the pieces between these tokens.
        self._before = re.compile("|".join(_pattern(one) for one in added if not one["normalized"]) or "(?!)")
        self._strips = '"strip_right": true' in json.dumps(data["normalizer"])
        self._added = re.compile("(?!)")
        if _without_start(data):
            self.inside = type(tokenizer).from_str(json.dumps(data))
            # What happens at the beginning of a text also happens behind an added token, and at a word's beginning
            # where words are split first.
            spaces = r"\s*" if any(one["lstrip"] for one in added) else ""
            pattern = [f"{spaces}(?:{'|'.join(contents)})"] if contents else []
            if '"WhitespaceSplit"' in json.dumps(data["pre_tokenizer"]):
                pattern.append(_space_makers())
            self._added = re.compile("|".join(pattern) or "(?!)")

    def stripped(self, text: str) -> _Stripped:
        """`text` without the long gaps that the normalizer strips off its end, or off the piece before an added token.

        What is stripped would depend on text any distance behind it.
        """
        kept: list[str] = []
        places: list[int] = []
        lengths: list[int] = []
        done = removed = 0
        for gap in _GAP.finditer(text) if self._strips else ():
            if gap.end() == len(text) or self._before.match(text, gap.end()):
                start = gap.start() + 1  # one blank stays: an added token may depend on the character before it
                kept.append(text[done:start])
                places.append(start - removed)
                done, removed = gap.end(), removed + gap.end() - start
                lengths.append(removed)
        return _Stripped("".join([*kept, text[done:]]) if kept else text, places, lengths)

    def window(self, text: str, place: int, size: int, *, inside: bool, kept: str = "", source: int = 0) -> _Window:
        """Tokens of `size` characters of the text from `place` on, behind `kept`."""
        piece = kept + text[place : place + size]
        if place + size < len(text):
            piece += "a"  # a normalizer that strips the end of a text finds nothing to strip
        added = self._added.search(piece) if inside else None
        parts = [(0, len(piece), len(piece), self.inside if inside else self.first)]
        if added is not None:  # both parts contain it, so that no normalizer takes the first part's end for a text's
            start = added.start()
            parts = [(0, start, added.end(), self.inside), (start, len(piece), len(piece), self.first)]
        window = _Window(place - len(kept), len(kept) + min(size, len(text) - place), kept, source, [], [], [])
        for begin, end, stop, tokenizer in parts:
            encoding = encode_one(tokenizer, piece[begin:stop])
            offsets = encoding.offsets
            count = len(offsets)
            while stop > end and count and begin + offsets[count - 1][0] >= end:
                count -= 1
            window.ids.extend(encoding.ids[:count])
            window.starts.extend(begin + start for start, _ in offsets[:count])
            window.ends.extend(begin + end for _, end in offsets[:count])
        return window


def _pattern(token: dict[str, Any]) -> str:
    """Return a regular expression that matches an added token of tokenizer.json in a text."""
    content = re.escape(token["content"])
    return rf"(?<!\w){content}(?!\w)" if token["single_word"] else content


def _joined(made: _Tokenizers, text: str, window: _Window, size: int) -> tuple[int, _Window]:
    """How many tokens of the window stand before the next window, and that one."""
    best: tuple[int, int, _Window] | None = None
    last = _last_boundary(window)
    for count in dict.fromkeys([*range(last, max(0, last - _TRIES), -1), *range(last, 0, -max(1, last // _TRIES))]):
        end = window.ends[count - 1]
        if window.starts[count] < end or end < len(window.kept):
            continue  # both tokens hold a part of one character, or the place is not in the text
        place = window.origin + end
        for begin in dict.fromkeys((place, _behind_marks(text, place))):
            following = made.window(text, begin, size, inside=True)
            agreed, asked = _agreement(window, count, following)
            if agreed == asked:
                return count, following
            if best is None or agreed > best[0]:
                best = agreed, count, following
    found = _joined_in_characters(made, text, window, size)
    if found is not None:
        return found
    if best is None:
        place = window.origin + window.ends[last - 1]
        return last, made.window(text, place, size, inside=True)
    return best[1], best[2]


def _joined_in_characters(made: _Tokenizers, text: str, window: _Window, size: int) -> tuple[int, _Window] | None:
    """`_joined` for tokens that end within characters.

    The next window begins at such a character. Its first tokens differ; it is joined at the first token that both
    windows have, and the tokens before that one are left out.
    """
    last = _last_boundary(window)
    for first in range(last, max(0, last - _TRIES), -1):
        place = window.origin + window.starts[first]
        within = window.starts[first] < window.ends[first - 1]
        if not within or place <= window.origin or window.starts[first] < len(window.kept):
            continue
        following = made.window(text, place, size, inside=True)
        shift = place - window.origin
        for skipped in range(1, min(_TRIES, len(following.ids))):
            token = following.ids[skipped], following.starts[skipped] + shift, following.ends[skipped] + shift
            for count in range(first, min(first + 2 * _TRIES, len(window.ids))):
                if (window.ids[count], window.starts[count], window.ends[count]) != token:
                    continue
                rest = following._replace(
                    ids=following.ids[skipped:],
                    starts=following.starts[skipped:],
                    ends=following.ends[skipped:],
                    skipped=skipped,
                )
                agreed, asked = _agreement(window, count, rest)
                if agreed == asked:
                    return count, rest
    return None


def _beginning(text: str, begin: int, end: int, place: int) -> str:
    """The text from `begin` to near `end`, cut where it ends as the text before `place` does: no new pair is formed."""
    for size in (16, 4, 2, 1):
        found = text.rfind(text[place - size : place], end - _KEPT // 2, end)
        if found >= 0:
            return text[begin : found + size]
    return text[begin:end]


def _behind_repeats(text: str, place: int) -> int:
    """`place`, or the end of the windows behind it that equal the window before it."""
    same = text[place - _WINDOW : place]
    while len(same) == _WINDOW and text[place : place + _WINDOW] == same:
        place += _WINDOW
    return place


@cache
def _space_makers() -> str:
    """A pattern of the characters that are white space, or that a normalizer may turn into some."""
    found = [char for char in map(chr, range(1 << 16)) if any(map(str.isspace, unicodedata.normalize("NFKC", char)))]
    return f"[{''.join(map(re.escape, found))}]"


def _behind_marks(text: str, place: int) -> int:
    """`place`, or the next one that no combining character follows: spans do not always hold them."""
    for char in text[place : place + _MARGIN]:
        if not (char in _JOINING or unicodedata.category(char)[0] == "M" or "\u1160" <= char <= "\u11ff"):
            break
        place += 1
    return place


def _last_boundary(window: _Window) -> int:
    """How many tokens end before the stretch that two windows share."""
    count = bisect_right(window.ends, window.size - _OVERLAP)
    return max(0, min(count, len(window.ids) - 1))


def _long_token(window: _Window) -> int | None:
    """Where the token, or the gap, begins that reaches from where two windows begin to share to the window's end."""
    before = bisect_right(window.ends, window.size - _OVERLAP)
    if before < bisect_right(window.ends, window.size - _MARGIN):
        return None
    begin = window.ends[before - 1] if before else 0
    return None if window.kept and begin >= len(window.kept) else begin


def _agreement(window: _Window, count: int, following: _Window) -> tuple[int, int]:
    """How many tokens behind the first `count`, up to the window's end, the next window has too, and of how many."""
    shift = following.origin - window.origin
    asked = max(1, bisect_right(window.ends, window.size - _MARGIN) - count)
    for i in range(asked):
        if i >= len(following.ids) or window.ids[count + i] != following.ids[i]:
            return i, asked
        if window.ends[count + i] != following.ends[i] + shift:
            return i, asked
    return asked, asked


def _without_start(data: dict[str, Any]) -> bool:
    """Switch off what a tokenizer does only at the beginning of a text; return whether it did anything there."""
    changed = False

    def visit(node: Any) -> Any:
        nonlocal changed
        if isinstance(node, list):
            return [visit(item) for item in node if not (isinstance(item, dict) and item.get("type") == "Prepend")]
        if not isinstance(node, dict):
            return node
        if node.get("type") == "ByteLevel" and node.get("add_prefix_space"):
            changed = True
            return node | {"add_prefix_space": False}
        if node.get("type") == "Strip" and node.get("strip_left"):
            changed = True
            return node | {"strip_left": False}
        if node.get("type") == "Metaspace" and node.get("prepend_scheme") != "never":
            changed = True
            return node | {"prepend_scheme": "never"}
        return {key: visit(value) for key, value in node.items()}

    for part in ("normalizer", "pre_tokenizer"):
        node = data[part]
        prepends = '"Prepend"' in json.dumps(node)
        changed = changed or prepends
        data[part] = None if isinstance(node, dict) and node.get("type") == "Prepend" else visit(node)
    return changed
