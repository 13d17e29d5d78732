"""Prompts of the methods that read attention: paragraphs, an instruction, a query, and which tokens belong to which.

    {prefix} Here are some paragraphs:{separator}[1] ...{separator}[2] ...{separator}
    {instruction}{separator}Query: ...{suffix}

Spans are counted where the prompt is put together, never searched for in its text. A token belongs to a document if it
holds one of the document's characters: one that merges the document's end with what follows still belongs to it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fastrerank.inputs.backend import encodable
from fastrerank.inputs.prompts.attention_policy import Layout, Policy, layout_of
from fastrerank.inputs.prompts.chat_rendering import render
from fastrerank.inputs.prompts.prompt_layout import int32
from fastrerank.inputs.prompts.token_cache import CacheInfo, TokenCache, Tokens
from fastrerank.inputs.text_pieces import Marker, TextTokenizer, Unit, strip_left, strip_right, surely_within
from fastrerank.inputs.tokenizer import _derive_template
from fastrerank.runtime.naming import shortened

__all__ = ["EMPTY_QUERY", "AttentionPrompt", "AttentionPrompts"]

# The content-free query: what attention a document gets behind it is not about the query.
EMPTY_QUERY = "N/A"
_INTRODUCTION, _QUERY = " Here are some paragraphs:", "Query: "
# Context that a text is tokenised in, behind a place where tokens on both sides do not depend on each other.
_CONTEXT = 6
# Instructions of single calls whose layout is kept.
_KEPT_INSTRUCTIONS = 4
_PROBES = (
    "The owl sleeps.",
    "7 mice, 12 owls",
    "\nsecond [3] line",
    "{x} (two)",
    "東京は大きい",
    "ends here.\n",
    "",
    " x ",
)

Vector = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class AttentionPrompt:
    """One prompt, and the same with the content-free query.

    Attributes:
        context: int32 (C,), everything before the instruction.
        tail: int32 (n,), instruction and query, as far as rows are read. empty_tail: the same of `EMPTY_QUERY`.
        spans: int64 (N, 2), the tokens [start, end) of each document in `context`, in the order they were given.
        own: int64 (N, 2), the same without the token behind the document, where the policy counts one.
        truncated: bool (N,), which documents lost text.
        places: int64 (2, C), where each token of `context` starts and ends in `text`; zeros before the run of text that
            holds the documents.
    """

    context: Vector
    tail: Vector
    empty_tail: Vector
    spans: npt.NDArray[np.int64]
    own: npt.NDArray[np.int64]
    truncated: npt.NDArray[np.bool_]
    places: npt.NDArray[np.int64]
    text: str

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Tokens of each document with all that stands before the next one, int64 (N,)."""
        order = np.argsort(self.spans[:, 0], kind="stable")
        sizes = np.empty(len(order), np.int64)
        sizes[order] = np.diff(np.append(self.spans[order, 0], len(self.context)))
        return sizes

    @property
    def longest(self) -> int:
        """Positions that the prompt takes up."""
        return len(self.context) + max(len(self.tail), len(self.empty_tail))

    def pieces(self, document: int) -> list[str]:
        """The text of each token of a document's span; together they are the text that the span covers."""
        begin, end = self.spans[document].tolist()
        starts, ends = self.places[:, begin:end]
        found, place = [], int(starts[0]) if end > begin else 0
        for stop in ends.tolist():
            found.append(self.text[place : max(place, stop)])
            place = max(place, stop)
        return found


@dataclass(frozen=True)
class _Part:
    """Tokens with the characters that they stand for, counted from the beginning of the run; `own` may be shortened."""

    ids: Vector
    places: npt.NDArray[np.int64]  # (2, n)
    document: int = -1
    own: tuple[int, int] = (0, 0)


