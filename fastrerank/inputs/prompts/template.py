"""Prompts of published LLM rerankers, as data: one TOML file per template, read and checked here."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fastrerank.inputs.prompts.toml_files import Table, read_toml

__all__ = ["Message", "Template", "list_templates", "parse_format"]

_FOLDER = Path(__file__).with_name("templates")

_KINDS = ("pointwise", "pairwise", "setwise", "listwise")
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "kind": _KINDS,
    "readout": ("logits", "generate", "head"),
    "model": ("causal", "seq2seq"),
    "score": ("", "difference", "logit", "expectation"),
    "identifiers": ("", "alphabetic", "numeric"),
    "order": ("given", "reversed"),
    "document_unit": ("", "words", "tokens", "characters"),
    "special_tokens": ("auto", "bos", "none"),
    "content": ("text", "parts"),
    "algorithm": ("", "windows", "groups"),
}
# The last two are the roles that sentence-transformers gives to a pair, for chat templates that know them.
_ROLES = ("system", "user", "assistant", "query", "document")
_BODIES = ("messages", "text", "segments", "pair")
_TEXTS = frozenset({"query", "instruction", "count"})
# As in the published code: these rules run before a document is cut to its limit, the rewriting of identifiers after.
_RULES = ("fix-text", "drop-empty-title", "strip", "collapse-newlines")
_REWRITES: Mapping[str, re.Pattern[str]] = {
    "brackets-of-letters": re.compile(r"\[([A-z]+)\]"),  # A-z as published: it also holds [ \ ] ^ _ and `
    "brackets-of-digits": re.compile(r"\[(\d+)\]"),
}
_NEWLINES = re.compile("\n+")
# Single-token identifiers that exist: 26 letters, nine digits (10 is two tokens in most vocabularies).
MOST_IDENTIFIERS = {"alphabetic": 26, "numeric": 9}


@dataclass(frozen=True)
class Message:
    """One turn of a chat; a `repeat` turn is printed once per document."""

    role: str
    content: str
    repeat: bool = False


@dataclass(frozen=True)
class Template:
    """A prompt as published: roles and texts with placeholders, labels, limits. Data only.

    Attributes:
        name: the file's stem, or what its `name` says.
        kind: "pointwise", "pairwise", "setwise" or "listwise": how many documents a prompt holds (1, 2, a list).
        labels: label strings, the positive one first; () where identifiers are used or a head is read. One that begins
            with "▁" is a piece of the vocabulary by its own name.
        identifiers: "", "alphabetic" or "numeric": what names the documents of a list.
        readout: "logits" (labels or identifiers at the last position), "generate", or "head" (a scalar head).
        model: "causal", or "seq2seq": labels are read from the decoder, whose text starts with `decoder`.
        score: "difference" (first label minus second), "logit" (the one label), "expectation" (labels are numbers).
        messages, text, segments, pair: exactly one is given: chat turns for the checkpoint's own chat template; raw
            text tokenised as a whole; raw texts tokenised separately and concatenated; a pair for the tokenizer.
        content: what a chat template gets as a turn's content: "text", or "parts", a list of one {"type": "text"}.
        suffix: text behind the prompt where logits or a head are read; `generation_suffix` where text is generated.
        max_new_tokens, stop: most tokens of a written answer (None: enough to name each document), and what ends it.
        algorithm: how a listwise template is asked: "windows", or "groups" whose scores are written as JSON; "" for
            windows.
        source, paper: where the wording was published.

    Example:
        >>> template = Template.load("qwen3-reranker")
        >>> template.kind, template.labels
        ('pointwise', ('yes', 'no'))
    """

    name: str
    kind: str
    source: str
    paper: str = ""
    notice: str = ""
    readout: str = "logits"
    model: str = "causal"
    score: str = ""
    labels: tuple[str, ...] = ()
    identifiers: str = ""
    most_documents: int | None = None
    identifier_label: str = "{identifier}"
    messages: tuple[Message, ...] = ()
    text: str = ""
    segments: tuple[str, ...] = ()
    pair: tuple[str, ...] = ()
    suffix: str = ""
    generation_suffix: str = ""
    decoder: str = ""
    instruction: str = ""
    instruction_format: str = "{instruction}"
    document: str = "{document}"
    separator: str = ""
    order: str = "given"
    document_limit: int | None = None
    document_unit: str = ""
    max_length: int | None = None
    preprocess: tuple[str, ...] = ()
    preprocess_query: tuple[str, ...] = ()
    system_joiner: str | None = None
    special_tokens: str = "auto"
    content: str = "text"
    requires: tuple[str, ...] = ()
    chat_options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    # These change no prompt. repr=False keeps them out of fingerprints, so that saved indexes stay valid.
    max_new_tokens: int | None = field(default=None, repr=False)
    stop: tuple[str, ...] = field(default=(), repr=False)
    algorithm: str = field(default="", repr=False)

    def __repr__(self) -> str:
        return f"Template({self.name!r}, kind={self.kind!r}, readout={self.readout!r})"

    @property
    def chat(self) -> bool:
        """Whether the checkpoint's own chat template renders the prompt."""
        return bool(self.messages)

    @property
    def uses_notes(self) -> bool:
        """Whether the prompt prints a note per document."""
        return any("note" in _placeholders(text) for text in self._printed())

    @property
    def uses_instruction(self) -> bool:
        """Whether the prompt prints an instruction."""
        return any("instruction" in _placeholders(text) for text in self._printed())

    @classmethod
    def load(cls, name_or_path: str | Path) -> Template:
        """Read a shipped template by name, or anyone's TOML file by its path.

        Raises ValueError for an unknown name (it lists the known ones) and for a file that is wrong (it names the
        file, the field, what came and what is valid); FileNotFoundError for a path without a file.
        """
        if not isinstance(name_or_path, (str, Path)):
            raise TypeError(f"a template is named by a str or a Path, got {type(name_or_path).__name__}")
        shipped = _FOLDER / f"{name_or_path}.toml"
        looks_like_path = isinstance(name_or_path, Path) or name_or_path.endswith(".toml") or "/" in name_or_path
        if not looks_like_path:
            if not shipped.is_file():
                known = ", ".join(sorted(file.stem for file in _FOLDER.glob("*.toml")))
                raise ValueError(f"unknown template {name_or_path!r}: it must be one of {known}, or a path to a .toml")
            return _read(shipped)
        path = Path(name_or_path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no template file {path}")
        return _read(path)

    def identifier(self, position: int) -> str:
        """The identifier of the document at `position` of a list: A, B, ... or 1, 2, ...; "" where there are none."""
        if self.identifiers == "alphabetic":
            if position >= 26:
                raise ValueError(_too_many(self, position + 1))
            return string.ascii_uppercase[position]
        return str(position + 1) if self.identifiers == "numeric" else ""

    def identifier_labels(self, count: int) -> tuple[str, ...]:
        """The first `count` identifiers as labels; ValueError with the reason where they are no single tokens."""
        if not self.identifiers:
            raise ValueError(f"template {self.name!r} names its documents by no identifiers")
        most = MOST_IDENTIFIERS[self.identifiers]
        if self.most_documents is not None:
            most = min(most, self.most_documents)
        if not 1 <= count <= most:
            raise ValueError(_too_many(self, count) if count > most else f"count must be at least 1, got {count}")
        return tuple(self.identifier_label.replace("{identifier}", self.identifier(i)) for i in range(count))

    def prepare_query(self, query: str) -> str:
        """The query after the published rewriting."""
        return apply_rules(query, self.preprocess_query)

    def prepare_document(self, text: str) -> tuple[str, bool]:
        """The document after the published rules and its limit in words or characters, and whether that cut it.

        A limit in tokens needs a tokenizer: PromptTokenizer applies it between `clean_document` and `rewrite`.
        """
        text = self.clean_document(text)
        cut = False
        if self.document_limit is not None and self.document_unit == "words":
            words = text.split(None, self.document_limit)
            cut = len(words) > self.document_limit
            text = " ".join(words[: self.document_limit])
        elif self.document_limit is not None and self.document_unit == "characters":
            cut = len(text) > self.document_limit
            text = text[: self.document_limit]
        return self.rewrite_document(text), cut

    def clean_document(self, text: str) -> str:
        """The document after the rules that come before its limit."""
        return _clean(text, self.preprocess)

    def rewrite_document(self, text: str) -> str:
        """The document with its own bracketed identifiers rewritten: [3] becomes (3)."""
        return _rewrite(text, self.preprocess)

    def _printed(self) -> tuple[str, ...]:
        body = tuple(message.content for message in self.messages)
        return (*body, self.text, *self.segments, *self.pair, self.document)


def list_templates(kind: str | None = None) -> dict[str, str]:
    """Names of the shipped templates (of one kind), and where each was published.

    Example:
        >>> sorted(list_templates("pairwise"))
        ['duot5', 'prp', 'prp-t5']
    """
    if kind is not None and kind not in _KINDS:
        raise ValueError(f"kind must be one of {', '.join(_KINDS)}, got {kind!r}")
    templates = [_read(file) for file in sorted(_FOLDER.glob("*.toml"))]
    return {template.name: template.source for template in templates if kind in (None, template.kind)}


def parse_format(text: str) -> list[tuple[str, str | None]]:
    """`text` as (literal, placeholder behind it or None); `{{` and `}}` are braces. ValueError if it is malformed.

    Example:
        >>> parse_format("Query: {query} {{0}}")
        [('Query: ', 'query'), (' {', None), ('0}', None)]
    """
    parts: list[tuple[str, str | None]] = []
    for literal, name, spec, conversion in string.Formatter().parse(text):
        if spec or conversion or (name is not None and not name.isidentifier()):
            raise ValueError(f"{{{name}}} is no placeholder: a brace of the text itself is written {{{{ or }}}}")
        parts.append((literal, name))
    return parts


def apply_rules(text: str, rules: tuple[str, ...]) -> str:
    """Return a text after all rules of `preprocess` or `preprocess_query`.

    Example:
        >>> apply_rules(" [3] x ", ("strip", "brackets-of-digits"))
        '(3) x'
    """
    return _rewrite(_clean(text, rules), rules)


def check_rules(table: Table, name: str, rules: tuple[str, ...]) -> None:
    """Raise ValueError naming the file and the rule unless every rule is known."""
    for rule in rules:
        if rule not in _RULES and rule not in _REWRITES:
            raise table.error(name, f"holds {rule!r}", f"any of {', '.join([*_RULES, *_REWRITES])}")


def _placeholders(text: str) -> list[str]:
    return [name for _, name in parse_format(text) if name is not None]


def _clean(text: str, rules: tuple[str, ...]) -> str:
    for rule in rules:
        if rule == "fix-text":
            text = _fix_text(text)
        elif rule == "drop-empty-title":
            text = text.replace("Title: Content: ", "")
        elif rule == "strip":
            text = text.strip()
        elif rule == "collapse-newlines":
            text = _NEWLINES.sub(" ", text)
    return text


def _rewrite(text: str, rules: tuple[str, ...]) -> str:
    for rule in rules:
        if rule in _REWRITES:
            text = _REWRITES[rule].sub(r"(\1)", text)
    return text


def _fix_text(text: str) -> str:
    try:
        from ftfy import fix_text
    except ImportError as error:
        raise ImportError('the template\'s rule "fix-text" needs ftfy: pip install ftfy, or drop the rule') from error
    return str(fix_text(text))


def _too_many(template: Template, count: int) -> str:
    reason = {
        "alphabetic": "there are 26 letters, and only a single letter is a single token",
        "numeric": "only the digits 1 to 9 are single tokens",
    }[template.identifiers]
    if template.most_documents is not None and template.most_documents < MOST_IDENTIFIERS[template.identifiers]:
        return f"template {template.name!r} names at most {template.most_documents} documents, got {count}"
    return f"template {template.name!r} cannot name {count} documents by logits: {reason}; use smaller windows"


def _read(path: Path) -> Template:
    return _Checker(path, read_toml(path)).template()


class _Checker(Table):
    """Checks every field of a template file: its type, its values, and that it fits the other fields."""

    def template(self) -> Template:
        values = {"name": self.path.stem} | self.values(Template, messages=self._messages)
        for name, valid in _CHOICES.items():
            if name in values:
                self.choose(name, values[name], valid)
        for name in ("preprocess", "preprocess_query"):
            check_rules(self, name, values.get(name, ()))
        template = Template(**values)
        self._check_body(template)
        self._check_fields(template)
        return template

    def _messages(self, value: Any) -> tuple[Message, ...]:
        messages: list[Message] = []
        for position, table in enumerate(self.tables("messages", value)):
            message = Message(**table.values(Message))
            if message.role not in _ROLES:
                raise table.error("role", f"is {message.role!r}", f"one of {', '.join(_ROLES)}")
            if message.role == "system" and position:
                raise table.error("role", "is a second or late system turn", "one system turn, the first")
            messages.append(message)
        return tuple(messages)

    def _check_body(self, template: Template) -> None:
        given = [name for name in _BODIES if getattr(template, name)]
        if len(given) != 1:
            came = "none" if not given else " and ".join(given)
            raise ValueError(f"{self.path}: exactly one of {', '.join(_BODIES)} must be given, got {came}")
        if template.pair and len(template.pair) != 2:
            raise self.error("pair", f"has {len(template.pair)} texts", "two: the query's, the document's")
        several = template.kind in ("setwise", "listwise")
        whole = {"pointwise": {"document"}, "pairwise": {"document_a", "document_b"}}.get(template.kind, {"documents"})
        block = {"document", "identifier", "note"}
        seen: list[str] = []
        repeats = any(message.repeat for message in template.messages)
        if repeats and not several:
            raise self.error("messages", "repeat a turn per document", "that in a setwise or listwise template only")
        allowed = _TEXTS | (set() if repeats else whole) | ({"note"} if template.kind == "pointwise" else set())
        for place, text, names in [
            *(
                (f"messages[{i}].content", m.content, block | {"count"} if m.repeat else allowed)
                for i, m in enumerate(template.messages)
            ),
            ("text", template.text, allowed),
            *((f"segments[{i}]", text, allowed) for i, text in enumerate(template.segments)),
            *((f"pair[{i}]", text, allowed) for i, text in enumerate(template.pair)),
        ]:
            seen += self._check_names(place, text, names)
        for name in {"query"} | ({"document"} if repeats else whole):
            if name not in seen:
                raise ValueError(f"{self.path}: no text has the placeholder {{{name}}}")
            if name != "query" and seen.count(name) != 1:
                raise ValueError(
                    f"{self.path}: the placeholder {{{name}}} must stand once, it stands {seen.count(name)} x"
                )
        printed = self._check_names("document", template.document, block)
        if "document" in self.raw and (not several or repeats):
            raise self.error("document", "is given", "only where {documents} stands for a list")
        if printed.count("document") != 1:
            raise self.error("document", f"is {template.document!r}", "a text with {document} once")
        if self._check_names("identifier_label", template.identifier_label, {"identifier"}) != ["identifier"]:
            raise self.error("identifier_label", f"is {template.identifier_label!r}", "a text with {identifier} once")
        self._check_names("instruction_format", template.instruction_format, {"instruction"})

    def _check_names(self, place: str, text: str, allowed: set[str] | frozenset[str]) -> list[str]:
        try:
            names = _placeholders(text)
        except ValueError as error:
            raise ValueError(f"{self.path}: {place}: {error}") from error
        for name in names:
            if name not in allowed:
                raise self.error(
                    place, f"has the placeholder {{{name}}}", ", ".join(f"{{{n}}}" for n in sorted(allowed))
                )
        return names

    def _check_fields(self, template: Template) -> None:
        if (template.document_limit is None) != (not template.document_unit):
            raise self.error("document_unit", f"is {template.document_unit!r}", "given together with document_limit")
        several = template.kind in ("setwise", "listwise")
        if several != bool(template.identifiers):
            valid = "alphabetic or numeric" if several else "absent"
            raise self.error("identifiers", f"is {template.identifiers!r} in a {template.kind} template", valid)
        if several and template.labels:
            raise self.error("labels", "is given", "identifiers only, for a list of documents")
        if not several and template.readout == "logits" and not template.labels:
            raise self.error("labels", "is missing", "the label strings whose logits are read")
        if template.readout == "head" and (template.labels or several):
            raise self.error("readout", 'is "head"', "that for one document and without labels")
        if len(set(template.labels)) != len(template.labels) or "" in template.labels:
            raise self.error("labels", f"is {list(template.labels)!r}", "different, non-empty strings")
        least = {"difference": 2, "logit": 1}.get(template.score)
        if least is not None and len(template.labels) != least:
            raise self.error("score", f"is {template.score!r} of {len(template.labels)} labels", f"{least} labels")
        if template.score == "expectation" and not all(label.strip().isdecimal() for label in template.labels):
            raise self.error("score", 'is "expectation"', "labels that are numbers")
        if template.system_joiner is not None and not (template.messages and template.messages[0].role == "system"):
            raise self.error("system_joiner", "is given", "that with a system turn only")
        if template.chat_options and not template.messages:
            raise self.error("chat_options", "is given", "that with messages only")
        if template.content != "text" and not template.messages:
            raise self.error("content", f"is {template.content!r}", '"text" without messages')
        if template.messages and template.special_tokens == "bos":
            raise self.error("special_tokens", 'is "bos"', '"auto" or "none" with messages')
        if template.pair and template.special_tokens != "auto":
            raise self.error("special_tokens", f"is {template.special_tokens!r}", '"auto" with a pair')
        if template.decoder and template.model != "seq2seq":
            raise self.error("decoder", "is given", 'that with model = "seq2seq" only')
        if template.algorithm and template.kind != "listwise":
            raise self.error("algorithm", f"is {template.algorithm!r}", "that in a listwise template only")
        if template.suffix and template.pair:
            raise self.error("suffix", "is given", "none with a pair")
