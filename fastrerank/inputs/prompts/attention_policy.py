"""Policies of the methods that read attention, as data: texts, order, the tokens, rows and heads that count."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fastrerank.inputs.prompts.template import check_rules
from fastrerank.inputs.prompts.toml_files import Table, read_toml

__all__ = ["HeadList", "Layout", "Policy", "layout_of", "parse_heads", "read_preset", "write_preset"]

_FOLDER = Path(__file__).parent / "attention"
PRESETS = ("icr", "qrhead", "core")
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "rows": ("all", "query"),
    "order": ("given", "reversed"),
    "heads": ("", "all"),
    "document_unit": ("words",),
}


@dataclass(frozen=True)
class HeadList:
    """Published heads of a model: `model` matches the beginning of its name, `layers` is how many it has."""

    name: str
    model: str
    layers: int
    heads: tuple[tuple[int, int], ...]

    def fits(self, names: Sequence[str], layers: Any) -> bool:
        """Whether a checkpoint goes by one of `names` and has as many layers."""
        return layers == self.layers and any(re.match(self.model, name.lower()) for name in names)


def _head_list(table: Table) -> HeadList:
    return HeadList(**table.values(HeadList, heads=parse_heads))


@dataclass(frozen=True)
class Policy:
    """A method that reads attention.

    Attributes:
        name: "icr", "qrhead" or "core". source, paper: where it was published.
        label: what names a paragraph; {number} counts from 1.
        label_in_span: whether the label's tokens count for the document.
        extra_token: whether the token behind a document counts for it, and the row behind the query is read.
        rows: "all" from the instruction to the end of the prompt, or "query": to the end of the query.
        order: "given", or "reversed": the first document stands last, next to the query.
        document_limit, document_unit, preprocess_query: as in `Template`; the unit is words.
        separator: what stands between paragraphs; "" for the layout's.
        instruction: the name of the default in `instructions`.
        heads: "all", or "" where the method needs a list. lists: the published ones.
    """

    name: str
    source: str
    paper: str
    label: str
    label_in_span: bool
    extra_token: bool
    rows: str
    order: str
    document_limit: int
    document_unit: str
    instruction: str
    instructions: Mapping[str, str]
    preprocess_query: tuple[str, ...] = ()
    separator: str = ""
    heads: str = ""
    lists: tuple[HeadList, ...] = ()

    @classmethod
    def load(cls, name: str) -> Policy:
        """Read a shipped policy by name; ValueError for an unknown one.

        Example:
            >>> Policy.load("core").label
            '[document {number}]'
        """
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
        path = _FOLDER / f"{name}.toml"
        table = Table(path, read_toml(path))
        values = table.values(cls, lists=lambda value: tuple(map(_head_list, table.tables("lists", value))))
        for field, valid in _CHOICES.items():
            table.choose(field, values.get(field, valid[0]), valid)
        check_rules(table, "preprocess_query", values.get("preprocess_query", ()))
        return cls(name=name, **values)

    @property
    def words(self) -> int:
        """Words of a document that are read."""
        return self.document_limit

    def known(self, names: Sequence[str], layers: Any) -> dict[str, tuple[tuple[int, int], ...]]:
        """The published head lists of a checkpoint by their names, the default first."""
        return {one.name: one.heads for one in self.lists if one.fits(names, layers)}


@dataclass(frozen=True)
class Layout:
    """What stands before and behind the user's text. `name` "chat": taken from the checkpoint's chat template.

    Attributes:
        separator: what stands between paragraphs.
        strips: whether white space around the user's text is taken off.
        bos: whether the tokenizer's own first tokens stand before the prefix.
        extra_token: False where the policies' `extra_token` does not hold.
    """

    name: str
    prefix: str
    suffix: str
    separator: str
    strips: bool = False
    bos: bool = True
    extra_token: bool = True


@dataclass(frozen=True)
class _Family(Layout):
    """A published layout and its conditions; one that is empty holds.

    Attributes:
        requires: tokens that the tokenizer has. model_types: of the checkpoint's config. chat: in its chat template.
    """

    requires: tuple[str, ...] = ()
    model_types: tuple[str, ...] = ()
    chat: str = ""


def layout_of(model_type: str, tokens: Mapping[str, Any], chat_template: str | None) -> Layout | None:
    """The published layout of a family, by its config's model_type, its tokens and its chat template; None without."""
    path = _FOLDER / "layouts.toml"
    for table in Table(path, {}).tables("layouts", read_toml(path).get("layouts")):
        one = _Family(**table.values(_Family))
        if (
            all(token in tokens for token in one.requires)
            and (not one.model_types or model_type in one.model_types)
            and one.chat in (chat_template or "")
        ):
            return Layout(*(getattr(one, field.name) for field in fields(Layout)))
    return None


def parse_heads(text: str) -> tuple[tuple[int, int], ...]:
    """Read "13-18,14-31" as ((13, 18), (14, 31)): layers and heads, both from 0; ValueError naming what is neither.

    Example:
        >>> parse_heads("13-18, 14-31")
        ((13, 18), (14, 31))
    """
    pairs = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)-(\d+)\s*", part)
        if match is None:
            raise ValueError(f"heads must be written layer-head,layer-head,... as in 13-18,14-31, got {part!r}")
        pairs.append((int(match[1]), int(match[2])))
    return tuple(pairs)


def read_preset(path: str | Path) -> dict[str, Any]:
    """Read a preset file as `fastrerank heads` writes it: {"heads": ((layer, head), ...), "preset"?, "model"?, ...}.

    Raises FileNotFoundError, and ValueError naming the file and what is wrong with it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"heads: there is no preset file {path}")
    try:
        raw = read_toml(path)
        if not isinstance(raw.get("heads"), str):
            raise ValueError('it needs a line such as heads = "13-18,14-31"')
        heads = parse_heads(raw["heads"])
    except ValueError as error:
        raise ValueError(f"{path} is no preset file: {error}") from error
    return {**raw, "heads": heads}


def write_preset(path: Path, heads: Sequence[tuple[int, int]], about: Mapping[str, str | int | float]) -> None:
    """Write a preset file: `heads`, best first, and the fields of `about`."""
    lines = [f"{name} = {_toml(value)}" for name, value in about.items()]
    lines.append(f'heads = "{",".join(f"{layer}-{head}" for layer, head in heads)}"')
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _toml(value: str | int | float) -> str:
    if isinstance(value, str):
        escaped = "".join(f"\\u{ord(c):04x}" if ord(c) < 32 or c in '"\\' or ord(c) == 127 else c for c in value)
        return f'"{escaped}"'
    return repr(value)
