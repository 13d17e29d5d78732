"""Prompts of the methods that read attention: paragraphs, an instruction, a query, and which tokens belong to which.

    {prefix} Here are some paragraphs:{separator}[1] ...{separator}[2] ...{separator}
    {instruction}{separator}Query: ...{suffix}

Spans are counted while the prompt is put together; they are never searched for in its text. A token belongs to a
document if it holds one of the document's characters, also where it holds characters behind the document too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fastrerank.inputs.backend import encodable
from fastrerank.inputs.prompts.attention_policy import Layout, Policy, layout_of
from fastrerank.inputs.prompts.chat_rendering import render
from fastrerank.inputs.prompts.compiler import Batch, Compiler, Kept, Run, check_same, whole_tokenizer
from fastrerank.inputs.prompts.fitting import Part, Places, int32
from fastrerank.inputs.prompts.template import apply_rules
from fastrerank.inputs.prompts.template_layout import Piece, Slot, Values
from fastrerank.inputs.prompts.token_cache import CacheInfo
from fastrerank.inputs.tokenizer import _derive_template
from fastrerank.runtime.naming import shortened

__all__ = ["EMPTY_QUERY", "AttentionPrompt", "AttentionPrompts"]

# The content-free query. The attention that a document gets from it has nothing to do with the user's query.
EMPTY_QUERY = "N/A"
_INTRODUCTION, _QUERY = " Here are some paragraphs:", "Query: "
# Layouts that are kept for instructions of single calls.
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
        tail: int32 (n,), instruction and query, up to the last row that is read.
        empty_tail: the same with `EMPTY_QUERY`.
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
class _Compiled:
    """A prompt with a number of documents: ids before the run of text that holds them, the run, ids behind it."""

    head: Vector
    run: Run
    foot: Vector


class AttentionPrompts:
    """The prompts of a policy in a checkpoint's token ids.

    The ids equal those of tokenising the whole prompt by the checkpoint's own fast tokenizer, as long as the texts hold
    none of its special tokens; a text that does is plain text all the same. Each document is tokenised once and its ids
    are kept; a prompt takes time linear in its length. Nothing is set on the tokenizers after construction, so one
    object serves any number of threads.

    Args:
        tokenizer: a fast tokenizer of transformers.
        policy: the method.
        model_type: the checkpoint's, from its config.json; some layouts depend on it.
        instruction: the text that stands before the query.
        words: documents are cut to this many words; None for no limit.
        max_length: tokens that a prompt can have; a longer document is tokenised only at its beginning and its end.
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
        self._whole = whole_tokenizer(tokenizer)
        self._tokenizer, self._model_type, self._cache_bytes = tokenizer, model_type, cache_bytes
        self._others: Kept[AttentionPrompts] = Kept(_KEPT_INSTRUCTIONS)  # by the instruction of a call
        self.policy, self.words, self.room = policy, words, max_length
        self.instruction = encodable(instruction)
        self.layout = _layout(tokenizer, model_type, policy)
        self._extra = int(policy.extra_token and self.layout.extra_token)
        self._end = f"{self.layout.separator}{self.instruction}{self.layout.separator}{_QUERY}"
        literals = [self._before(0), self._before(1), self._end, self.layout.suffix]
        self._compiler = Compiler(self._whole, literals, cache_bytes, places=True)
        self._layouts: dict[int, _Compiled] = {}  # by the number of documents
        head, _ = (list(ids) for ids in _derive_template(self._whole, False, segments=1).specials)
        own = self._lay_out(1, []).head.tolist()
        self._bos = head if self.layout.bos and own[: len(head)] != head else []
        self._check_exact()

    def __repr__(self) -> str:
        name = shortened(str(getattr(self._tokenizer, "name_or_path", "")))
        return f"AttentionPrompts({name!r}, policy={self.policy.name!r})"

    @property
    def cache_info(self) -> CacheInfo:
        """Hits, misses, entries and bytes of the cache of documents' ids."""
        return self._compiler.cache.info()

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
        layout = self._layouts.get(len(texts))
        if layout is None:
            layout = self._layouts[len(texts)] = self._lay_out(len(texts), self._bos)
        labels, run = self._run(layout.run, texts)
        batch = Batch(self._compiler, [(texts, [layout.run])], lambda text: (text, False))
        both = batch.parts_of(layout.run, texts, [Values(text, "", texts, ()) for text in (query, EMPTY_QUERY)])
        truncated = np.array([cut for _, cut in prepared], np.bool_)
        cut = [_shorten(some, most) for some in both]
        for position in cut[0][1]:
            truncated[order[position]] = True
        (ids, places), (empty_ids, _) = (_join(some) for some, _ in cut)
        head, foot = len(layout.head), len(layout.foot)
        ends = [self._rows(some, foot, text, len(run)) for some, text in zip(both, (query, EMPTY_QUERY), strict=True)]
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
        context = np.concatenate([layout.head, ids[:first]])
        tail, empty_tail = (
            np.concatenate([some, layout.foot])[begin:end]
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
        return self._others.get(
            instruction,
            lambda text: AttentionPrompts(
                self._tokenizer,
                self.policy,
                model_type=self._model_type,
                instruction=text,
                words=self.words,
                max_length=self.room,
                cache_bytes=self._cache_bytes,
            ),
        )

    def shorten(self, text: str, most: int | None) -> tuple[str, bool]:
        """The text of the first `most` tokens, and whether anything is left out."""
        kept, tokens = self._compiler.cut(encodable(text), most)
        return kept, tokens > 0

    def prepare_query(self, query: str) -> str:
        """The query as it is printed."""
        query = apply_rules(encodable(query), self.policy.preprocess_query)
        query = query.strip() if self.layout.strips else query
        return self._compiler.text.bounded(query, self.room)

    def prepare(self, document: str) -> tuple[str, bool]:
        """The document as it is printed, and whether its limit in words cut it."""
        text = encodable(document)
        if self.words is None:
            return self._compiler.text.bounded(text, self.room), False
        words = text.split(None, self.words)
        text, cut = (" ".join(words[: self.words]), True) if len(words) > self.words else (text, False)
        return self._compiler.text.bounded(text, self.room), cut

    def whole_text(self, query: str, documents: Sequence[str]) -> str:
        """The prompt as one text, special tokens of its layout included."""
        texts = [self.prepare(document)[0] for document in documents]
        texts = texts[::-1] if self.policy.order == "reversed" else texts
        run = "".join(self._before(i) + text for i, text in enumerate(texts))
        return f"{run}{self._end}{self.prepare_query(query)}{self.layout.suffix}"

    def _before(self, number: int) -> str:
        """What stands before the document at a place of the prompt."""
        start = f"{self.layout.prefix}{_INTRODUCTION}" if number == 0 else ""
        return f"{start}{self.layout.separator}{self.policy.label.format(number=number + 1)} "

    def _lay_out(self, count: int, bos: list[int]) -> _Compiled:
        pieces: list[Piece] = []
        for number in range(count):
            pieces += [self._before(number), Slot("document", number)]
        items = list(self._compiler.lay_out([*pieces, self._end, Slot("query"), self.layout.suffix]))
        (place,) = (i for i, item in enumerate(items) if isinstance(item, Run))
        ids = [item for item in items if isinstance(item, np.ndarray)]
        run = items[place]
        assert isinstance(run, Run)
        return _Compiled(_joined([int32(bos), *ids[:place]]), run, _joined(ids[place:]))

    def _run(self, run: Run, texts: Sequence[str]) -> tuple[list[tuple[int, int]], str]:
        """The characters that count for each document, and the run's text up to the end of the last document."""
        spans: list[tuple[int, int]] = []
        pieces: list[str] = []
        place = 0
        for number, text in enumerate(texts):
            literal = str(run.pieces[2 * number])
            place += len(literal)
            label = 1 + (len(self.policy.label.format(number=number + 1)) if self.policy.label_in_span else 0)
            spans.append((place - label, place + len(text)))
            pieces += [literal, text]
            place += len(text)
        return spans, "".join(pieces)

    def _rows(self, parts: Sequence[Part], foot: int, query: str, place: int) -> tuple[int, int]:
        """The rows that are read: from the instruction's first token to the end of the prompt, or of the query."""
        ids, places = _join(parts)
        first = int(np.searchsorted(places[1], place + len(self.layout.separator), "right"))
        last = len(ids) + foot
        if self.policy.rows == "query":
            stop = place + len(self._end) + len(query)
            last = min(last, int(np.searchsorted(places[0], stop, "left")) + self._extra)
        return first, last

    def _check_exact(self) -> None:
        """Compare the ids of probe texts with those of the whole prompt; an error shows both where they differ."""
        for query, documents in ((_PROBES[0], _PROBES), (_PROBES[-1], _PROBES[1:2]), ("", _PROBES[::-1])):
            prompt = self.encode(query, documents)
            text = self.whole_text(query, documents)
            expected = self._whole.encode(text, add_special_tokens=False).ids
            ours = [*prompt.context.tolist(), *prompt.tail.tolist()]
            check_same(
                f"the prompt of preset {self.policy.name!r} cannot be tokenised exactly by this tokenizer:",
                ours,
                [*self._bos, *expected][: len(ours)],
            )


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


def _span(places: Places, begin: int, end: int) -> npt.NDArray[np.int64]:
    """The tokens that hold one of the characters [begin, end)."""
    first = int(np.searchsorted(places[1], begin, "right"))
    return np.array([first, max(first, int(np.searchsorted(places[0], end, "left")))])


def _shorten(parts: Sequence[Part], most: int | None) -> tuple[list[Part], list[int]]:
    """The parts with documents of at most `most` tokens of their own, and which documents lost some."""
    kept, cut = [], []
    for part in parts:
        if part.document < 0 or most is None or part.end - part.start <= most:
            kept.append(part)
            continue
        assert part.places is not None
        keep = np.r_[0 : part.start + most, part.end : len(part.ids)]
        end = part.start + most
        kept.append(replace(part, ids=part.ids[keep], places=part.places[:, keep], end=end))
        cut.append(part.document)
    return kept, cut


def _join(parts: Sequence[Part]) -> tuple[Vector, Places]:
    places = [part.places for part in parts if part.places is not None]
    return np.concatenate([part.ids for part in parts]), np.concatenate(places, 1)


def _joined(ids: Sequence[Vector]) -> Vector:
    return np.concatenate([int32([]), *ids])
