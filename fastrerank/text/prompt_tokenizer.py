"""Prompts as exact token ids: documents tokenised once, cut to fit, never parsed for special tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastrerank.checkpoint import max_length_of, position_limit, read_json
from fastrerank.text.prompts import Template
from fastrerank.text.runs import Marker, TextTokenizer, Unit, encodable, strip_left, strip_right
from fastrerank.text.shapes import Piece, Slot, Turn, Values, expand, fill, options, render_chat
from fastrerank.text.token_cache import CacheInfo, TokenCache, Tokens
from fastrerank.text.tokenizer import _derive_template, check_texts

if TYPE_CHECKING:
    import tokenizers

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


@dataclass(frozen=True)
class _Part:
    """Ids of a prompt; ids[start:end] belong to `document` (-1: none) and may be shortened from their end."""

    ids: npt.NDArray[np.int32]
    document: int = -1
    start: int = 0
    end: int = 0
    cut: bool = False


@dataclass(frozen=True)
class _Span:
    """Pieces of a run between two documents (or its ends), with the context that they are tokenised in."""

    left: str
    pieces: tuple[Piece, ...]
    right: str
    anchored: bool


@dataclass(frozen=True)
class _Run:
    """Text between two markers. `steps` is None where documents cannot be tokenised on their own."""

    pieces: tuple[Piece, ...]
    anchored: bool
    lstrip: bool
    rstrip: bool
    steps: tuple[_Span | tuple[Slot, Unit], ...] | None

    def texts(self, values: Values) -> tuple[list[str], bool]:
        """The run's pieces with white space stripped as in the whole prompt, and whether literals stayed as they are."""
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


