"""Text tokenised so that user text is never parsed as an added token, and the places where it can be cut."""

from __future__ import annotations

import json
import re
import secrets
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastrerank.inputs.backend import encodable, encode_batch, encode_one, guarded
from fastrerank.inputs.tokenizer import _blocks
from fastrerank.inputs.windows import Windows, most_whole

if TYPE_CHECKING:
    import tokenizers

__all__ = ["Cut", "Marker", "TextTokenizer", "Unit", "encodable", "strip_left", "strip_right"]

# White space as the Rust library's lstrip and rstrip of added tokens see it (str.strip also takes U+001C..U+001F).
_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_SPACE_LEFT, _SPACE_RIGHT = re.compile(f"^[{_SPACE}]+"), re.compile(f"[{_SPACE}]+$")
# Texts that are put beside a literal to see whether a cut in it depends on them. The first ones are neutral.
_LEFTS = ("a", "", "7", ".", " ", "\n", "'", '"', "東京", "x\n\n", "é (", "[")
_RIGHTS = ("a", "", "7", ".", "  b", "\n\n", "'s", '"', "東京", "\r\nc", "-", "]")
# Characters: how close to the ends of a literal cuts are looked for; how much of a long literal is looked at; how much
# of a literal is the context of a unit.
_REACH, _WINDOW, _CONTEXT = 24, 64, 6
# NFKC turns one character into up to 18 (U+FDFA), with eleven times as many bytes in UTF-8.
_LONGEST_FORM = 18
# What white space looks like inside a vocabulary: as it is, or in the byte-level and sentencepiece alphabets.
_FORMS = {" ": " Ġ▁", "\n": "\nĊ", "\t": "\tĉ", "\r": "\rč"}


def surely_within(text: str, most: int) -> bool:
    """Whether the size of `text` alone tells that it has at most `most` tokens.

    No token is shorter than a byte of the normalized text; a dummy prefix may be one more. A normalizer leaves ASCII as
    long as it is, and makes at most 18 characters, and fewer than 18 bytes for each byte, of another character.
    """
    return len(text) < most if text.isascii() else _LONGEST_FORM * len(text.encode()) < most


def strip_left(text: str) -> str:
    """`text` without the white space that an added token with rstrip=True swallows."""
    return _SPACE_LEFT.sub("", text)


def strip_right(text: str) -> str:
    """`text` without the white space that an added token with lstrip=True swallows."""
    return _SPACE_RIGHT.sub("", text)


@dataclass(frozen=True)
class Marker:
    """An added token that only a template may write: its id, and whether it swallows white space around it."""

    id: int
    content: str
    lstrip: bool
    rstrip: bool


@dataclass(frozen=True)
class Cut:
    """The first and the last place in a literal where tokens left and right do not depend on each other."""

    first: int
    last: int


@dataclass(frozen=True)
class Unit:
    """A document between two cuts, with as much of the fixed text as lies between them and as its context.

    `key` names everything that the ids depend on beside the document. Ids of `left_ids` and `right_ids` are context and
    are dropped; of what remains, the first `head` and the last `tail` ids belong to the fixed text.
    """

    key: tuple[str | None, str | None, bool]
    left: str
    right: str
    left_ids: tuple[int, ...]
    right_ids: tuple[int, ...]
    head: int
    tail: int


