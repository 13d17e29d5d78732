"""Prompts as exact token ids: documents tokenised once, cut to fit, never parsed for special tokens."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastrerank.checkpoints.checkpoint import max_length_of, position_limit, read_json
from fastrerank.inputs.backend import encodable
from fastrerank.inputs.limits import NO_LIMITS, TextLimits, TooLong
from fastrerank.inputs.prompts.chat_rendering import render
from fastrerank.inputs.prompts.prompt_layout import (
    Part,
    Run,
    Shape,
    Span,
    fit,
    int32,
    kind_of,
    lay_runs,
    strip_sides,
    whole_run,
)
from fastrerank.inputs.prompts.template import Template
from fastrerank.inputs.prompts.template_layout import (
    Piece,
    Slot,
    Turn,
    Values,
    contents,
    expand,
    fill,
    options,
    render_chat,
)
from fastrerank.inputs.prompts.token_cache import CacheInfo, TokenCache, Tokens
from fastrerank.inputs.screening import load_fast
from fastrerank.inputs.text_pieces import Marker, TextTokenizer, Unit, strip_left, strip_right, surely_within
from fastrerank.inputs.tokenizer import _derive_template, check_texts
from fastrerank.inputs.windows import most_whole
from fastrerank.runtime.naming import shortened

__all__ = ["Prompt", "PromptTokenizer"]

_PROBES = (
    "The owl sleeps.",
    "7 mice, 12 owls",
    "\nsecond line",
    "- one (two)",
    "東京は大きい",
    "ends here.\n",
    "",
    " x ",
)

# How SentencePiece writes the blank before a word; a label that begins with it is a piece by its own name.
_BLANK = "▁"

# Instructions of single calls whose layout is kept.
_KEPT_INSTRUCTIONS = 16


@dataclass(frozen=True, eq=False)
class Prompt:
    """One prompt.

    Attributes:
        ids: int32 (n,), the whole prompt; the readout position is the last one.
        truncated: bool (documents in the prompt,), which documents lost text.
    """

    ids: npt.NDArray[np.int32]
    truncated: npt.NDArray[np.bool_]
    _turns: Sequence[Turn] = field(repr=False)
    _values: Values = field(repr=False)

    @property
    def messages(self) -> list[dict[str, str]]:
        """Role and content of each turn as the chat template got them; a raw prompt is one user turn.

        Documents are cut by the template's own limit, not by the number of tokens that the prompt may have.
        """
        contents = [(turn.role, fill(turn.pieces, self._values)) for turn in self._turns]
        if any(role for role, _ in contents):
            return [{"role": role, "content": content} for role, content in contents]
        return [{"role": "user", "content": "".join(content for _, content in contents)}]


class PromptTokenizer:
    """A template's prompts in a checkpoint's token ids.

    The ids equal those of tokenising the whole rendered prompt by the checkpoint's own fast tokenizer, as long as the
    texts hold none of its special tokens; a text that does is plain text all the same. See docs/prompts.md.

    Attributes:
        template: the template.
        max_length: the limit in tokens of a prompt, suffix included; None for no limit.

    Nothing is set on the tokenizers after construction, so one object serves any number of threads.

    Example:
        >>> prompts = PromptTokenizer.load(Path("path/to/model"), Template.load("qwen3-reranker"))  # doctest: +SKIP
        >>> [prompt.ids.shape for prompt in prompts.encode("who?", [["the owl"], ["the cat"]])]     # doctest: +SKIP
        [(73,), (73,)]
        >>> prompts.label_ids()                                                                     # doctest: +SKIP
        array([9693, 2152])
    """

    def __init__(
        self,
        tokenizer: Any,
        template: Template,
        *,
        max_length: int | None = None,
        instruction: str | None = None,
        readout: str | None = None,
        cache_bytes: int = 64 << 20,
    ) -> None:
        """Prepare a template for a tokenizer.

        Args:
            tokenizer: a fast tokenizer of transformers.
            template: the template.
            max_length: the limit in tokens of a prompt; None: the template's.
            instruction: in place of the template's own instruction.
            readout: "logits", "generate" or "head" in place of the template's: whether `template.suffix` or
                `template.generation_suffix` ends the prompt.
            cache_bytes: bound of the cache of documents' ids.

        Raises ValueError where the checkpoint cannot serve the template: no chat template, or one that drops a turn or
        a text; required tokens missing; ids that differ from those of the whole prompt.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(f"prompts need a fast tokenizer (a tokenizer.json), got {type(tokenizer).__name__}")
        if readout not in (None, "logits", "generate", "head"):
            raise ValueError(f"readout must be logits, generate or head, got {readout!r}")
        if instruction is not None:
            _check_instruction(template, instruction)
        self.template = template
        self.max_length = template.max_length if max_length is None else _check_limit(max_length)
        self._tokenizer = tokenizer
        self._instruction = template.instruction if instruction is None else encodable(instruction)
        self._readout = readout or template.readout
        self._suffix = template.generation_suffix if self._readout == "generate" else template.suffix
        self._whole = backend
        if backend.truncation is not None or backend.padding is not None:
            self._whole = type(backend).from_str(backend.to_str())
            self._whole.no_truncation()
            self._whole.no_padding()
        several = template.kind in ("setwise", "listwise")
        self._counts = (1, 2, 3) if several else ((2,) if template.kind == "pairwise" else (1,))
        layouts = {count: self._lay_out(count) for count in self._counts}
        literals = [
            piece for _, texts in layouts.values() for text in texts for piece in text if isinstance(piece, str)
        ]
        self._text = TextTokenizer(self._whole, [*literals, self._suffix])
        missing = [token for token in template.requires if token not in self._text.markers]
        if missing:
            raise ValueError(
                f"template {template.name!r} is made of the special tokens {', '.join(missing)}, which the "
                "checkpoint's tokenizer does not have; take a template with messages, for its chat template"
            )
        self._specials = self._special_tokens(layouts[self._counts[0]][1][0])
        self._cache: TokenCache[tuple[Any, ...]] = TokenCache(cache_bytes)
        self._shapes = {count: self._shape(*layout) for count, layout in layouts.items()}
        self._cache_bytes = cache_bytes
        self._others: dict[str, PromptTokenizer] = {}  # by the instruction of a call
        self._lock = threading.Lock()
        self._check_exact()

    def __repr__(self) -> str:
        name = shortened(str(getattr(self._tokenizer, "name_or_path", "")))
        return f"PromptTokenizer({name!r}, template={self.template.name!r}, max_length={self.max_length})"

    @classmethod
    def load(
        cls,
        path: Path,
        template: Template,
        *,
        max_length: int | None = None,
        instruction: str | None = None,
        trust_remote_code: bool = False,
        readout: str | None = None,
        cache_bytes: int = 64 << 20,
    ) -> PromptTokenizer:
        """Load the tokenizer of a checkpoint folder; see `__init__` for the rest.

        `max_length` None: the template's limit or the checkpoint's, whichever is smaller. Raises ValueError if the
        given one exceeds the positions that the model has.
        """
        path = Path(path)
        config = read_json(path / "config.json")
        positions, own = position_limit(config), max_length_of(path, config)
        if max_length is None:
            max_length = min((limit for limit in (template.max_length, own) if limit is not None), default=None)
        elif positions is not None and _check_limit(max_length) > positions:
            raise ValueError(f"max_length must be at most {positions}, the model's positions, got {max_length}")
        tokenizer = load_fast(path, trust_remote_code=trust_remote_code)
        return cls(
            tokenizer,
            template,
            max_length=max_length,
            instruction=instruction,
            readout=readout,
            cache_bytes=cache_bytes,
        )

    @property
    def cache_info(self) -> CacheInfo:
        """Hits, misses, entries and bytes of the cache of documents' ids."""
        return self._cache.info()

    def encode(
        self,
        query: str,
        lists: Sequence[Sequence[str]],
        *,
        notes: Sequence[Sequence[str]] | None = None,
        reserve: int = 0,
        max_length: int | None = None,
        limits: TextLimits = NO_LIMITS,
    ) -> list[Prompt]:
        """One prompt per list: 1 document for a pointwise template, 2 for a pairwise one, else as many as there are.

        Documents are cut by the template's own limit first; where a prompt still exceeds `max_length`, its longest
        documents are cut evenly, on token ids. The query, the instruction and the suffix are never cut.

        Args:
            query: the query.
            lists: a sequence of sequences of str.
            notes: one str per document, for templates that print one.
            reserve: tokens to keep free below `max_length`, for an answer.
            max_length: the limit in tokens of this call's prompts; None: `self.max_length`.
            limits: further limits of this call; its `max_length` can only lower the limit.

        Raises TypeError naming the position of what is no str; ValueError for a wrong number of documents or notes, and
        where query and fixed text leave less than one token per document (it says by how many tokens); TooLong where
        `limits.truncate` is False and a text would be cut.
        """
        query = encodable(check_texts([query], "query", scalar=True)[0])
        if isinstance(lists, (str, bytes)) or not hasattr(lists, "__iter__"):
            raise TypeError(f"lists must be a sequence of lists of str, got {type(lists).__name__}")
        checked = [[*map(encodable, check_texts(documents, f"lists[{i}]"))] for i, documents in enumerate(lists)]
        for i, documents in enumerate(checked):
            self._check_count(len(documents), f"lists[{i}]")
        all_notes = self._check_notes(checked, notes)
        most = self.max_length if max_length is None else _check_limit(max_length)
        if limits.max_length is not None:
            if most is not None and limits.max_length > most:
                raise ValueError(f"max_length must be at most {most}, the limit of a prompt, got {limits.max_length}")
            most = limits.max_length
        limit = None if most is None else most - reserve
        if limits == NO_LIMITS:
            return list(self._encode(query, checked, all_notes, limit))
        query, _ = self.within("the query", query, limits.max_tokens_per_query, limits)
        most, left = limits.max_tokens_per_doc, limits.cut_left()
        shorter = [
            [self.within(f"document {k} of lists[{i}]", text, most, limits, left) for k, text in enumerate(some)]
            for i, some in enumerate(checked)
        ]
        prompts = list(self._encode(query, [[text for text, _ in some] for some in shorter], all_notes, limit, limits))
        for prompt, some in zip(prompts, shorter, strict=True):
            if not limits.truncate and prompt.truncated.any():  # by the template's own limit
                most = self.template.document_limit or 0
                raise TooLong("a document", most + 1, most, self.template.document_unit)
            prompt.truncated[:] |= np.array([cut for _, cut in some], np.bool_)
        return prompts

    def with_instruction(self, instruction: str | None) -> PromptTokenizer:
        """Return these prompts with another instruction; None: unchanged. Layouts of the last few are kept.

        Raises ValueError where the template prints no instruction, and as `__init__` does.
        """
        if instruction is None or encodable(instruction) == self._instruction:
            return self
        _check_instruction(self.template, instruction)
        with self._lock:
            found = self._others.get(instruction)
            if found is None:
                found = self._other(encodable(instruction))
                while len(self._others) >= _KEPT_INSTRUCTIONS:
                    self._others.pop(next(iter(self._others)))
                self._others[instruction] = found
            return found

    def _other(self, instruction: str) -> PromptTokenizer:
        if bool(instruction) != bool(self._instruction):  # the layout's literals differ
            return PromptTokenizer(
                self._tokenizer,
                self.template,
                max_length=self.max_length,
                instruction=instruction,
                readout=self._readout,
                cache_bytes=self._cache_bytes,
            )
        other = copy.copy(self)  # the instruction is a value between the same literals; documents' ids are shared
        other._instruction, other._others, other._lock = instruction, {}, threading.Lock()
        return other

    def within(
        self, what: str, text: str, most: int | None, limits: TextLimits, left: bool = False
    ) -> tuple[str, bool]:
        """The part of a text that its first (or last) `most` tokens stand for, and whether anything is left out.

        Raises TooLong naming `what` where something would be, and `limits.truncate` is False.
        """
        if most is None or surely_within(text, most):
            return text, False
        _, spans = self._text.encode_spans(text if left else self._text.bounded(text, most), False)
        if len(spans) <= most:
            return text, False
        if not limits.truncate:
            raise TooLong(what, len(spans), most)
        return (text[spans[-most][0] :] if left else text[: spans[most - 1][1]]), True

    def shorten(self, text: str, count: int) -> str:
        """The beginning of `text` that its first `count` tokens stand for, when it is tokenised on its own."""
        text = self._text.bounded(text, count)
        _, spans = self._text.encode_spans(text, False)
        return text if count >= len(spans) else text[: spans[count - 1][1] if count else 0]

    def bounded(self, text: str, count: int) -> str:
        """`text`, or where it is very long a shorter one, with the same first `count` tokens and more than those."""
        return self._text.bounded(encodable(text), count)

    def label_ids(self, count: int | None = None) -> npt.NDArray[np.int64]:
        """Ids of the template's labels (K,), or of the first `count` identifiers, as they stand behind the prompt.

        Raises ValueError naming the label, its tokens and the template where one is not a single token there, and with
        the reason where there are more identifiers than single tokens.
        """
        if self._readout != "logits":
            raise ValueError(f"template {self.template.name!r} is read by {self._readout}, not by logits of labels")
        if self.template.identifiers:
            if count is None:
                raise ValueError(f"template {self.template.name!r} reads identifiers: say of how many documents")
            labels = self.template.identifier_labels(count)
        else:
            if count is not None:
                raise ValueError(
                    f"template {self.template.name!r} has the labels {self.template.labels}, not identifiers"
                )
            labels = self.template.labels
        return np.array([self._label_id(label) for label in labels], np.int64)

    @property
    def decoder_ids(self) -> npt.NDArray[np.int64]:
        """Ids that the decoder of a "seq2seq" template is made to begin with, behind its start token; often none."""
        return np.array(next(iter(self._text.encode([self.template.decoder], False))), np.int64)

    # ---- laying out

    def _render(self, messages: list[dict[str, str]]) -> str:
        return render(self._tokenizer, contents(self.template, messages), **options(self.template))

    def _lay_out(self, count: int) -> tuple[list[Turn], list[list[Piece]]]:
        turns = expand(self.template, count, self._instruction)
        if self.template.chat:
            if not getattr(self._tokenizer, "chat_template", None):
                raise ValueError(
                    f"template {self.template.name!r} needs a chat template, and the checkpoint has none; "
                    "take a raw template or an instruction-tuned checkpoint"
                )
            turns, prompt = render_chat(self.template, turns, self._render)
            return turns, [[*prompt, self._suffix]]
        texts = [list(turn.pieces) for turn in turns]
        if self._suffix:
            texts = [*texts, [self._suffix]] if self.template.segments else [[*texts[0], self._suffix]]
        return turns, texts

    def _special_tokens(self, first: Sequence[Piece]) -> list[list[int]]:
        """Ids before, between and behind the texts of a prompt."""
        template = self.template
        if template.pair:
            return [list(ids) for ids in _derive_template(self._whole, False, segments=2).specials]
        between: list[list[int]] = [[] for _ in template.segments[1:]]
        if template.segments and self._suffix:
            between.append([])
        head: list[int] = []
        tail: list[int] = []
        if template.special_tokens == "bos":
            bos, pad = self._tokenizer.bos_token_id, self._tokenizer.pad_token_id
            head = [] if bos is None or bos == pad else [bos]
        elif template.special_tokens == "auto" and not template.segments:
            head, tail = (list(ids) for ids in _derive_template(self._whole, False, segments=1).specials)
            if template.chat:
                tail = []
                # What the chat template already prints is not printed twice.
                shown = self._text.split(first[0]) if first and isinstance(first[0], str) else []
                if [part.id for part in shown[: len(head)] if isinstance(part, Marker)] == head:
                    head = []
        return [head, *between, tail]

    def _shape(self, turns: list[Turn], texts: list[list[Piece]]) -> Shape:
        parts: list[npt.NDArray[np.int32] | Run] = []
        for text, specials in zip(texts, self._specials, strict=False):
            parts += [int32(specials), *lay_runs(self._text, text)]
        parts.append(int32(self._specials[-1]))
        return Shape(tuple(turns), tuple(part for part in parts if isinstance(part, Run) or len(part)))

    # ---- encoding

    def _encode(
        self,
        query: str,
        lists: list[list[str]],
        notes: list[list[str]],
        limit: int | None,
        limits: TextLimits = NO_LIMITS,
    ) -> Iterator[Prompt]:
        query = self._checked_query(self.template.prepare_query(query), limit)
        shapes = {count: self._shape_of(count) for count in {len(documents) for documents in lists}}
        found = self._documents(lists, shapes, limit, limits.cut_left())
        prepared: dict[str, tuple[str, bool]] = {}
        spans: dict[tuple[str, str, str, bool], npt.NDArray[np.int32] | None] = {}
        for documents, texts in zip(lists, notes, strict=True):
            shape = shapes[len(documents)]
            values = Values(query, self._instruction, _Prepared(self, documents, prepared), texts)
            shown = values
            if limit is not None and not limits.cut_left():
                shown = replace(values, documents=_Bounded(self._text, values.documents, limit))
            parts = [part for item in shape.parts for part in self._parts(item, shown, documents, found, spans)]
            ids, truncated = fit(parts, len(documents), limit, self.template.name, limits)
            yield Prompt(ids, truncated, shape.turns, values)

    def _checked_query(self, query: str, limit: int | None) -> str:
        """The query; ValueError where it alone has more tokens than a prompt may have, before they are all made."""
        if limit is not None and self._text.bounded(query, limit) is not query:
            raise ValueError(
                f"the query and the fixed text of template {self.template.name!r} leave no room for the documents: the "
                f"query alone, of {len(query):,} characters, exceeds the limit of {limit} tokens of a prompt"
            )
        return query

    def _shape_of(self, count: int) -> Shape:
        shape = self._shapes.get(count)
        if shape is None:
            shape = self._shapes[count] = self._shape(*self._lay_out(count))
        return shape

    def _documents(
        self, lists: list[list[str]], shapes: dict[int, Shape], limit: int | None, left: bool
    ) -> dict[tuple[Any, ...], Tokens]:
        """Ids of every document of the lists in its unit: from the cache, or tokenised now, each content once.

        Of a document with more than `limit` tokens there are its first ones, or with `left` its last ones, more than
        `limit` of them, and those of what stands around it.
        """
        found: dict[tuple[Any, ...], Tokens] = {}
        missing: dict[tuple[Any, ...], tuple[Unit, dict[str, None]]] = {}
        for documents in lists:
            for run in shapes[len(documents)].parts:
                if not isinstance(run, Run):
                    continue
                for step in run.steps or ():
                    if isinstance(step, Span):
                        continue
                    slot, unit = step
                    kind, text = kind_of(slot, unit, run), documents[slot.index]
                    if (kind, text) in found or (kind in missing and text in missing[kind][1]):
                        continue
                    tokens = self._cache.get(self._cache_key(kind, text, limit, left), text)
                    if tokens is None:
                        missing.setdefault(kind, (unit, {}))[1][text] = None
                    else:
                        found[kind, text] = tokens
        for kind, (unit, texts) in missing.items():
            prepared = [self._prepare(text) for text in texts]
            bodies = [strip_sides(text, kind) for text, _ in prepared]
            if left:
                encoded = self._text.encode_unit(unit, bodies, limit)
            else:
                encoded = self._text.encode_unit(unit, [self._text.bounded(body, limit) for body in bodies])
            for text, (_, cut), ids in zip(texts, prepared, encoded, strict=True):
                if ids is not None:
                    tokens = Tokens(int32(ids), unit.head, max(unit.head, len(ids) - unit.tail), cut)
                    found[kind, text] = tokens
                    self._cache.put(self._cache_key(kind, text, limit, left), text, tokens)
        return found

    @staticmethod
    def _cache_key(kind: tuple[Any, ...], text: str, limit: int | None, left: bool) -> tuple[Any, ...]:
        """What cached ids depend on beside the text: the limit and the side only where they may have cut them."""
        # A text with fewer characters than this keeps all its tokens on either side: its unit's literals are short.
        return kind if len(text) <= most_whole(limit) // (2 if left else 1) else (*kind, limit, left)

    def _prepare(self, document: str) -> tuple[str, bool]:
        template = self.template
        if template.document_unit != "tokens" or template.document_limit is None:
            return template.prepare_document(document)
        text = template.clean_document(document)
        if surely_within(text, template.document_limit):
            return template.rewrite_document(text), False
        _, spans = self._text.encode_spans(self._text.bounded(text, template.document_limit), False)
        cut = len(spans) > template.document_limit
        return template.rewrite_document(text[: spans[template.document_limit - 1][1]] if cut else text), cut

    def _parts(
        self,
        item: npt.NDArray[np.int32] | Run,
        values: Values,
        documents: list[str],
        found: dict[tuple[Any, ...], Tokens],
        spans: dict[tuple[str, str, str, bool], npt.NDArray[np.int32] | None],
    ) -> list[Part]:
        if not isinstance(item, Run):
            return [Part(item)]
        parts: list[Part] = []
        for step in item.steps or ():
            if isinstance(step, Span):
                text = fill(step.pieces, values)
                if item.lstrip and isinstance(step.pieces[0], Slot) and step.pieces[0] is item.pieces[0]:
                    text = strip_left(text)
                if item.rstrip and isinstance(step.pieces[-1], Slot) and step.pieces[-1] is item.pieces[-1]:
                    text = strip_right(text)
                key = (step.left, text, step.right, step.anchored)
                if key not in spans:
                    ids = self._text.encode_between(*key)
                    spans[key] = None if ids is None else int32(ids)
                fixed = spans[key]
                if fixed is None:
                    break
                parts.append(Part(fixed))
            else:
                slot, unit = step
                tokens = found.get((kind_of(slot, unit, item), documents[slot.index]))
                if tokens is None:
                    break
                parts.append(Part(tokens.ids, slot.index, tokens.start, tokens.end, tokens.cut))
        if item.steps is None or len(parts) < len(item.steps) or not item.plain(values):
            return whole_run(self._text, item, values, lambda index: self._prepare(documents[index])[1])
        return parts

    # ---- labels and checks

    def _label_id(self, label: str) -> int:
        marker = self._text.markers.get(label)
        if marker is not None:
            return marker.id
        if label.startswith(_BLANK):
            piece: int | None = self._text.tokenizer.token_to_id(label)
            if piece is None:
                raise ValueError(
                    f"the label {label!r} of template {self.template.name!r} is no piece of this tokenizer's "
                    "vocabulary: the checkpoint answers with other words; take the template that it was trained with"
                )
            return piece
        if self.template.model == "seq2seq":
            before, anchored = self.template.decoder, False
        else:
            before, anchored = self._last_text()
        alone, behind = self._text.encode([before, before + label], anchored)
        if behind[:-1] != alone:
            new = [self._text.tokenizer.id_to_token(token) for token in behind]
            raise ValueError(
                f"the label {label!r} of template {self.template.name!r} is not a single token of this tokenizer "
                f"behind {before[-20:]!r}: the tokens there are {new[-max(4, len(behind) - len(alone)) :]}"
            )
        return behind[-1]

    def _last_text(self) -> tuple[str, bool]:
        """The text between the last marker and the readout position, and whether a marker stands before it."""
        if self.template.segments:  # a label is a segment of its own
            return "", False
        _, texts = self._lay_out(self._counts[0])
        values = Values("a", self._instruction, ["a", "a"], ["a", "a"])
        flat: list[Piece | Marker] = []
        for piece in texts[-1]:
            flat += self._text.split(piece) if isinstance(piece, str) else [piece]
        places = [i for i, item in enumerate(flat) if isinstance(item, Marker)]
        run = flat[places[-1] + 1 :] if places else flat
        text = fill([item for item in run if not isinstance(item, Marker)], values)
        last = flat[places[-1]] if places else None
        return strip_left(text) if isinstance(last, Marker) and last.rstrip else text, bool(places)

    def _check_count(self, count: int, place: str) -> None:
        kind, most = self.template.kind, self.template.most_documents
        exact = {"pointwise": 1, "pairwise": 2}.get(kind)
        if exact is not None and count != exact:
            raise ValueError(f"{place} must hold {exact} document(s) for the {kind} template, got {count}")
        if count < 1:
            raise ValueError(f"{place} must hold at least one document, got none")
        if most is not None and count > most:
            raise ValueError(f"{place} holds {count} documents; template {self.template.name!r} names at most {most}")
        if self.template.identifiers == "alphabetic":
            self.template.identifier(count - 1)

    def _check_notes(self, lists: list[list[str]], notes: Sequence[Sequence[str]] | None) -> list[list[str]]:
        if not self.template.uses_notes:
            if notes is not None:
                raise ValueError(f"template {self.template.name!r} prints no notes")
            return [[] for _ in lists]
        if notes is None:
            raise ValueError(f"template {self.template.name!r} prints a note per document: pass notes")
        checked = [[*map(encodable, check_texts(texts, f"notes[{i}]"))] for i, texts in enumerate(notes)]
        if [len(texts) for texts in checked] != [len(documents) for documents in lists]:
            raise ValueError("notes must hold one str for every document of lists")
        return checked

    def _check_exact(self) -> None:
        """Probe texts through the segments and through the whole prompt: a difference is an error that shows both."""
        for count in self._counts:
            for i, query in enumerate(_PROBES):
                documents = [_PROBES[(i + k + 1) % len(_PROBES)] for k in range(count)]
                notes = [str(k) for k in range(count)] if self.template.uses_notes else []
                (prompt,) = self._encode(query, [documents], [notes], None)
                expected = self.whole_ids(query, documents, notes)
                if prompt.ids.tolist() != expected:
                    place = next((k for k, (a, b) in enumerate(zip(prompt.ids, expected, strict=False)) if a != b), -1)
                    raise ValueError(
                        f"template {self.template.name!r} cannot be tokenised exactly by this tokenizer: for the query "
                        f"{query!r} and the documents {documents!r} the ids differ from position {place} on: "
                        f"{prompt.ids[max(0, place - 2) :][:12].tolist()} by segments, "
                        f"{expected[max(0, place - 2) :][:12]} as a whole"
                    )

    def whole_ids(self, query: str, documents: Sequence[str], notes: Sequence[str] = ()) -> list[int]:
        """The prompt rendered with its texts and tokenised as a whole by the checkpoint's own tokenizer: the reference.

        Nothing is cut to `max_length` and nothing cached; special tokens written in a text are parsed as such.
        """
        texts = [self._prepare(document)[0] for document in documents]
        values = Values(self.template.prepare_query(query), self._instruction, texts, notes)
        turns, _ = self._lay_out(len(texts))
        filled = [fill(turn.pieces, values) for turn in turns]
        if self.template.chat:
            messages = [{"role": turn.role, "content": text} for turn, text in zip(turns, filled, strict=True)]
            filled = [self._render(messages) + self._suffix]
        elif self._suffix:
            filled = [*filled, self._suffix] if self.template.segments else [filled[0] + self._suffix]
        ids: list[int] = []
        for text, specials in zip(filled, self._specials, strict=False):
            ids += [*specials, *self._whole.encode(text, add_special_tokens=False).ids]
        return [*ids, *self._specials[-1]]