@dataclass(frozen=True)
class _Shape:
    turns: tuple[Turn, ...]
    parts: tuple[npt.NDArray[np.int32] | _Run, ...]


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
        self, tokenizer: Any, template: Template, *, max_length: int | None = None, instruction: str | None = None,
        readout: str | None = None, cache_bytes: int = 64 << 20,
    ) -> None:  # fmt: skip
        """Prepare a template for a tokenizer.

        Args:
            tokenizer: a fast tokenizer of transformers.
            template: the template.
            max_length: the limit in tokens of a prompt; None: the template's.
            instruction: in place of the template's own instruction.
            readout: "logits", "generate" or "head" in place of the template's: whether `template.suffix` or
                `template.generation_suffix` ends the prompt.
            cache_bytes: bound of the cache of documents' ids.

        Raises ValueError where the checkpoint cannot serve the template: no chat template, or one that drops a turn or a
        text; required tokens missing; ids that differ from those of the whole prompt.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(f"prompts need a fast tokenizer (a tokenizer.json), got {type(tokenizer).__name__}")
        if readout not in (None, "logits", "generate", "head"):
            raise ValueError(f"readout must be logits, generate or head, got {readout!r}")
        if instruction is not None:
            check_texts([instruction], "instruction", scalar=True)
            if instruction and not template.uses_instruction:
                raise ValueError(f"template {template.name!r} prints no instruction, got {instruction!r}")
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
                f"template {template.name!r} is made of the special tokens {', '.join(missing)}, which the checkpoint's "
                "tokenizer does not have; take a template with messages, which the checkpoint's chat template prints"
            )
        self._specials = self._special_tokens([piece for piece in layouts[self._counts[0]][1][0][:1]])
        self._cache: TokenCache[tuple[Any, ...]] = TokenCache(cache_bytes)
        self._shapes = {count: self._shape(*layout) for count, layout in layouts.items()}
        self._check_exact()

    @classmethod
    def load(
        cls, path: Path, template: Template, *, max_length: int | None = None, instruction: str | None = None,
        trust_remote_code: bool = False, readout: str | None = None, cache_bytes: int = 64 << 20,
    ) -> PromptTokenizer:  # fmt: skip
        """Load the tokenizer of a checkpoint folder; see `__init__` for the rest.

        `max_length` None: the template's limit or the checkpoint's, whichever is smaller. Raises ValueError if the
        given one exceeds the positions that the model has.
        """
        from transformers import AutoTokenizer

        path = Path(path)
        config = read_json(path / "config.json")
        positions, own = position_limit(config), max_length_of(path, config)
        if max_length is None:
            max_length = min((limit for limit in (template.max_length, own) if limit is not None), default=None)
        elif positions is not None and _check_limit(max_length) > positions:
            raise ValueError(f"max_length must be at most {positions}, the model's positions, got {max_length}")
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
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
        self, query: str, lists: Sequence[Sequence[str]], *, notes: Sequence[Sequence[str]] | None = None,
        reserve: int = 0,
    ) -> list[Prompt]:  # fmt: skip
        """One prompt per list: 1 document for a pointwise template, 2 for a pairwise one, else as many as there are.

        Documents are cut by the template's own limit first; where a prompt still exceeds `max_length`, its longest
        documents are cut evenly, on token ids. The query, the instruction and the suffix are never cut.

        Args:
            query: the query.
            lists: a sequence of sequences of str.
            notes: one str per document, for templates that print one.
            reserve: tokens to keep free below `max_length`, for an answer.

        Raises TypeError naming the position of what is no str; ValueError for a wrong number of documents or notes, and
        where query and fixed text leave less than one token per document (it says by how many tokens).
        """
        query = encodable(check_texts([query], "query", scalar=True)[0])
        if isinstance(lists, (str, bytes)) or not hasattr(lists, "__iter__"):
            raise TypeError(f"lists must be a sequence of lists of str, got {type(lists).__name__}")
        checked = [[*map(encodable, check_texts(documents, f"lists[{i}]"))] for i, documents in enumerate(lists)]
        for i, documents in enumerate(checked):
            self._check_count(len(documents), f"lists[{i}]")
        all_notes = self._check_notes(checked, notes)
        limit = None if self.max_length is None else self.max_length - reserve
        return list(self._encode(query, checked, all_notes, limit))

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
        return str(self._tokenizer.apply_chat_template(messages, **options(self.template)))

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

    def _shape(self, turns: list[Turn], texts: list[list[Piece]]) -> _Shape:
        parts: list[npt.NDArray[np.int32] | _Run] = []
        for text, specials in zip(texts, self._specials, strict=False):
            parts += [_int32(specials), *self._runs(text)]
        parts.append(_int32(self._specials[-1]))
        return _Shape(tuple(turns), tuple(part for part in parts if isinstance(part, _Run) or len(part)))

    def _runs(self, text: list[Piece]) -> Iterator[npt.NDArray[np.int32] | _Run]:
        pieces: list[Piece] = []
        before: Marker | None = None
        flat: list[Piece | Marker] = []
        for piece in text:
            flat += self._text.split(piece) if isinstance(piece, str) else [piece]
        for item in flat:
            if isinstance(item, Marker):
                yield from self._run(pieces, before, item)
                yield _int32([item.id])
                pieces, before = [], item
            elif isinstance(item, str) and pieces and isinstance(pieces[-1], str):
                pieces[-1] += item
            else:
                pieces.append(item)
        yield from self._run(pieces, before, None)

    def _run(
        self, pieces: list[Piece], before: Marker | None, after: Marker | None
    ) -> Iterator[npt.NDArray[np.int32] | _Run]:
        lstrip, rstrip = before is not None and before.rstrip, after is not None and after.lstrip
        if pieces and lstrip and isinstance(pieces[0], str):
            pieces[0] = strip_left(pieces[0])
        if pieces and rstrip and isinstance(pieces[-1], str):
            pieces[-1] = strip_right(pieces[-1])
        pieces = [piece for piece in pieces if piece != ""]
        anchored = before is not None
        if all(isinstance(piece, str) for piece in pieces):
            if pieces:
                yield _int32(next(iter(self._text.encode([str(pieces[0])], anchored))))
            return
        yield _Run(tuple(pieces), anchored, lstrip, rstrip, self._plan(pieces, anchored))

    def _plan(self, pieces: list[Piece], anchored: bool) -> tuple[_Span | tuple[Slot, Unit], ...] | None:
        """Documents with their units, and the spans between them; None where a literal has no cut."""
        steps: list[_Span | tuple[Slot, Unit]] = []
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
            unit = self._text.unit(before, after, anchored)
            if unit is None:
                return None
            if before is not None:
                cut = self._text.cut(before)
                assert cut is not None
                if held:  # the literal is held as it is, or from its first cut on
                    literal = held.pop()
                    assert isinstance(literal, str)
                    kept = literal[: len(literal) - (len(before) - cut.last)]
                    right = f"{before[cut.last : cut.last + 6]}a"
                    steps.append(_Span(left, (*held, *([kept] if kept else [])), right, behind))
            steps.append((piece, unit))
            held, behind = [], True
            if after is not None:
                cut = self._text.cut(after)
                assert cut is not None
                left, held = f"a{after[max(0, cut.first - 6) : cut.first]}", [after[cut.first :]]
        if held:
            steps.append(_Span(left, tuple(held), "", behind))
        return tuple(step for step in steps if not isinstance(step, _Span) or step.pieces)

    # ---- encoding

    def _encode(
        self, query: str, lists: list[list[str]], notes: list[list[str]], limit: int | None
    ) -> Iterator[Prompt]:
        query = self.template.prepare_query(query)
        shapes = {count: self._shape_of(count) for count in {len(documents) for documents in lists}}
        found = self._documents(lists, shapes)
        prepared: dict[str, tuple[str, bool]] = {}
        spans: dict[tuple[str, str, str, bool], npt.NDArray[np.int32] | None] = {}
        for documents, texts in zip(lists, notes, strict=True):
            shape = shapes[len(documents)]
            values = Values(query, self._instruction, _Prepared(self, documents, prepared), texts)
            parts = [part for item in shape.parts for part in self._parts(item, values, documents, found, spans)]
            ids, truncated = _fit(parts, len(documents), limit, self.template.name)
            yield Prompt(ids, truncated, shape.turns, values)

    def _shape_of(self, count: int) -> _Shape:
        shape = self._shapes.get(count)
        if shape is None:
            shape = self._shapes[count] = self._shape(*self._lay_out(count))
        return shape

    def _documents(self, lists: list[list[str]], shapes: dict[int, _Shape]) -> dict[tuple[Any, ...], Tokens]:
        """Ids of every document of the lists in its unit: from the cache, or tokenised now, each content once."""
        found: dict[tuple[Any, ...], Tokens] = {}
        missing: dict[tuple[Any, ...], tuple[Unit, dict[str, None]]] = {}
        for documents in lists:
            for run in shapes[len(documents)].parts:
                if not isinstance(run, _Run):
                    continue
                for step in run.steps or ():
                    if isinstance(step, _Span):
                        continue
                    slot, unit = step
                    kind, text = _kind(slot, unit, run), documents[slot.index]
                    if (kind, text) in found or (kind in missing and text in missing[kind][1]):
                        continue
                    tokens = self._cache.get(kind, text)
                    if tokens is None:
                        missing.setdefault(kind, (unit, {}))[1][text] = None
                    else:
                        found[kind, text] = tokens
        for kind, (unit, texts) in missing.items():
            prepared = [self._prepare(text) for text in texts]
            bodies = [_strip(text, kind) for text, _ in prepared]
            encoded = self._text.encode_unit(unit, bodies)
            for text, (_, cut), ids in zip(texts, prepared, encoded, strict=True):
                if ids is not None:
                    tokens = Tokens(_int32(ids), unit.head, max(unit.head, len(ids) - unit.tail), cut)
                    found[kind, text] = tokens
                    self._cache.put(kind, text, tokens)
        return found

    def _prepare(self, document: str) -> tuple[str, bool]:
        template = self.template
        if template.document_unit != "tokens" or template.document_limit is None:
            return template.prepare_document(document)
        text = template.clean_document(document)
        if len(text.encode()) < template.document_limit:  # no token is shorter than a byte, but for a dummy prefix
            return template.rewrite_document(text), False
        _, spans = self._text.encode_spans(text, False)
        cut = len(spans) > template.document_limit
        return template.rewrite_document(text[: spans[template.document_limit - 1][1]] if cut else text), cut

    def _parts(
        self, item: npt.NDArray[np.int32] | _Run, values: Values, documents: list[str],
        found: dict[tuple[Any, ...], Tokens], spans: dict[tuple[str, str, str, bool], npt.NDArray[np.int32] | None],
    ) -> list[_Part]:  # fmt: skip
        if not isinstance(item, _Run):
            return [_Part(item)]
        parts: list[_Part] = []
        for step in item.steps or ():
            if isinstance(step, _Span):
                text = fill(step.pieces, values)
                if item.lstrip and isinstance(step.pieces[0], Slot) and step.pieces[0] is item.pieces[0]:
                    text = strip_left(text)
                if item.rstrip and isinstance(step.pieces[-1], Slot) and step.pieces[-1] is item.pieces[-1]:
                    text = strip_right(text)
                key = (step.left, text, step.right, step.anchored)
                if key not in spans:
                    ids = self._text.encode_between(*key)
                    spans[key] = None if ids is None else _int32(ids)
                fixed = spans[key]
                if fixed is None:
                    break
                parts.append(_Part(fixed))
            else:
                slot, unit = step
                tokens = found.get((_kind(slot, unit, item), documents[slot.index]))
                if tokens is None:
                    break
                parts.append(_Part(tokens.ids, slot.index, tokens.start, tokens.end, tokens.cut))
        if item.steps is None or len(parts) < len(item.steps) or not self._plain(item, values):
            return self._whole_run(item, values)
        return parts

    def _plain(self, run: _Run, values: Values) -> bool:
        """Whether stripping leaves the run's literals alone."""
        edges = [piece for piece in run.pieces if isinstance(piece, Slot) and (piece.before or piece.after)]
        if not edges and not run.lstrip and not run.rstrip:
            return True
        return run.texts(values)[1]

    def _whole_run(self, run: _Run, values: Values) -> list[_Part]:
        """The run tokenised as one text; its documents' own tokens are found by their places in it."""
        texts, _ = run.texts(values)
        ids, spans = self._text.encode_spans("".join(texts), run.anchored)
        parts: list[_Part] = []
        place = done = 0
        for piece, text in zip(run.pieces, texts, strict=True):
            start, place = place, place + len(text)
            if not isinstance(piece, Slot) or piece.name != "document":
                continue
            inside = [i for i in range(done, len(ids)) if spans[i][0] >= start and spans[i][1] <= place and text]
            first, last = (inside[0], inside[-1] + 1) if inside else (done, done)
            cut = values.documents.cut(piece.index) if isinstance(values.documents, _Prepared) else False
            parts.append(_Part(_int32(ids[done:last]), piece.index, first - done, last - done, cut))
            done = last
        return [*parts, _Part(_int32(ids[done:]))]

    # ---- labels and checks

    def _label_id(self, label: str) -> int:
        marker = self._text.markers.get(label)
        if marker is not None:
            return marker.id
        if self.template.model == "seq2seq":
            before, anchored = self.template.decoder, False
        else:
            before, anchored = self._last_text()
        alone, behind = self._text.encode([before, before + label], anchored)
        if behind[:-1] != alone:
            new = [self._text.tokenizer.id_to_token(token) for token in behind]
            raise ValueError(
                f"the label {label!r} of template {self.template.name!r} is not a single token of this tokenizer behind "
                f"{before[-20:]!r}: the tokens there are {new[-max(4, len(behind) - len(alone)) :]}"
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
        contents = [fill(turn.pieces, values) for turn in turns]
        if self.template.chat:
            messages = [{"role": turn.role, "content": text} for turn, text in zip(turns, contents, strict=True)]
            contents = [self._render(messages) + self._suffix]
        elif self._suffix:
            contents = [*contents, self._suffix] if self.template.segments else [contents[0] + self._suffix]
        ids: list[int] = []
        for text, specials in zip(contents, self._specials, strict=False):
            ids += [*specials, *self._whole.encode(text, add_special_tokens=False).ids]
        return [*ids, *self._specials[-1]]


class _Prepared(Sequence[str]):
    """Documents as the template prints them, prepared when they are asked for."""

    def __init__(self, owner: PromptTokenizer, documents: list[str], memo: dict[str, tuple[str, bool]]) -> None:
        self._owner, self._documents, self._memo = owner, documents, memo

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: Any) -> Any:
        return self._get(index)[0]

    def cut(self, index: int) -> bool:
        return self._get(index)[1]

    def _get(self, index: int) -> tuple[str, bool]:
        document = self._documents[index]
        if document not in self._memo:
            self._memo[document] = self._owner._prepare(document)
        return self._memo[document]


