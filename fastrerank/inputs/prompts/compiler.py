"""The compiler of prompts: literals and texts become token ids and, where asked for, the characters of each token.

A prompt is a sequence of literals and slots. Markers in the literals split it into runs; a run is tokenised in steps:
each document in its unit, which the cache keeps, and what stands between two documents. Where a tokenizer gives no
place to cut, the run is tokenised as one text. The ids equal those of the whole prompt either way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from fastrerank.inputs.prompts.fitting import Part, Places, int32
from fastrerank.inputs.prompts.template_layout import Piece, Slot, Values, fill
from fastrerank.inputs.prompts.token_cache import TokenCache, Tokens
from fastrerank.inputs.text_pieces import Marker, TextTokenizer, Unit, strip_left, strip_right, surely_within
from fastrerank.inputs.windows import most_whole

__all__ = ["PROBES", "Batch", "Compiler", "Item", "Kept", "Run", "Span", "check_same", "whole_tokenizer"]

# Texts for the check that the compiled prompt has the ids of the whole one.
PROBES = (
    "The owl sleeps.",
    "7 mice, 12 owls",
    "\nsecond line",
    "- one (two)",
    "東京は大きい",
    "ends here.\n",
    "",
    " x ",
)
# Characters of context around a text. Between the two, tokens on one side do not depend on the other side.
_CONTEXT = 6

T = TypeVar("T")


@dataclass(frozen=True)
class Span:
    """Pieces of a run between two documents (or its ends), with the context that they are tokenised in."""

    left: str
    pieces: tuple[Piece, ...]
    right: str
    anchored: bool


@dataclass(frozen=True)
class Run:
    """Text between two markers. `steps` is None where documents cannot be tokenised on their own."""

    pieces: tuple[Piece, ...]
    anchored: bool
    lstrip: bool
    rstrip: bool
    steps: tuple[Span | tuple[Slot, Unit], ...] | None

    def texts(self, values: Values) -> tuple[list[str], bool]:
        """The run's pieces with white space stripped as in the whole prompt, and whether its literals stayed."""
        texts = [piece if isinstance(piece, str) else values.of(piece) for piece in self.pieces]
        plain = True
        for i, piece in enumerate(self.pieces):
            if isinstance(piece, Slot) and not texts[i]:
                if piece.before and i:
                    texts[i - 1], plain = texts[i - 1][: -piece.before], False
                if piece.after and i + 1 < len(texts):
                    texts[i + 1], plain = texts[i + 1][piece.after :], False
        for on, order, strip in [(self.lstrip, 1, strip_left), (self.rstrip, -1, strip_right)]:
            for position, i in enumerate(range(len(texts))[::order] if on else ()):
                texts[i] = strip(texts[i])
                plain = plain and position == 0 and (texts[i] != "" or len(texts) == 1)
                if texts[i]:
                    break
        return texts, plain

    def plain(self, values: Values) -> bool:
        """Whether stripping leaves the run's literals alone."""
        edges = [piece for piece in self.pieces if isinstance(piece, Slot) and (piece.before or piece.after)]
        return (not edges and not self.lstrip and not self.rstrip) or self.texts(values)[1]


# Ids of markers and constant text, or a run of texts.
Item = npt.NDArray[np.int32] | Run
Steps = tuple[Span | tuple[Slot, Unit], ...]