class _Bounded(Sequence[str]):
    """Documents without the middle that is cut off anyway."""

    def __init__(self, text: TextTokenizer, documents: Sequence[str], limit: int) -> None:
        self._text, self._documents, self._limit = text, documents, limit

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: Any) -> Any:
        return self._text.bounded(self._documents[index], self._limit)


class _Prepared(Sequence[str]):
    """Documents as the template prints them, prepared when they are asked for."""

    def __init__(self, owner: PromptTokenizer, documents: list[str], memo: dict[str, tuple[str, bool]]) -> None:
        self._owner, self._documents, self._memo = owner, documents, memo

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: Any) -> Any:
        return self._get(index)[0]

    def _get(self, index: int) -> tuple[str, bool]:
        document = self._documents[index]
        if document not in self._memo:
            self._memo[document] = self._owner._prepare(document)
        return self._memo[document]


def _check_instruction(template: Template, instruction: str) -> None:
    check_texts([instruction], "instruction", scalar=True)
    if instruction and not template.uses_instruction:
        raise ValueError(f"template {template.name!r} prints no instruction, got {instruction!r}")


def _check_limit(max_length: int) -> int:
    if isinstance(max_length, bool) or not isinstance(max_length, (int, np.integer)):
        raise TypeError(f"max_length must be an int or None, got {type(max_length).__name__}")
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}")
    return int(max_length)
