"""Prompts as exact token ids: documents tokenised once, cut to fit, never parsed for special tokens."""

from __future__ import annotations

import copy
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
from fastrerank.inputs.prompts.compiler import PROBES, Batch, Compiler, Item, Kept, check_same, whole_tokenizer
from fastrerank.inputs.prompts.fitting import fit, int32
from fastrerank.inputs.prompts.labels import label_ids
from fastrerank.inputs.prompts.template import Template
from fastrerank.inputs.prompts.template_layout import Piece, Turn, Values, contents, expand, fill, options, render_chat
from fastrerank.inputs.prompts.token_cache import CacheInfo
from fastrerank.inputs.screening import load_fast
from fastrerank.inputs.text_pieces import Marker
from fastrerank.inputs.tokenizer import _derive_template, check_texts
from fastrerank.runtime.naming import shortened

__all__ = ["Prompt", "PromptTokenizer"]

# Layouts that are kept for instructions of single calls.
_KEPT_INSTRUCTIONS = 16


@dataclass(frozen=True)
class _Layout:
    """The turns of a prompt with a number of documents, its texts, and these as ids and runs."""

    turns: list[Turn]
    texts: list[list[Piece]]
    items: tuple[Item, ...] = ()


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
    texts hold none of its special tokens; a text that does is plain text all the same. See docs/reference/prompts.md.

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
        whole = whole_tokenizer(tokenizer)
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
        self._whole = whole
        several = template.kind in ("setwise", "listwise")
        self._counts = (1, 2, 3) if several else ((2,) if template.kind == "pairwise" else (1,))
        layouts = {count: self._lay_out(count) for count in self._counts}
        literals = [piece for one in layouts.values() for text in one.texts for piece in text if isinstance(piece, str)]
        self._compiler = Compiler(self._whole, [*literals, self._suffix], cache_bytes)
        missing = [token for token in template.requires if token not in self._compiler.text.markers]
        if missing:
            raise ValueError(
                f"template {template.name!r} is made of the special tokens {', '.join(missing)}, which the "
                "checkpoint's tokenizer does not have; take a template with messages, for its chat template"
            )
        self._specials = self._special_tokens(layouts[self._counts[0]].texts[0])
        self._layouts = {count: self._compiled(layout) for count, layout in layouts.items()}
        self._cache_bytes = cache_bytes
        self._others: Kept[PromptTokenizer] = Kept(_KEPT_INSTRUCTIONS)  # by the instruction of a call
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
        return self._compiler.cache.info()

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
        return self._others.get(instruction, lambda text: self._other(encodable(text)))

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
        other._instruction, other._others = instruction, Kept(_KEPT_INSTRUCTIONS)
        return other

    def within(
        self, what: str, text: str, most: int | None, limits: TextLimits, left: bool = False
    ) -> tuple[str, bool]:
        """The text of the first (or with `left` the last) `most` tokens, and whether anything is left out.

        Raises TooLong naming `what` where something would be left out and `limits.truncate` is False.
        """
        kept, tokens = self._compiler.cut(text, most, left)
        if tokens and not limits.truncate:
            raise TooLong(what, tokens, most or 0)
        return kept, tokens > 0

    def shorten(self, text: str, count: int) -> str:
        """The beginning of `text` that makes its first `count` tokens when it is tokenised on its own."""
        return self._compiler.cut(text, count)[0]

    def bounded(self, text: str, count: int) -> str:
        """`text`, or a shorter one where it is very long: it has the same first `count` tokens, and more than those."""
        return self._compiler.text.bounded(encodable(text), count)

    def label_ids(self, count: int | None = None) -> npt.NDArray[np.int64]:
        """Ids of the template's labels (K,), or of the first `count` identifiers, as they stand behind the prompt.

        Raises ValueError naming the label, its tokens and the template where one is not a single token there, and with
        the reason where there are more identifiers than single tokens.
        """
        if self._readout != "logits":
            raise ValueError(f"template {self.template.name!r} is read by {self._readout}, not by logits of labels")
        last = self._lay_out(self._counts[0]).texts[-1]
        return label_ids(self._compiler, self.template, last, self._instruction, count)

    @property
    def decoder_ids(self) -> npt.NDArray[np.int64]:
        """Ids that a "seq2seq" template forces the decoder to begin with, behind its start token; often none."""
        return np.array(next(iter(self._compiler.text.encode([self.template.decoder], False))), np.int64)

    def _render(self, messages: list[dict[str, str]]) -> str:
        return render(self._tokenizer, contents(self.template, messages), **options(self.template))

    def _lay_out(self, count: int) -> _Layout:
        turns = expand(self.template, count, self._instruction)
        if self.template.chat:
            if not getattr(self._tokenizer, "chat_template", None):
                raise ValueError(
                    f"template {self.template.name!r} needs a chat template, and the checkpoint has none; "
                    "take a raw template or an instruction-tuned checkpoint"
                )
            turns, prompt = render_chat(self.template, turns, self._render)
            return _Layout(turns, [[*prompt, self._suffix]])
        texts = [list(turn.pieces) for turn in turns]
        if self._suffix:
            texts = [*texts, [self._suffix]] if self.template.segments else [[*texts[0], self._suffix]]
        return _Layout(turns, texts)

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
                # Special tokens that the chat template prints are not added again.
                shown = self._compiler.text.split(first[0]) if first and isinstance(first[0], str) else []
                if [part.id for part in shown[: len(head)] if isinstance(part, Marker)] == head:
                    head = []
        return [head, *between, tail]

    def _compiled(self, layout: _Layout) -> _Layout:
        items: list[Item] = []
        for text, specials in zip(layout.texts, self._specials, strict=False):
            items += [int32(specials), *self._compiler.lay_out(text)]
        items.append(int32(self._specials[-1]))
        kept = tuple(item for item in items if not isinstance(item, np.ndarray) or len(item))
        return replace(layout, items=kept)

    def _encode(
        self,
        query: str,
        lists: list[list[str]],
        notes: list[list[str]],
        limit: int | None,
        limits: TextLimits = NO_LIMITS,
    ) -> Iterator[Prompt]:
        query = self._checked_query(self.template.prepare_query(query), limit)
        layouts = [self._layout_of(len(documents)) for documents in lists]
        given = ((documents, layout.items) for documents, layout in zip(lists, layouts, strict=True))
        batch = Batch(self._compiler, given, self._prepare, limit, limits.cut_left())
        prepared: dict[str, tuple[str, bool]] = {}
        for documents, texts, layout in zip(lists, notes, layouts, strict=True):
            values = Values(query, self._instruction, _Prepared(self, documents, prepared), texts)
            shown = values
            if limit is not None and not limits.cut_left():
                shown = replace(values, documents=_Bounded(self._compiler, values.documents, limit))
            parts = batch.parts(layout.items, documents, shown)
            ids, truncated = fit(parts, len(documents), limit, self.template.name, limits)
            yield Prompt(ids, truncated, layout.turns, values)

    def _checked_query(self, query: str, limit: int | None) -> str:
        """The query; ValueError if it alone has more tokens than a prompt may have (it is not tokenised whole then)."""
        if limit is not None and self._compiler.text.bounded(query, limit) is not query:
            raise ValueError(
                f"the query and the fixed text of template {self.template.name!r} leave no room for the documents: the "
                f"query alone, of {len(query):,} characters, exceeds the limit of {limit} tokens of a prompt"
            )
        return query

    def _layout_of(self, count: int) -> _Layout:
        layout = self._layouts.get(count)
        if layout is None:
            layout = self._layouts[count] = self._compiled(self._lay_out(count))
        return layout

    def _prepare(self, document: str) -> tuple[str, bool]:
        template = self.template
        if template.document_unit != "tokens" or template.document_limit is None:
            return template.prepare_document(document)
        text, tokens = self._compiler.cut(template.clean_document(document), template.document_limit)
        return template.rewrite_document(text), tokens > 0

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
        """Compare the ids of probe texts with those of the whole prompt; an error shows both where they differ."""
        for count in self._counts:
            for i, query in enumerate(PROBES):
                documents = [PROBES[(i + k + 1) % len(PROBES)] for k in range(count)]
                notes = [str(k) for k in range(count)] if self.template.uses_notes else []
                (prompt,) = self._encode(query, [documents], [notes], None)
                what = (
                    f"template {self.template.name!r} cannot be tokenised exactly by this tokenizer: for the query "
                    f"{query!r} and the documents {documents!r}"
                )
                check_same(what, prompt.ids.tolist(), self.whole_ids(query, documents, notes))

    def whole_ids(self, query: str, documents: Sequence[str], notes: Sequence[str] = ()) -> list[int]:
        """The prompt rendered with its texts and tokenised as a whole by the checkpoint's own tokenizer: the reference.

        Nothing is cut to `max_length` and nothing cached; special tokens written in a text are parsed as such.
        """
        texts = [self._prepare(document)[0] for document in documents]
        values = Values(self.template.prepare_query(query), self._instruction, texts, notes)
        turns = self._lay_out(len(texts)).turns
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
    """Documents without the middle part that the limit cuts off in any case."""

    def __init__(self, compiler: Compiler, documents: Sequence[str], limit: int) -> None:
        self._compiler, self._documents, self._limit = compiler, documents, limit

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: Any) -> Any:
        return self._compiler.text.bounded(self._documents[index], self._limit)


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