class Compiler:
    """A tokenizer that lays out literals and slots, and makes ids of them.

    Args:
        tokenizer: of `whole_tokenizer`. literals: the template's own texts: the added tokens in them are markers.
        cache_bytes: bound of the cache of documents' ids.
        places: whether each token's characters are kept.

    Nothing is set on the tokenizer after construction, so one object serves any number of threads.
    """

    def __init__(self, tokenizer: Any, literals: Iterable[str], cache_bytes: int, places: bool = False) -> None:
        self.text = TextTokenizer(tokenizer, literals)
        self.cache: TokenCache[tuple[Any, ...]] = TokenCache(cache_bytes)
        self.places = places
        self.literals: dict[tuple[str, str, str, bool], Part | None] = {}  # tokens of literals between documents

    def lay_out(self, pieces: Sequence[Piece]) -> Iterator[Item]:
        """The ids of a text's markers and constant runs, and its other runs, in order."""
        held: list[Piece] = []
        before: Marker | None = None
        for item in self.flat(pieces):
            if isinstance(item, Marker):
                yield from _run(self.text, held, before, item)
                yield int32([item.id])
                held, before = [], item
            elif isinstance(item, str) and held and isinstance(held[-1], str):
                held[-1] += item
            else:
                held.append(item)
        yield from _run(self.text, held, before, None)

    def flat(self, pieces: Iterable[Piece]) -> list[Piece | Marker]:
        """The pieces with their literals split at markers."""
        found: list[Piece | Marker] = []
        for piece in pieces:
            found += self.text.split(piece) if isinstance(piece, str) else [piece]
        return found

    def cut(self, text: str, most: int | None, left: bool = False) -> tuple[str, int]:
        """The part of a text that its first, or with `left` its last, `most` tokens stand for, tokenised on its own.

        Returned with how many tokens the text has, of a very long one only more than `most`; 0 where nothing is cut.
        """
        if most is None or surely_within(text, most):
            return text, 0
        _, spans = self.text.encode_spans(text if left else self.text.bounded(text, most), False)
        if len(spans) <= most:
            return text, 0
        if left:
            return text[spans[-most][0] :], len(spans)
        return text[: spans[most - 1][1] if most else 0], len(spans)

    def between(self, span: Span, text: str) -> Part | None:
        """Tokens of a text in its context; None where one crosses the text's borders."""
        encoded = self.text.encode_between(span.left, text, span.right, span.anchored)
        if encoded is None:
            return None
        ids, spans = encoded
        return Part(int32(ids), places=as_places(spans) if self.places else None)

    def document(self, unit: Unit, texts: Sequence[str], last: int | None = None) -> Iterator[Tokens | None]:
        """Tokens of each document in its unit; None where one crosses a border. `last` as in `encode_unit`."""
        if not self.places:
            for ids in self.text.encode_unit(unit, texts, last):
                end = 0 if ids is None else max(unit.head, len(ids) - unit.tail)
                yield None if ids is None else Tokens(int32(ids), unit.head, end, False)
            return
        for text, encoded in zip(texts, self.text.unit_spans(unit, texts), strict=True):
            if encoded is None:
                yield None
            else:
                places = as_places(encoded[1])
                yield Tokens(int32(encoded[0]), *_own(places, len(text)), False, places.astype(np.int32))


