"""Layout of a prompt: runs between markers, documents between cuts, and cutting documents to fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastrerank.inputs.limits import NO_LIMITS, TextLimits, TooLong
from fastrerank.inputs.prompts.template_layout import Piece, Slot, Turn, Values
from fastrerank.inputs.text_pieces import Marker, TextTokenizer, Unit, strip_left, strip_right

__all__ = ["Part", "Run", "Shape", "Span", "fit", "int32", "kind_of", "lay_runs", "strip_sides", "whole_run"]


@dataclass(frozen=True)
class Part:
    """Ids of a prompt; ids[start:end] belong to `document` (-1: none) and may be shortened."""

    ids: npt.NDArray[np.int32]
    document: int = -1
    start: int = 0
    end: int = 0
    cut: bool = False


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


@dataclass(frozen=True)
class Shape:
    """The turns of a prompt with a number of documents, and the same as ids and runs."""

    turns: tuple[Turn, ...]
    parts: tuple[npt.NDArray[np.int32] | Run, ...]


def lay_runs(tokenizer: TextTokenizer, text: Sequence[Piece]) -> Iterator[npt.NDArray[np.int32] | Run]:
    """The ids of a text's markers and constant runs, and its other runs, in order."""
    pieces: list[Piece] = []
    before: Marker | None = None
    flat: list[Piece | Marker] = []
    for piece in text:
        flat += tokenizer.split(piece) if isinstance(piece, str) else [piece]
    for item in flat:
        if isinstance(item, Marker):
            yield from _run(tokenizer, pieces, before, item)
            yield int32([item.id])
            pieces, before = [], item
        elif isinstance(item, str) and pieces and isinstance(pieces[-1], str):
            pieces[-1] += item
        else:
            pieces.append(item)
    yield from _run(tokenizer, pieces, before, None)


def _run(
    tokenizer: TextTokenizer, pieces: list[Piece], before: Marker | None, after: Marker | None
) -> Iterator[npt.NDArray[np.int32] | Run]:
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


def _plan(tokenizer: TextTokenizer, pieces: list[Piece], anchored: bool) -> tuple[Span | tuple[Slot, Unit], ...] | None:
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
                right = f"{before[cut.last : cut.last + 6]}a"
                steps.append(Span(left, (*held, *([kept] if kept else [])), right, behind))
        steps.append((piece, unit))
        held, behind = [], True
        if after is not None:
            cut = tokenizer.cut(after)
            assert cut is not None
            left, held = f"a{after[max(0, cut.first - 6) : cut.first]}", [after[cut.first :]]
    if held:
        steps.append(Span(left, tuple(held), "", behind))
    return tuple(step for step in steps if not isinstance(step, Span) or step.pieces)


def whole_run(tokenizer: TextTokenizer, run: Run, values: Values, was_cut: Callable[[int], bool]) -> list[Part]:
    """The run tokenised as one text; its documents' own tokens are found by their places in it."""
    texts, _ = run.texts(values)
    ids, spans = tokenizer.encode_spans("".join(texts), run.anchored)
    parts: list[Part] = []
    place = done = 0
    for piece, text in zip(run.pieces, texts, strict=True):
        start, place = place, place + len(text)
        if not isinstance(piece, Slot) or piece.name != "document":
            continue
        inside = [i for i in range(done, len(ids)) if spans[i][0] >= start and spans[i][1] <= place and text]
        first, last = (inside[0], inside[-1] + 1) if inside else (done, done)
        parts.append(Part(int32(ids[done:last]), piece.index, first - done, last - done, was_cut(piece.index)))
        done = last
    return [*parts, Part(int32(ids[done:]))]


def kind_of(slot: Slot, unit: Unit, run: Run) -> tuple[Any, ...]:
    """What a document's ids depend on beside its text: its unit, and what is stripped off its sides."""
    left, right = unit.key[0] is None and run.lstrip, unit.key[1] is None and run.rstrip
    return (unit.key, slot.lstrip, slot.rstrip, left, right)


def strip_sides(text: str, kind: tuple[Any, ...]) -> str:
    _, lstrip, rstrip, left, right = kind
    text = text.lstrip() if lstrip else text
    text = text.rstrip() if rstrip else text
    text = strip_left(text) if left else text
    return strip_right(text) if right else text


def fit(
    parts: list[Part], count: int, limit: int | None, name: str, limits: TextLimits = NO_LIMITS
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """Join the parts, the longest documents cut evenly to `limit` tokens in all; (T,) and (count,) which were cut.

    `limits` says from which end (the last, unless it does) and whether documents may be cut at all: TooLong if not.
    """
    truncated = np.zeros(count, np.bool_)
    sizes: dict[int, int] = {}
    for part in parts:
        if part.document >= 0:
            truncated[part.document] = part.cut
            sizes[part.document] = part.end - part.start
    total = sum(len(part.ids) for part in parts)
    if limit is not None and total > limit:
        if not limits.truncate:
            raise TooLong("the prompt", total, limit)
        room = limit - (total - sum(sizes.values()))
        least = sum(min(1, size) for size in sizes.values())
        if room < least:
            raise ValueError(
                f"the query and the fixed text of template {name!r} leave no room for the documents: the prompt "
                f"exceeds its limit of {limit} tokens by {least - room} even with one token per document"
            )
        keep = _share(sizes, room)
        cut: list[Part] = []
        for part in parts:
            if part.document >= 0 and keep[part.document] < sizes[part.document]:
                truncated[part.document] = True
                gone = sizes[part.document] - keep[part.document]
                first = part.start if limits.cut_left() else part.end - gone
                cut.append(Part(np.concatenate([part.ids[:first], part.ids[first + gone :]])))
            else:
                cut.append(part)
        parts = cut
    return np.concatenate([part.ids for part in parts] or [int32([])]), truncated


def _share(sizes: dict[int, int], room: int) -> dict[int, int]:
    """How many tokens each document keeps: all of a short one, an equal share for the others, `room` in all."""
    keep: dict[int, int] = {}
    waiting = sorted(sizes, key=lambda document: sizes[document])
    while waiting:
        share = room // len(waiting)
        if sizes[waiting[0]] <= share:
            document = waiting.pop(0)
            keep[document] = sizes[document]
            room -= keep[document]
            continue
        extra = room - share * len(waiting)
        for position, document in enumerate(sorted(waiting)):
            keep[document] = min(sizes[document], share + (position < extra))
        break
    return keep


def int32(ids: Sequence[int]) -> npt.NDArray[np.int32]:
    try:
        return np.fromiter(ids, np.int32, len(ids))
    except OverflowError:
        raise ValueError(f"tokenizer.json gives the token id {max(ids)}, which no table of embeddings has") from None