class AttentionPrompts:
    """The prompts of a policy in a checkpoint's token ids.

    The ids equal those of tokenising the whole prompt by the checkpoint's own fast tokenizer, as long as the texts hold
    none of its special tokens; a text that does is plain text all the same. Each document is tokenised once and its ids
    are kept; a prompt takes time linear in its length. Nothing is set on the tokenizers after construction, so one
    object serves any number of threads.

    Args:
        tokenizer: a fast tokenizer of transformers.
        policy: the method.
        model_type: of the checkpoint's config, which some layouts are told by.
        instruction: a name in `policy.instructions`, or a text of one's own.
        words: documents are cut to so many words; None for no limit.
        max_length: tokens that a prompt can have; of a document with more, only as many and its end are tokenised.
        cache_bytes: bound of the cache of documents' ids.

    Raises ValueError for a tokenizer that is not fast, and where the ids or spans would differ from those of the whole
    prompt, or the checkpoint's chat template changes the text.
    """

    def __init__(
        self,
        tokenizer: Any,
        policy: Policy,
        *,
        model_type: str = "",
        instruction: str,
        words: int | None,
        max_length: int | None = None,
        cache_bytes: int = 64 << 20,
    ) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(f"prompts need a fast tokenizer (a tokenizer.json), got {type(tokenizer).__name__}")
        self._tokenizer, self._model_type, self._cache_bytes = tokenizer, model_type, cache_bytes
        self._others: dict[str, AttentionPrompts] = {}  # by the instruction of a call
        self._lock = threading.Lock()
        self._whole = backend
        if backend.truncation is not None or backend.padding is not None:
            self._whole = type(backend).from_str(backend.to_str())
            self._whole.no_truncation()
            self._whole.no_padding()
        self.policy, self.words, self.room = policy, words, max_length
        self.instruction = encodable(instruction)
        self.layout = _layout(tokenizer, model_type, policy)
        self._extra = int(policy.extra_token and self.layout.extra_token)
        end = f"{self.layout.separator}{self.instruction}{self.layout.separator}{_QUERY}"
        literals = [self._before(0), self._before(1), end, self.layout.suffix]
        self._text = TextTokenizer(self._whole, literals)
        head, _ = (list(ids) for ids in _derive_template(self._whole, False, segments=1).specials)
        self._lay_out(head if self.layout.bos else [], end)
        self._cache: TokenCache[tuple[Any, ...]] = TokenCache(cache_bytes)
        self._literals: dict[int, _Part | None] = {}  # tokens of what stands before the document at a place
        self._check_exact()

    def __repr__(self) -> str:
        name = shortened(str(getattr(self._tokenizer, "name_or_path", "")))
        return f"AttentionPrompts({name!r}, policy={self.policy.name!r})"

    @property
    def cache_info(self) -> CacheInfo:
        """Hits, misses, entries and bytes of the cache of documents' ids."""
        return self._cache.info()

    def encode(self, query: str, documents: Sequence[str], most: int | None = None) -> AttentionPrompt:
        """Return the prompt of a query and documents, which stand in it as the policy orders them.

        Args:
            query: the query, never cut.
            documents: N str, at least one.
            most: tokens that a document may keep; longer ones lose their ends. None for all.
        """
        query = self.prepare_query(query)
        prepared = [self.prepare(document) for document in documents]
        order = list(range(len(documents)))
        if self.policy.order == "reversed":
            order.reverse()
        texts = [prepared[i][0] for i in order]
        labels, run = self._run(texts)
        parts = self._parts(texts)
        tails = [self._tail(text, len(run)) for text in (query, EMPTY_QUERY)]
        if parts is None or any(tail is None for tail in tails):
            both = [self._by_place(texts, run, text) for text in (query, EMPTY_QUERY)]
        else:
            both = [[*parts, tail] for tail in tails if tail is not None]
        truncated = np.array([cut for _, cut in prepared], np.bool_)
        cut = [_shorten(some, most) for some in both]
        for position in cut[0][1]:
            truncated[order[position]] = True
        (ids, places), (empty_ids, _) = (_join(some) for some, _ in cut)
        head = len(self._head)
        ends = [self._rows(some, text, len(run)) for some, text in zip(both, (query, EMPTY_QUERY), strict=True)]
        removed = [sum(len(p.ids) for p in a) - sum(len(p.ids) for p in b) for a, (b, _) in zip(both, cut, strict=True)]
        first, last = ends[0][0] - removed[0], ends[0][1] - removed[0]
        empty_first, empty_last = ends[1][0] - removed[1], ends[1][1] - removed[1]
        if first != empty_first or not np.array_equal(ids[:first], empty_ids[:first]):
            raise ValueError(
                "the tokens of the documents depend on the query behind them: this tokenizer is no use here"
            )
        own = np.zeros((len(texts), 2), np.int64)
        for position, (begin, end) in enumerate(labels):
            own[order[position]] = _span(places[:, :first], begin, end) + head
        spans = np.minimum(own + np.array([0, self._extra]), head + first)
        context = np.concatenate([self._head, ids[:first]])
        tail, empty_tail = (
            np.concatenate([some, self._foot])[begin:end]
            for some, begin, end in ((ids, first, last), (empty_ids, first, empty_last))
        )
        shift = np.zeros((2, head), np.int64)
        return AttentionPrompt(
            context,
            tail,
            empty_tail,
            spans,
            own,
            truncated,
            np.concatenate([shift, places[:, :first]], 1),
            run + self._end,
        )

    def with_instruction(self, instruction: str | None) -> AttentionPrompts:
        """Return these prompts with another instruction; None: unchanged. Those of the last few are kept.

        Raises ValueError as `__init__` does.
        """
        if instruction is None or encodable(instruction) == self.instruction:
            return self
        with self._lock:
            found = self._others.get(instruction)
            if found is None:
                found = AttentionPrompts(
                    self._tokenizer,
                    self.policy,
                    model_type=self._model_type,
                    instruction=instruction,
                    words=self.words,
                    max_length=self.room,
                    cache_bytes=self._cache_bytes,
                )
                while len(self._others) >= _KEPT_INSTRUCTIONS:
                    self._others.pop(next(iter(self._others)))
                self._others[instruction] = found
            return found

    def shorten(self, text: str, most: int | None) -> tuple[str, bool]:
        """The beginning of a text that its first `most` tokens stand for, and whether anything is left out."""
        text = encodable(text)
        if most is None or surely_within(text, most):
            return text, False
        _, spans = self._text.encode_spans(self._text.bounded(text, most), False)
        return (text[: spans[most - 1][1]], True) if len(spans) > most else (text, False)

    def prepare_query(self, query: str) -> str:
        """The query as it is printed."""
        query = encodable(query)
        query = query.strip() if self.policy.strip_query or self.layout.strips else query
        return self._text.bounded(query, self.room)

    def prepare(self, document: str) -> tuple[str, bool]:
        """The document as it is printed, and whether its limit in words cut it."""
        text = encodable(document)
        if self.words is None:
            return self._text.bounded(text, self.room), False
        words = text.split(None, self.words)
        text, cut = (" ".join(words[: self.words]), True) if len(words) > self.words else (text, False)
        return self._text.bounded(text, self.room), cut

    def whole_text(self, query: str, documents: Sequence[str]) -> str:
        """The prompt as one text, special tokens of its layout included."""
        texts = [self.prepare(document)[0] for document in documents]
        texts = texts[::-1] if self.policy.order == "reversed" else texts
        run = "".join(self._before(i) + text for i, text in enumerate(texts))
        return f"{run}{self._end}{self.prepare_query(query)}{self.layout.suffix}"

    # ---- laying out

    def _before(self, number: int) -> str:
        """What stands before the document at a place of the prompt."""
        start = f"{self.layout.prefix}{_INTRODUCTION}" if number == 0 else ""
        return f"{start}{self.layout.separator}{self.policy.label.format(number=number + 1)} "

    def _lay_out(self, bos: list[int], end: str) -> None:
        """Ids before the run of text that holds the documents, the run's literals, ids behind it."""
        first = self._text.split(self._before(0))
        places = [i for i, item in enumerate(first) if isinstance(item, Marker)]
        split = places[-1] + 1 if places else 0
        head, marker = self._constant(first[:split], None)
        if not self.layout.bos or head[: len(bos)] == bos:
            bos = []
        self._head = int32([*bos, *head])
        self._anchored = marker is not None
        self._start = "".join(str(item) for item in first[split:])
        if marker is not None and marker.rstrip:
            self._start = strip_left(self._start)
        last = self._text.split(self.layout.suffix)
        stop = next((i for i, item in enumerate(last) if isinstance(item, Marker)), len(last))
        self._close = "".join(str(item) for item in last[:stop])
        after = last[stop] if stop < len(last) else None
        self._strips_right = isinstance(after, Marker) and after.lstrip
        self._foot = int32(self._constant(last[stop:], None)[0])
        self._end = end
        # From here on the documents' last literal is tokenised with what follows it.
        cut = self._text.cut(end)
        self._tail_cut = None if cut is None else cut.first

    def _constant(self, items: Sequence[str | Marker], before: Marker | None) -> tuple[list[int], Marker | None]:
        ids: list[int] = []
        for i, item in enumerate(items):
            if isinstance(item, Marker):
                ids.append(item.id)
                before = item
                continue
            after = items[i + 1] if i + 1 < len(items) else None
            text = strip_left(item) if before is not None and before.rstrip else item
            text = strip_right(text) if isinstance(after, Marker) and after.lstrip else text
            if text:
                ids += next(iter(self._text.encode([text], before is not None)))
        return ids, before

    def _literal(self, number: int) -> str:
        """The run's text before the document at a place of the prompt."""
        return self._start if number == 0 else self._before(number)

    def _run(self, texts: Sequence[str]) -> tuple[list[tuple[int, int]], str]:
        """Of each document the characters that count for it, and the run's text as far as the documents go."""
        spans, pieces, place = [], [], 0
        for number, text in enumerate(texts):
            literal = self._literal(number)
            place += len(literal)
            label = 1 + (len(self.policy.label.format(number=number + 1)) if self.policy.label_in_span else 0)
            spans.append((place - label, place + len(text)))
            pieces += [literal, text]
            place += len(text)
        return spans, "".join(pieces)

    # ---- tokens

    def _parts(self, texts: Sequence[str]) -> list[_Part] | None:
        """Tokens of the documents and of what stands between them; None where they cannot be tokenised on their own."""
        if self._tail_cut is None:
            return None
        count = len(texts)
        units: list[Unit] = []
        for i in range(count):
            after = self._end if i + 1 == count else self._literal(i + 1)
            unit = self._text.unit(self._literal(i), after, self._anchored)
            if unit is None:
                return None
            units.append(unit)
        found = self._documents(texts, units)
        parts: list[_Part] = []
        place = 0
        for i, (text, tokens) in enumerate(zip(texts, found, strict=True)):
            literal, cut = self._literal(i), self._text.cut(self._literal(i))
            if tokens is None or tokens.places is None or cut is None:
                return None
            if i not in self._literals:
                self._literals[i] = self._between(i, literal, cut.first, cut.last)
            between = self._literals[i]
            if between is None:
                return None
            parts.append(_Part(between.ids, between.places + place))
            place += len(literal)
            places = tokens.places.astype(np.int64) + place
            parts.append(_Part(tokens.ids, places, i, (tokens.start, tokens.end)))
            place += len(text)
        return parts

    def _between(self, number: int, literal: str, first: int, last: int) -> _Part | None:
        """Tokens of a literal from its first cut (or the run's beginning) to its last, and their characters in it."""
        begin = 0 if number == 0 else first
        left = "" if number == 0 else f"a{literal[max(0, first - _CONTEXT) : first]}"
        right = f"{literal[last : last + _CONTEXT]}a"
        anchored = self._anchored or number > 0
        ids, spans = self._text.encode_spans(f"{left}{literal[begin:last]}{right}", anchored)
        kept = _inside(spans, len(left), len(left) + last - begin)
        if kept is None:
            return None
        return _Part(int32(ids[kept]), _places(spans[kept]) + (begin - len(left)))

    def _documents(self, texts: Sequence[str], units: Sequence[Unit]) -> list[Tokens | None]:
        """Tokens of each document in its unit: from the cache, or tokenised now, each content once."""
        found: dict[tuple[Any, ...], Tokens | None] = {}
        missing: dict[Unit, dict[str, None]] = {}
        for text, unit in zip(texts, units, strict=True):
            key = (unit.key, text)
            if key in found or text in missing.get(unit, ()):
                continue
            tokens = self._cache.get(unit.key, text)
            if tokens is None:
                missing.setdefault(unit, {})[text] = None
            else:
                found[key] = tokens
        for unit, some in missing.items():
            for text, encoded in zip(some, self._text.unit_spans(unit, list(some)), strict=True):
                tokens = None
                if encoded is not None:
                    ids, places = int32(encoded[0]), _places(encoded[1])
                    tokens = Tokens(ids, *_own(places, len(text)), False, places.astype(np.int32))
                    self._cache.put(unit.key, text, tokens)
                found[unit.key, text] = tokens
        return [found[unit.key, text] for text, unit in zip(texts, units, strict=True)]

    def _tail(self, query: str, place: int) -> _Part | None:
        """Tokens of the last literal from its first cut on, the query, and what follows up to a marker."""
        first = self._tail_cut
        if first is None:
            return None
        left = f"a{self._end[max(0, first - _CONTEXT) : first]}"
        ids, spans = self._text.encode_spans(left + self._closing(query)[first:], True)
        kept = _inside(spans, len(left), None)
        if kept is None:
            return None
        return _Part(int32(ids[kept]), _places(spans[kept]) + (place + first - len(left)))

    def _closing(self, query: str) -> str:
        text = f"{self._end}{query}{self._close}"
        return strip_right(text) if self._strips_right else text

    def _by_place(self, texts: Sequence[str], run: str, query: str) -> list[_Part]:
        """The whole run tokenised as one text."""
        ids, spans = self._text.encode_spans(run + self._closing(query), self._anchored)
        all_ids, places = int32(ids), _places(spans)
        parts, done, place = [], 0, 0
        for number, text in enumerate(texts):
            place += len(self._literal(number))
            begin, end = _own(places - place, len(text))
            begin, end = max(begin, done), max(end, done)
            parts.append(_Part(all_ids[done:end], places[:, done:end], number, (begin - done, end - done)))
            done, place = end, place + len(text)
        return [*parts, _Part(all_ids[done:], places[:, done:])]

    def _rows(self, parts: Sequence[_Part], query: str, place: int) -> tuple[int, int]:
        """The rows that are read: from the instruction's first token to the end, or as far as the query goes."""
        ids, places = _join(parts)
        first = int(np.searchsorted(places[1], place + len(self.layout.separator), "right"))
        last = len(ids) + len(self._foot)
        if self.policy.rows == "query":
            stop = place + len(self._end) + len(query)
            last = min(last, int(np.searchsorted(places[0], stop, "left")) + self._extra)
        return first, last

    # ---- checks

    def _check_exact(self) -> None:
        """Probe texts by segments and as a whole: a difference is an error that shows both."""
        for query, documents in ((_PROBES[0], _PROBES), (_PROBES[-1], _PROBES[1:2]), ("", _PROBES[::-1])):
            prompt = self.encode(query, documents)
            text = self.whole_text(query, documents)
            expected = self._whole.encode(text, add_special_tokens=False).ids
            bos = self._head[: max(0, len(self._head) - self._marked())].tolist()
            ours = [*prompt.context.tolist(), *prompt.tail.tolist()]
            expected = [*bos, *expected][: len(ours)]
            if ours != expected:
                place = next((k for k, (a, b) in enumerate(zip(ours, expected, strict=False)) if a != b), len(expected))
                raise ValueError(
                    f"the prompt of preset {self.policy.name!r} cannot be tokenised exactly by this tokenizer: the ids "
                    f"differ from position {place} on: {ours[max(0, place - 2) :][:12]} by segments, "
                    f"{expected[max(0, place - 2) :][:12]} as a whole"
                )

    def _marked(self) -> int:
        """Tokens of the layout's own prefix before the run."""
        first = self._text.split(self._before(0))
        places = [i for i, item in enumerate(first) if isinstance(item, Marker)]
        return len(self._constant(first[: places[-1] + 1], None)[0]) if places else 0