class Batch:
    """The prompts of one call: each document is tokenised once, and so is each text between two documents.

    Args:
        compiler: the compiler.
        lists: the documents of each prompt, and the items of its layout.
        prepare: a document as it is printed, and whether its own limit cut it.
        limit: of a document with more tokens there are its first ones, or with `left` its last ones, more than `limit`
            of them, and those of what stands around it.
    """

    def __init__(
        self,
        compiler: Compiler,
        lists: Iterable[tuple[Sequence[str], Iterable[Item]]],
        prepare: Callable[[str], tuple[str, bool]],
        limit: int | None = None,
        left: bool = False,
    ) -> None:
        self.compiler, self._prepare = compiler, prepare
        self._spans: dict[tuple[str, str, str, bool], Part | None] = {}
        self._found: dict[tuple[Any, ...], Tokens] = {}
        missing: dict[tuple[Any, ...], tuple[Unit, dict[str, None]]] = {}
        for documents, items in lists:
            for run in items:
                for step in (run.steps or ()) if isinstance(run, Run) else ():
                    if isinstance(step, Span):
                        continue
                    assert isinstance(run, Run)
                    slot, unit = step
                    kind, text = _kind(slot, unit, run), documents[slot.index]
                    if (kind, text) in self._found or (kind in missing and text in missing[kind][1]):
                        continue
                    tokens = compiler.cache.get(_cache_key(kind, text, limit, left), text)
                    if tokens is None:
                        missing.setdefault(kind, (unit, {}))[1][text] = None
                    else:
                        self._found[kind, text] = tokens
        for kind, (unit, texts) in missing.items():
            prepared = [prepare(text) for text in texts]
            bodies = [_strip_sides(text, kind) for text, _ in prepared]
            if not left:
                bodies = [compiler.text.bounded(body, limit) for body in bodies]
            encoded = compiler.document(unit, bodies, limit if left else None)
            for text, (_, cut), new in zip(texts, prepared, encoded, strict=True):
                if new is not None:
                    self._found[kind, text] = tokens = new._replace(cut=cut)
                    compiler.cache.put(_cache_key(kind, text, limit, left), text, tokens)

    def parts(self, items: Iterable[Item], documents: Sequence[str], values: Values) -> list[Part]:
        """The parts of one prompt; `documents` are those of `lists`, `values` what is printed."""
        parts: list[Part] = []
        for item in items:
            parts += self._run(item, documents, values) if isinstance(item, Run) else [Part(item)]
        return parts

    def _run(self, run: Run, documents: Sequence[str], values: Values) -> list[Part]:
        return self.parts_of(run, documents, [values])[0]

    def parts_of(self, run: Run, documents: Sequence[str], several: Sequence[Values]) -> list[list[Part]]:
        """The parts of a run for each of several values that differ only behind the last document."""
        steps = run.steps or ()
        front = None if run.steps is None else self._walk(run, steps[:-1], documents, several[0], 0)
        found = []
        for values in several:
            back = None
            if front is not None and run.plain(values):
                back = self._walk(run, steps[-1:], documents, values, front[1])
            found.append(self._whole(run, documents, values) if front is None or back is None else front[0] + back[0])
        return found

    def _walk(
        self, run: Run, steps: Steps, documents: Sequence[str], values: Values, place: int
    ) -> tuple[list[Part], int] | None:
        """Parts of the steps from a place of the run on, and the place behind them; None where tokens cross a cut."""
        parts: list[Part] = []
        for step in steps:
            if isinstance(step, Span):
                text = _fill_span(run, step, values)
                part = self._span(step, text)
                if part is None:
                    return None
                parts.append(part if part.places is None else Part(part.ids, places=part.places + place))
                place += len(text)
                continue
            slot, unit = step
            tokens = self._found.get((_kind(slot, unit, run), documents[slot.index]))
            if tokens is None:
                return None
            place += len(unit.key[0] or "")
            places = None if tokens.places is None else tokens.places.astype(np.int64) + place
            parts.append(Part(tokens.ids, slot.index, tokens.start, tokens.end, tokens.cut, places))
            place += len(documents[slot.index]) + len(unit.key[1] or "")
        return parts, place

    def _span(self, span: Span, text: str) -> Part | None:
        known = self._spans if any(isinstance(piece, Slot) for piece in span.pieces) else self.compiler.literals
        key = (span.left, text, span.right, span.anchored)
        if key not in known:
            known[key] = self.compiler.between(span, text)
        return known[key]

    def _whole(self, run: Run, documents: Sequence[str], values: Values) -> list[Part]:
        """The run tokenised as one text; its documents' own tokens are found by their places in it."""
        texts, _ = run.texts(values)
        ids, spans = self.compiler.text.encode_spans("".join(texts), run.anchored)
        all_ids, places = int32(ids), as_places(spans)
        kept = places if self.compiler.places else None
        parts: list[Part] = []
        place = done = 0
        for piece, text in zip(run.pieces, texts, strict=True):
            if isinstance(piece, Slot) and piece.name == "document":
                begin, end = (max(found, done) for found in _own(places - place, len(text)))
                cut = self._prepare(documents[piece.index])[1]
                parts.append(_slice(all_ids, kept, done, end, piece.index, begin - done, cut))
                done = end
            place += len(text)
        return [*parts, _slice(all_ids, kept, done, len(all_ids))]


def _run(tokenizer: TextTokenizer, pieces: list[Piece], before: Marker | None, after: Marker | None) -> Iterator[Item]:
    lstrip, rstrip = before is not None and before.rstrip, after is not None and after.lstrip
    if pieces and lstrip and isinstance(pieces[0], str):
        pieces[0] = strip_left(pieces[0])
    if pieces and rstrip and isinstance(pieces[-1], str):
        pieces[-1] = strip_right(pieces[-1])
    pieces = [piece for piece in pieces if piece != ""]
    anchored = before is not None
    if all(isinstance(piece, str) for piece in pieces):
        if pieces:
            yield int32(next(iter(tokenizer.encode([str(pieces[0])], anchored))))
        return
    yield Run(tuple(pieces), anchored, lstrip, rstrip, _plan(tokenizer, pieces, anchored))


def _plan(tokenizer: TextTokenizer, pieces: list[Piece], anchored: bool) -> Steps | None:
    """Documents with their units, and the spans between them; None where a literal has no cut."""
    steps: list[Span | tuple[Slot, Unit]] = []
    left = ""  # the context of what follows: text up to a cut
    held: list[Piece] = []  # pieces since the last cut
    behind = anchored
    for i, piece in enumerate(pieces):
        if isinstance(piece, str) or piece.name != "document":
            if not (i and isinstance(pieces[i - 1], Slot) and pieces[i - 1].name == "document"):  # type: ignore[union-attr]
                held.append(piece)
            continue
        before = pieces[i - 1] if i else None
        after = pieces[i + 1] if i + 1 < len(pieces) else None
        if isinstance(before, Slot) or isinstance(after, Slot):
            return None
        unit = tokenizer.unit(before, after, anchored)
        if unit is None:
            return None
        if before is not None:
            cut = tokenizer.cut(before)
            assert cut is not None
            if held:  # the literal is held as it is, or from its first cut on
                literal = held.pop()
                assert isinstance(literal, str)
                kept = literal[: len(literal) - (len(before) - cut.last)]
                right = f"{before[cut.last : cut.last + _CONTEXT]}a"
                steps.append(Span(left, (*held, *([kept] if kept else [])), right, behind))
        steps.append((piece, unit))
        held, behind = [], True
        if after is not None:
            cut = tokenizer.cut(after)
            assert cut is not None
            left, held = f"a{after[max(0, cut.first - _CONTEXT) : cut.first]}", [after[cut.first :]]
    if held:
        steps.append(Span(left, tuple(held), "", behind))
    return tuple(step for step in steps if not isinstance(step, Span) or step.pieces)


