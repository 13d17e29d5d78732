"""Published checkpoints, as data: one TOML file for each, with the names it goes by and what it was trained with."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from fastrerank.inputs.prompts import Template

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Published", "find_published", "read_published"]

_FOLDER = Path(__file__).with_suffix("")
# What a checkpoint may have otherwise than its prompt's file says.
_OVERRIDES = {"labels": "list", "stop": "list", "instruction": "str", "max_length": "int", "new_tokens": "int"}


@dataclass(frozen=True)
class Published:
    """A published checkpoint, or a family of them that differ in size.

    Attributes:
        file: the file's stem.
        names: patterns of what it goes by, without the owner, in small letters, matched at the beginning of a name. The
            longest match of all files decides.
        method: the method that it was trained for.
        prompt: the name of the template that it was trained with.
        source: where it was published.
        architectures: classes in config.json that only this checkpoint has; they decide before names do.
        scores_pairs: whether a cross-encoder reads its answer yes or no as the score of a pair.
        labels, stop, instruction, max_length, new_tokens: replace the template's.
    """

    file: str
    names: tuple[str, ...]
    method: str
    prompt: str
    source: str
    architectures: tuple[str, ...] = ()
    scores_pairs: bool = False
    labels: tuple[str, ...] | None = None
    stop: tuple[str, ...] | None = None
    instruction: str | None = None
    max_length: int | None = None
    new_tokens: int | None = None

    @property
    def template(self) -> Template:
        """Return the prompt template with what this checkpoint has otherwise."""
        changes: dict[str, Any] = {name: getattr(self, name) for name in _OVERRIDES}
        return replace(
            Template.load(self.prompt), **{name: value for name, value in changes.items() if value is not None}
        )


def read_published(path: Path) -> Published:
    """Read a file of a published checkpoint.

    Raises ValueError naming the file, the field, what came and what is valid.

    Example:
        >>> read_published(_FOLDER / "qwen3-reranker.toml").method
        'pointwise'
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable TOML file ({error})") from error
    kinds = {one.name: str(one.type) for one in fields(Published) if one.name not in ("file", "prompt")}
    kinds["template"] = "str"
    values: dict[str, Any] = {}
    for name, value in raw.items():
        if name not in kinds:
            raise ValueError(f"{path}: {name} is unknown; valid is one of {', '.join(sorted(kinds))}")
        values[name] = _checked(path, name, kinds[name], value)
    for name in ("names", "method", "template", "source"):
        if not values.get(name):
            raise ValueError(f"{path}: {name} is missing; valid is a non-empty one")
    for pattern in values["names"]:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{path}: names holds {pattern!r}, which is no pattern ({error})") from error
        if pattern != pattern.lower() or "/" in pattern:
            raise ValueError(f"{path}: names holds {pattern!r}; valid are names in small letters without an owner")
    found = Published(path.stem, prompt=values.pop("template"), **values)
    if found.template.kind != found.method:
        raise ValueError(f"{path}: template {found.prompt!r} is {found.template.kind}, and method is {found.method!r}")
    return found


def _checked(path: Path, name: str, kind: str, value: Any) -> Any:
    if kind.startswith("tuple"):
        if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
            raise ValueError(f"{path}: {name} is {value!r}; valid is a list of strings")
        return tuple(value)
    wanted: type[bool | int | str] = bool if kind == "bool" else int if kind.startswith("int") else str
    if type(value) is not wanted or (type(value) is int and value < 1):
        valid = {bool: "true or false", int: "an integer of at least 1", str: "a string"}[wanted]
        raise ValueError(f"{path}: {name} is {value!r}; valid is {valid}")
    return value


@lru_cache(maxsize=1)
def _all() -> tuple[Published, ...]:
    return tuple(read_published(path) for path in sorted(_FOLDER.glob("*.toml")))


def find_published(names: list[str], architectures: list[str]) -> Published | None:
    """Return the published checkpoint with one of these classes, or whose names fit the first name that any fits.

    Args:
        names: what a checkpoint goes by, in small letters, the most telling first.
        architectures: the classes in its config.json.

    Example:
        >>> find_published(["qwen3-reranker-0.6b"], []).template.name
        'qwen3-reranker'
    """
    for one in _all():
        if any(name in one.architectures for name in architectures):
            return one
    for name in names:
        fits = [(match.end(), one) for one in _all() for pattern in one.names if (match := re.match(pattern, name))]
        if fits:
            return max(fits, key=lambda fit: fit[0])[1]
    return None