def _layout(tokenizer: Any, model_type: str, policy: Policy) -> Layout:
    template = getattr(tokenizer, "chat_template", None)
    known = layout_of(model_type, tokenizer.get_vocab(), template if isinstance(template, str) else None)
    if known is None:
        known = _chat_layout(tokenizer) if template else Layout("plain", "", "", "\n\n")
    return replace(known, separator=policy.separator or known.separator)


def _chat_layout(tokenizer: Any) -> Layout:
    """The user's turn as the checkpoint's chat template prints it; ValueError where the template changes its text."""
    content = "w6f1 {x}\n\n[2] wq8e"

    def printed(text: str) -> str:
        return render(tokenizer, [{"role": "user", "content": text}], add_generation_prompt=True)

    plain, wide = printed(content), printed(f" {content} \n")
    if plain.count(content) != 1 or wide.count(content) != 1:
        raise ValueError("the checkpoint's chat template drops the user's text, prints it twice or changes it")
    prefix, suffix = plain.split(content)
    strips = wide != f"{prefix} {content} \n{suffix}"
    if strips and wide != plain and not wide.startswith(f"{prefix} {content}"):
        raise ValueError("the checkpoint's chat template changes what stands around the user's text")
    bos = getattr(tokenizer, "bos_token", None)
    return Layout("chat", prefix, suffix, "\n\n", strips=strips, bos=not (bos and prefix.startswith(bos)))