def _kind(slot: Slot, unit: Unit, run: Run) -> tuple[Any, ...]:
    """What decides a document's token ids besides its text: its unit, and the characters stripped from its ends."""
    left, right = unit.key[0] is None and run.lstrip, unit.key[1] is None and run.rstrip
    return (unit.key, slot.lstrip, slot.rstrip, left, right)


def _strip_sides(text: str, kind: tuple[Any, ...]) -> str:
    _, lstrip, rstrip, left, right = kind
    text = text.lstrip() if lstrip else text
    text = text.rstrip() if rstrip else text
    text = strip_left(text) if left else text
    return strip_right(text) if right else text


def _cache_key(kind: tuple[Any, ...], text: str, limit: int | None, left: bool) -> tuple[Any, ...]:
    """What cached ids depend on beside the text: the limit and the side only where they may have cut them."""
    # A text with fewer characters than this keeps all its tokens on either side: its unit's literals are short.
    return kind if len(text) <= most_whole(limit) // (2 if left else 1) else (*kind, limit, left)


def _fill_span(run: Run, span: Span, values: Values) -> str:
    """The text of a span, without the white space that a marker beside the run swallows."""
    text = fill(span.pieces, values)
    first, last = span.pieces[0], span.pieces[-1]
    if run.lstrip and isinstance(first, Slot) and first is run.pieces[0]:
        text = strip_left(text)
    if run.rstrip and isinstance(last, Slot) and last is run.pieces[-1]:
        text = strip_right(text)
    return text


def _slice(
    ids: npt.NDArray[np.int32],
    places: Places | None,
    begin: int,
    end: int,
    document: int = -1,
    start: int = 0,
    cut: bool = False,
) -> Part:
    kept = None if places is None else places[:, begin:end]
    return Part(ids[begin:end], document, start, end - begin if document >= 0 else 0, cut, kept)


class Kept(Generic[T]):
    """What was last made for a few texts, at most `most` of them; safe to share between threads."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._made: dict[str, T] = {}
        self._lock = threading.Lock()

    def get(self, text: str, make: Callable[[str], T]) -> T:
        """What was made for the text, or `make(text)` now."""
        with self._lock:
            if text not in self._made:
                made = make(text)
                while len(self._made) >= self._most:
                    self._made.pop(next(iter(self._made)))
                self._made[text] = made
            return self._made[text]


def as_places(spans: Sequence[tuple[int, int]]) -> Places:
    """Spans (start, end) of tokens as int64 (2, n)."""
    places: Places = np.array(spans, np.int64).reshape(-1, 2).T
    return places


def _own(places: Places, size: int) -> tuple[int, int]:
    """The tokens that hold nothing but characters of a text of `size` that begins at 0."""
    first = int(np.searchsorted(places[0], 0, "left"))
    return first, max(first, int(np.searchsorted(places[1], size, "right")))


def whole_tokenizer(tokenizer: Any) -> Any:
    """The Rust tokenizer of a fast tokenizer, without truncation and padding; ValueError where there is none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"prompts need a fast tokenizer (a tokenizer.json), got {type(tokenizer).__name__}")
    if backend.truncation is None and backend.padding is None:
        return backend
    plain = type(backend).from_str(backend.to_str())
    plain.no_truncation()
    plain.no_padding()
    return plain


def check_same(what: str, ours: list[int], expected: list[int]) -> None:
    """Raise ValueError that shows both where the ids by segments and as a whole first differ; `what` begins it."""
    if ours != expected:
        place = next((k for k, (a, b) in enumerate(zip(ours, expected, strict=False)) if a != b), -1)
        raise ValueError(
            f"{what} the ids differ from position {place} on: {ours[max(0, place - 2) :][:12]} by segments, "
            f"{expected[max(0, place - 2) :][:12]} as a whole"
        )
