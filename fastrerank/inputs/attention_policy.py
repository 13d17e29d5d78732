"""What the methods that read attention differ in, as data: texts, order, which tokens and rows count, which heads."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["HeadList", "Layout", "Policy", "layout_of", "parse_heads", "read_preset", "write_preset"]

_FOLDER = Path(__file__).parent / "attention"
PRESETS = ("icr", "qrhead", "core")


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
        words: documents are cut to so many words; None for no limit.
        strip_query: whether white space around the query is taken off.
        separator: what stands between paragraphs; "" for the layout's.
        instruction: the name of the usual one in `instructions`.
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
    words: int | None
    strip_query: bool
    instruction: str
    instructions: Mapping[str, str]
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
        raw = tomllib.loads((_FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
        lists = tuple(
            HeadList(one["name"], one["model"], one["layers"], parse_heads(one["heads"]))
            for one in raw.pop("lists", ())
        )
        return cls(name=name, lists=lists, **(raw | {"instructions": MappingProxyType(raw["instructions"])}))

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


def layout_of(model_type: str, tokens: Mapping[str, Any], chat_template: str | None) -> Layout | None:
    """The published layout of a family, by its config's model_type, its tokens and its chat template; None without."""
    raw = tomllib.loads((_FOLDER / "layouts.toml").read_text(encoding="utf-8"))
    names = {one.name for one in fields(Layout)}
    for one in raw["layouts"]:
        if any(token not in tokens for token in one.get("requires", ())):
            continue
        if model_type not in one.get("model_types", [model_type]) or one.get("chat", "") not in (chat_template or ""):
            continue
        return Layout(**{key: value for key, value in one.items() if key in names})
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
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw.get("heads"), str):
            raise ValueError('it needs a line such as heads = "13-18,14-31"')
        heads = parse_heads(raw["heads"])
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path} is no preset file: {error}") from error
    return {**raw, "heads": heads}


def write_preset(path: Path, heads: Sequence[tuple[int, int]], about: Mapping[str, str | int | float]) -> None:
    """Write a preset file: the heads, best first, and what is to be known about them."""
    lines = [f"{name} = {_toml(value)}" for name, value in about.items()]
    lines.append(f'heads = "{",".join(f"{layer}-{head}" for layer, head in heads)}"')
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _toml(value: str | int | float) -> str:
    if isinstance(value, str):
        escaped = "".join(f"\\u{ord(c):04x}" if ord(c) < 32 or c in '"\\' or ord(c) == 127 else c for c in value)
        return f'"{escaped}"'
    return repr(value)