def _inside(spans: Sequence[tuple[int, int]], begin: int, end: int | None) -> slice | None:
    """The tokens that stand in [begin, end) characters; None where one crosses a border."""
    starts, ends = _places(spans)
    first = int(np.searchsorted(ends, begin, "right"))
    last = len(spans) if end is None else int(np.searchsorted(ends, end, "right"))
    if (first < len(spans) and starts[first] < begin) or (last < len(spans) and end is not None and starts[last] < end):
        return None
    return slice(first, last)


def _places(spans: Sequence[tuple[int, int]]) -> npt.NDArray[np.int64]:
    places: npt.NDArray[np.int64] = np.array(spans, np.int64).reshape(-1, 2).T
    return places


def _span(places: npt.NDArray[np.int64], begin: int, end: int) -> npt.NDArray[np.int64]:
    """The tokens that hold one of the characters [begin, end)."""
    first = int(np.searchsorted(places[1], begin, "right"))
    return np.array([first, max(first, int(np.searchsorted(places[0], end, "left")))])


def _own(places: npt.NDArray[np.int64], size: int) -> tuple[int, int]:
    """The tokens that hold nothing but characters of a text of `size` that begins at 0."""
    first = int(np.searchsorted(places[0], 0, "left"))
    return first, max(first, int(np.searchsorted(places[1], size, "right")))


def _shorten(parts: Sequence[_Part], most: int | None) -> tuple[list[_Part], list[int]]:
    """The parts with documents of at most `most` tokens of their own, and which documents lost some."""
    kept, cut = [], []
    for part in parts:
        begin, end = part.own
        if part.document < 0 or most is None or end - begin <= most:
            kept.append(part)
            continue
        keep = np.r_[0 : begin + most, end : len(part.ids)]
        kept.append(_Part(part.ids[keep], part.places[:, keep], part.document, (begin, begin + most)))
        cut.append(part.document)
    return kept, cut


def _join(parts: Sequence[_Part]) -> tuple[Vector, npt.NDArray[np.int64]]:
    return np.concatenate([part.ids for part in parts]), np.concatenate([part.places for part in parts], 1)
