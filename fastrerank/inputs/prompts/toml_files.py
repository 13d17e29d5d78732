"""One dialect of TOML for templates, attention policies and published checkpoints: strict, and errors name the file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Table", "read_toml"]


def read_toml(path: Path) -> dict[str, Any]:
    """Return the content of a TOML file; ValueError naming the file if it cannot be read as one."""
    try:
        raw: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable TOML file ({error})") from error
    return raw


class Table:
    """A table of a TOML file, checked against the fields of a dataclass.

    Args:
        path: the file. raw: the table.
        place: where the table stands in the file, such as "messages[0]."; it begins the names in errors.
    """

    def __init__(self, path: Path, raw: Mapping[str, Any], place: str = "") -> None:
        self.path, self.raw, self.place = path, raw, place

    def error(self, name: str, problem: str, valid: str) -> ValueError:
        """The error of a field: the file, the field, what is wrong and what is valid."""
        return ValueError(f"{self.path}: {self.place}{name} {problem}; valid is {valid}")

    def choose(self, name: str, value: Any, valid: tuple[str, ...]) -> None:
        """Raise ValueError unless `value` is one of `valid`."""
        if value not in valid:
            raise self.error(name, f"is {value!r}", f"one of {', '.join(map(repr, valid))}")

    def values(self, kind: type, **readers: Callable[[Any], Any]) -> dict[str, Any]:
        """Return the table as keyword arguments of the dataclass `kind`.

        A field is checked by its type: str, bool, int (at least 1), tuple of str, mapping of str. `readers` check and
        convert fields of other types. Raises ValueError for unknown fields, wrong types, and fields without a default
        that are missing, or an empty `source`; `name` may be missing.
        """
        known = {item.name: item for item in fields(kind)}
        found: dict[str, Any] = {}
        for name, value in self.raw.items():
            if name not in known:
                raise self.error(name, "is unknown", f"one of {', '.join(sorted(known))}")
            found[name] = readers[name](value) if name in readers else self._value(name, str(known[name].type), value)
        for name, item in known.items():
            required = item.default is MISSING and item.default_factory is MISSING and name != "name"
            if required and (name not in found or (name == "source" and not found[name])):
                raise self.error(name, "is missing", _VALID.get(str(item.type), "a value"))
        return found

    def tables(self, name: str, value: Any) -> list[Table]:
        """Return the tables of an array of tables."""
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self.error(name, f"is {value!r}", f"a list of [[{name}]] tables")
        return [Table(self.path, item, f"{self.place}{name}[{i}].") for i, item in enumerate(value)]

    def _value(self, name: str, kind: str, value: Any) -> Any:
        if kind.startswith("tuple"):
            right, valid = isinstance(value, list) and all(isinstance(one, str) for one in value), "a list of strings"
        elif kind.startswith("Mapping"):
            right, valid = isinstance(value, dict), "a table"
        elif kind == "bool":
            right, valid = isinstance(value, bool), "true or false"
        elif kind.startswith("int"):
            right, valid = isinstance(value, int) and not isinstance(value, bool) and value >= 1, _VALID["int"]
        else:
            right, valid = isinstance(value, str), "a string"
        if not right:
            raise self.error(name, f"is {value!r}", valid)
        if isinstance(value, list):
            return tuple(value)
        return MappingProxyType(value) if isinstance(value, dict) else value


_VALID = {"str": "a string", "int": "an integer of at least 1", "bool": "true or false"}