def _kind(slot: Slot, unit: Unit, run: _Run) -> tuple[Any, ...]:
    """What a document's ids depend on beside its text: its unit, and what is stripped off its sides."""
    left, right = unit.key[0] is None and run.lstrip, unit.key[1] is None and run.rstrip
    return (unit.key, slot.lstrip, slot.rstrip, left, right)


def _strip(text: str, kind: tuple[Any, ...]) -> str:
    _, lstrip, rstrip, left, right = kind
    text = text.lstrip() if lstrip else text
    text = text.rstrip() if rstrip else text
    text = strip_left(text) if left else text
    return strip_right(text) if right else text


def _fit(
    parts: list[_Part], count: int, limit: int | None, name: str
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """Join the parts, the longest documents cut evenly to `limit` tokens in all; (T,) and (count,) which were cut."""
    truncated = np.zeros(count, np.bool_)
    sizes: dict[int, int] = {}
    for part in parts:
        if part.document >= 0:
            truncated[part.document] = part.cut
            sizes[part.document] = part.end - part.start
    total = sum(len(part.ids) for part in parts)
    if limit is not None and total > limit:
        room = limit - (total - sum(sizes.values()))
        least = sum(min(1, size) for size in sizes.values())
        if room < least:
            raise ValueError(
                f"the query and the fixed text of template {name!r} leave no room for the documents: the prompt exceeds "
                f"its limit of {limit} tokens by {least - room} even with one token per document"
            )
        keep = _share(sizes, room)
        cut: list[_Part] = []
        for part in parts:
            if part.document >= 0 and keep[part.document] < sizes[part.document]:
                truncated[part.document] = True
                kept = part.ids[: part.start + keep[part.document]]
                cut.append(_Part(np.concatenate([kept, part.ids[part.end :]])))
            else:
                cut.append(part)
        parts = cut
    return np.concatenate([part.ids for part in parts] or [_int32([])]), truncated


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


def _int32(ids: Sequence[int]) -> npt.NDArray[np.int32]:
    return np.fromiter(ids, np.int32, len(ids))


def _check_limit(max_length: int) -> int:
    if isinstance(max_length, bool) or not isinstance(max_length, (int, np.integer)):
        raise TypeError(f"max_length must be an int or None, got {type(max_length).__name__}")
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}")
    return int(max_length)