class TextTokenizer:
    """A checkpoint's tokenizer without its markers: every text is plain text, whatever it holds.

    Markers are the added tokens that are flagged special, and those written in `literals`, the template's own text.
    They are renamed, in the added tokens and in the model's vocabulary, to strings that no text holds, so that every
    id stays what it is. Other added tokens (Gemma's runs of newlines) stay: they are part of how text is tokenised.

    Nothing is set on the underlying tokenizer after construction, so one object serves any number of threads.
    """

    def __init__(self, backend: tokenizers.Tokenizer, literals: Iterable[str]) -> None:
        from tokenizers import AddedToken, Tokenizer

        data: dict[str, Any] = json.loads(backend.to_str())
        added = [token for token in data["added_tokens"] if token["content"]]
        self._added = _alternatives(token["content"] for token in added)
        written = {match for literal in literals for match in self._added.findall(literal)}
        self.markers = {
            token["content"]: Marker(token["id"], token["content"], token["lstrip"], token["rstrip"])
            for token in added
            if token["special"] or (token["content"] in written and _looks_like_marker(token["content"]))
        }
        nonce = f"\U0010fffd{secrets.token_hex(8)}"
        names = {content: f"{nonce}{i}" for i, content in enumerate(self.markers)}
        for token in added:
            token["content"] = names.get(token["content"], token["content"])
        data.update(truncation=None, padding=None, post_processor=None)
        _rename(data["model"], names)
        self.tokenizer = guarded(
            lambda: Tokenizer.from_str(json.dumps(data)), lambda: "the tokenizer is of no use without its markers"
        )
        for marker in self.markers.values():
            if self.tokenizer.token_to_id(names[marker.content]) != marker.id:
                raise ValueError(
                    f"the tokenizer's added token {marker.content!r} does not have its stated id {marker.id}"
                )
        # Stands before a run that is not at the start of the prompt: a tokenizer that treats the start of the text
        # differently (Metaspace with prepend_scheme="first") then sees what it sees in the whole prompt.
        self._sentinel = f"{nonce}s"
        self.tokenizer.add_special_tokens([AddedToken(self._sentinel, normalized=False)])
        kept = [token["content"] for token in added]
        self._windows = Windows(self.tokenizer)
        self._vocabulary = "\0".join([*self.tokenizer.get_vocab(with_added_tokens=False), *kept])
        self._cuts: dict[str, Cut | None] = {}
        self._units: dict[tuple[str | None, str | None, bool], Unit | None] = {}

    def split(self, literal: str) -> list[str | Marker]:
        """A literal at its markers, leftmost longest, as the tokenizer itself finds added tokens."""
        parts: list[str | Marker] = []
        start = 0
        for match in self._added.finditer(literal):
            marker = self.markers.get(match.group())
            if marker is not None:
                parts += [literal[start : match.start()], marker]
                start = match.end()
        parts.append(literal[start:])
        return [part for part in parts if part != ""]

    def encode(self, texts: Sequence[str], anchored: bool, ends: tuple[int, int] | None = None) -> Iterator[list[int]]:
        """Token ids of each text; `anchored`: it stands behind other text of its prompt.

        `ends`: a long text gives at least this many of its first and of its last ids, and may leave out some between.
        """
        prefix = self._sentinel if anchored else ""
        whole = most_whole(None)
        first, last = (int(anchored) + ends[0], ends[1]) if ends else (0, None)
        for block in _blocks(list(texts)):
            encodings = iter(encode_batch(self.tokenizer, [prefix + text for text in block if len(text) <= whole]))
            for text in block:
                if len(text) <= whole:
                    ids = next(encodings).ids
                else:
                    ids = self._windows.ids(prefix + text, last, left=last is not None, first=first).tolist()
                yield ids[1:] if anchored else ids

    def bounded(self, text: str, room: int | None) -> str:
        """Return `text`, or a shorter one with the same first `room` + 1 tokens and the same end.

        See docs/explanation/numerics.md.
        """
        return self._windows.bounded(text, room)

    def encode_spans(self, text: str, anchored: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of one text, and of each token where it starts and ends in the text, in characters."""
        prefix = self._sentinel if anchored else ""
        if len(text) > most_whole(None):
            ids, offsets = self._windows.spans(prefix + text)
        else:
            encoding = encode_one(self.tokenizer, prefix + text)
            ids, offsets = encoding.ids, encoding.offsets
        shift = len(prefix)
        spans = [(max(0, start - shift), max(0, end - shift)) for start, end in offsets]
        return (ids[1:], spans[1:]) if anchored else (ids, spans)

    def cut(self, literal: str) -> Cut | None:
        """Where `literal` can be cut, whatever stands on its two sides; None where no place is known.

        A place between characters x and y is a cut if no token of the vocabulary holds x followed by y (so no merge and
        no piece can cross it), and if the tokens on each side stay equal while the text on the other side is varied
        (so the pre-tokenizer starts afresh there).
        """
        if literal not in self._cuts:
            self._cuts[literal] = self._find_cut(literal)
        return self._cuts[literal]

    def unit(self, before: str | None, after: str | None, anchored: bool) -> Unit | None:
        """The unit of documents between the literals `before` and `after`; None stands for an end of the run.

        None is returned where a literal has no cut.
        """
        left_cut, right_cut = self.cut(before) if before else None, self.cut(after) if after else None
        if (before is not None and left_cut is None) or (after is not None and right_cut is None):
            return None
        glue_left = before[left_cut.last :] if before and left_cut else None
        glue_right = after[: right_cut.first] if after and right_cut else None
        key = (glue_left, glue_right, anchored or before is not None)
        if key not in self._units:
            left = f"a{before[max(0, left_cut.last - _CONTEXT) :]}" if before and left_cut else ""
            right = f"{after[: right_cut.first + _CONTEXT]}a" if after and right_cut else ""
            self._units[key] = self._make_unit(key, left, right)
        return self._units[key]

    def encode_unit(self, unit: Unit, documents: Sequence[str], last: int | None = None) -> Iterator[list[int] | None]:
        """Ids of each document with the fixed text of its unit; None where tokens merge over a boundary.

        Args:
            unit: what stands around the documents.
            documents: the texts.
            last: how many of a document's last tokens count: the ids of a long one may lack some before those.
        """
        texts = [f"{unit.left}{document}{unit.right}" for document in documents]
        left, right = list(unit.left_ids), list(unit.right_ids)
        ends = None if last is None else (len(left) + unit.head, last + unit.tail + len(right))
        for ids in self.encode(texts, unit.key[2], ends):
            end = len(ids) - len(right)
            whole = len(left) <= end and ids[: len(left)] == left and ids[end:] == right
            yield ids[len(left) : end] if whole else None

    def unit_spans(
        self, unit: Unit, documents: Sequence[str]
    ) -> Iterator[tuple[list[int], list[tuple[int, int]]] | None]:
        """As `encode_unit`, with each token's start and end in characters, counted from the document's first."""
        prefix = self._sentinel if unit.key[2] else ""
        skip, shift = int(unit.key[2]), len(prefix) + len(unit.left)
        left, right = list(unit.left_ids), list(unit.right_ids)
        whole = most_whole(None)
        for block in _blocks([f"{prefix}{unit.left}{document}{unit.right}" for document in documents]):
            short = encode_batch(self.tokenizer, [text for text in block if len(text) <= whole], spans=True)
            encodings = iter([(one.ids, one.offsets) for one in short])
            for text in block:
                ids, offsets = next(encodings) if len(text) <= whole else self._windows.spans(text)
                ids, offsets = ids[skip:], offsets[skip:]
                end = len(ids) - len(right)
                if len(left) <= end and ids[: len(left)] == left and ids[end:] == right:
                    yield ids[len(left) : end], [(a - shift, b - shift) for a, b in offsets[len(left) : end]]
                else:
                    yield None

    def encode_between(
        self, left: str, text: str, right: str, anchored: bool
    ) -> tuple[list[int], list[tuple[int, int]]] | None:
        """Ids of `text` between two contexts whose borders are cuts, and each token's start and end in `text`.

        None where a token crosses one of the borders.
        """
        ids, spans = self.encode_spans(f"{left}{text}{right}", anchored)
        size = len(left)
        start = _tokens_until(spans, size)
        end = _tokens_until(spans, size + len(text)) if right else len(ids)
        if start is None or end is None:
            return None
        return ids[start:end], [(a - size, b - size) for a, b in spans[start:end]]

    def _find_cut(self, literal: str) -> Cut | None:
        size = len(literal)
        if size > 2 * _WINDOW:  # only what is near to its ends matters
            head, tail = self.cut(literal[:_WINDOW]), self.cut(literal[-_WINDOW:])
            return None if head is None or tail is None else Cut(head.first, size - _WINDOW + tail.last)
        places = [c for c in range(1, size) if not self._may_join(literal[c - 1], literal[c])]
        places = [c for c in places if c <= _REACH or c >= size - _REACH]
        if not places:
            return None
        sides = {
            (left, right): (self.encode_spans(f"{left}{literal}{right}", True), len(left))
            for left in _LEFTS
            for right in _RIGHTS
        }

        def halves(left: str, right: str, place: int) -> tuple[list[int], list[int]] | None:
            (ids, spans), shift = sides[left, right]
            count = _tokens_until(spans, shift + place)
            return None if count is None else (ids[:count], ids[count:])

        def independent(place: int) -> bool:
            neutral = {right: halves(_LEFTS[0], right, place) for right in _RIGHTS}
            for left in _LEFTS:
                first = halves(left, _RIGHTS[0], place)
                for right in _RIGHTS:
                    here, other = halves(left, right, place), neutral[right]
                    if here is None or first is None or other is None or here != (first[0], other[1]):
                        return False
            return True

        first = next((place for place in places if independent(place)), None)
        if first is None:
            return None
        return Cut(first, next(place for place in reversed(places) if place == first or independent(place)))

    def _may_join(self, x: str, y: str) -> bool:
        if not (x.isascii() and y.isascii()):
            return True
        return any(first + second in self._vocabulary for first in self._forms(x) for second in self._forms(y))

    def _forms(self, char: str) -> Iterable[str]:
        """The forms of a character in the vocabulary; "" (which every token holds) if it has none of its own."""
        if self.tokenizer.normalizer is not None:
            normal = self.tokenizer.normalizer.normalize_str(f"0{char}0")
            char = normal[normal.find("0") + 1 : normal.rfind("0")] if normal.count("0") > 1 else ""
        return _FORMS.get(char, char) if len(char) == 1 else ("",)

    def _make_unit(self, key: tuple[str | None, str | None, bool], left: str, right: str) -> Unit | None:
        ids, spans = self.encode_spans(f"{left}a{right}", key[2])
        start = len(left) - len(key[0] or "")
        end = len(left) + 1 + len(key[1] or "")
        first, last = _tokens_until(spans, start), (_tokens_until(spans, end) if right else len(ids))
        if first is None or last is None:
            return None
        head = sum(spans[i][1] <= len(left) for i in range(first, last)) if left else 0
        tail = sum(spans[i][0] >= len(left) + 1 for i in range(first, last)) if right else 0
        return Unit(key, left, right, tuple(ids[:first]), tuple(ids[last:]), head, tail)


def _alternatives(contents: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(contents, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) if longest_first else r"(?!)")


def _looks_like_marker(content: str) -> bool:
    """Whether an added token is neither white space nor a plain word: those are ordinary text everywhere."""
    return not content.isspace() and not content.replace(" ", "").isalnum()


def _tokens_until(spans: Sequence[tuple[int, int]], place: int) -> int | None:
    """How many tokens end at `place` or before it; None if one crosses it."""
    count = bisect_right([end for _, end in spans], place)
    return None if count < len(spans) and spans[count][0] < place else count


def _rename(model: dict[str, Any], names: dict[str, str]) -> None:
    """Rename markers in a model's vocabulary, so that it cannot produce them from plain text either."""
    vocabulary = model.get("vocab", {})
    if isinstance(vocabulary, list):  # Unigram: [piece, score]
        for entry in vocabulary:
            entry[0] = names.get(entry[0], entry[0])
    else:
        if not names.keys().isdisjoint(vocabulary):
            model["vocab"] = {names.get(token, token): index for token, index in vocabulary.items()}
            if model.get("merges"):
                model["merges"] = [pair for pair in model["merges"] if _keeps(pair, names)]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]


def _keeps(pair: str | list[str], names: dict[str, str]) -> bool:
    first, second = pair.split(" ") if isinstance(pair, str) else pair
    return first not in names and second not in names and first + second not in names
