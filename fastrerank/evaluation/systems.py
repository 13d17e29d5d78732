"""What is compared: checkpoints with the options they are loaded with, rerankers that exist already, and TREC runs."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from fastrerank.data.datasets import Run
from fastrerank.evaluation.reranking import Ranker
from fastrerank.inputs.prompts.attention_policy import parse_heads
from fastrerank.rerankers.options import load_keywords
from fastrerank.rerankers.registry import list_methods

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["FIRST_STAGE", "System", "as_system", "check_names", "parse_run", "parse_system", "read_systems"]

FIRST_STAGE = "first-stage"
_TEXTS = ("method", "dtype", "device", "template", "instruction", "revision", "engine", "heads")
_SPELLINGS = {"threads": "num_threads"}


@dataclass(frozen=True)
class System:
    """One row of a comparison: a checkpoint, a reranker object, or a run; exactly one of the three.

    Attributes:
        name: what tables, plots and files call it.
        model: hub id or local folder, for `fastrerank.load`, in a process of its own.
        options: keywords of `fastrerank.load`: method, dtype, device, engine, template, ...
        ranker: an object with `rank`, used in this process.
        run: a TREC run file, or query id -> (document id, score) pairs, best first.
    """

    name: str
    model: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    ranker: Ranker | None = None
    run: str | os.PathLike[str] | Run | None = None

    def __post_init__(self) -> None:
        if not self.name.strip() or any(ord(character) < 32 or character in "/\\" for character in self.name):
            raise ValueError(f"a system's name must be a text without slashes and control characters: {self.name!r}")
        if sum(part is not None for part in (self.model, self.ranker, self.run)) != 1:
            raise ValueError(f"system {self.name!r} must be one of model=, ranker= and run=")
        if "token" in self.options:
            raise ValueError(f"system {self.name!r}: a token would be kept in the results; set HF_TOKEN instead")
        if (method := self.options.get("method")) not in (None, *list_methods()):
            raise ValueError(f"system {self.name!r}: method must be one of {', '.join(list_methods())}, got {method!r}")

    @property
    def about(self) -> dict[str, Any]:
        """What the results say of it: {"model", "options"}, {"run"} or {"ranker"}, JSON-ready."""
        if self.model is not None:
            return {"model": self.model, "options": {key: _plain(value) for key, value in self.options.items()}}
        if self.ranker is not None:
            return {"ranker": type(self.ranker).__qualname__}
        return {"run": "given" if isinstance(self.run, Mapping) else os.fspath(cast("str", self.run))}


def as_system(name: str, value: Any) -> System:
    """Return the System of `compare`'s entry: a checkpoint, {"model": ..., options}, {"run": file}, a run, a reranker.

    Raises TypeError naming the entry if it is none of these.

    Example:
        >>> as_system("int8", {"model": "BAAI/bge-reranker-base", "dtype": "int8"}).options
        {'dtype': 'int8'}
    """
    if isinstance(value, System):
        return value
    if isinstance(value, (str, os.PathLike)):
        return System(name, model=os.fspath(value))
    if isinstance(value, Mapping):
        if isinstance(model := value.get("model"), (str, os.PathLike)):
            return System(name, model=os.fspath(model), options={k: v for k, v in value.items() if k != "model"})
        if isinstance(run := value.get("run"), (str, os.PathLike)):
            if len(value) > 1:
                raise ValueError(f"system {name!r}: a run has no options, got {', '.join(value.keys() - {'run'})}")
            return System(name, run=run)
        if value and all(isinstance(hits, Sequence) and not isinstance(hits, str) for hits in value.values()):
            return System(name, run=dict(value))
    elif hasattr(value, "rank"):
        return System(name, ranker=value)
    raise TypeError(
        f"system {name!r} must be a checkpoint, a dict with model or run, a run (query id -> hits) or an object with "
        f"rank(), got {type(value).__name__}"
    )


def parse_system(text: str, defaults: Mapping[str, Any] | None = None) -> System:
    """Return the System of "[NAME=]CHECKPOINT[,KEY=VALUE...]".

    Without NAME it is the checkpoint's last part and the values that follow. `defaults` are options that hold where the
    text does not say them. Numbers, true and false become Python's.

    Raises ValueError for an empty checkpoint, an option without a value, or one that the method does not know.

    Example:
        >>> parse_system("small=BAAI/bge-reranker-base,dtype=int8,max_length=256").options
        {'dtype': 'int8', 'max_length': 256}
    """
    # a comma splits only before another KEY=, so that values such as heads=13-18,14-31 stay whole
    first, *rest = re.split(r",(?=\w+=)", text)
    name, separator, model = first.partition("=")
    if not separator or "/" in name:
        name, model = "", first
    if not model:
        raise ValueError(f"--model must be [NAME=]CHECKPOINT[,KEY=VALUE...], got {text!r}")
    options: dict[str, Any] = {}
    for item in rest:
        key, _, value = item.partition("=")
        if not value:
            raise ValueError(f"--model {text!r}: {key} has no value")
        options[_SPELLINGS.get(key, key)] = _typed(key, value)
    _check_options(options, {**(defaults or {}), **options}.get("method"), f"--model {text!r}")
    name = name or " ".join([Path(model).name, *(item.partition("=")[2] for item in rest)])
    return System(name, model=model, options={**(defaults or {}), **options})


def parse_run(text: str) -> System:
    """Return the System of "[NAME=]FILE", a TREC run; without NAME it is the file's name without its ending.

    Example:
        >>> parse_run("runs/bm25.trec").name
        'bm25'
    """
    name, separator, path = text.partition("=")
    if not separator or "/" in name:
        name, path = Path(text).name.removesuffix(".gz").rpartition(".")[0] or Path(text).name, text
    if not path:
        raise ValueError(f"--with-run must be [NAME=]FILE, got {text!r}")
    return System(name, run=path)


def read_systems(path: str | os.PathLike[str], defaults: Mapping[str, Any] | None = None) -> list[System]:
    """Read systems from a TOML file: a table [systems.NAME] each, with model and its options, or with run.

    A run's path is relative to the file, and so is a model's where it begins with a dot.

    Raises ValueError naming the file and what is wrong with it.

    Example:
        >>> read_systems("systems.toml")                                                 # doctest: +SKIP
        [System(name='small', model='BAAI/bge-reranker-base', options={'dtype': 'int8'}, ranker=None, run=None)]
    """
    path = Path(path)
    try:
        tables = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as TOML: {error}") from error
    entries = tables.get("systems")
    if not isinstance(entries, dict) or not entries or set(tables) != {"systems"}:
        raise ValueError(f"{path} must hold tables [systems.NAME] and nothing else, it holds {', '.join(tables)}")
    systems = []
    for name, entry in entries.items():
        try:
            if not isinstance(entry, dict) or not isinstance(entry.get("model", entry.get("run")), str):
                raise ValueError(f"[systems.{name}] must have model or run, a text")
            entry = {_SPELLINGS.get(key, key): value for key, value in entry.items()}
            if "run" not in entry:
                own = {key: value for key, value in entry.items() if key != "model"}
                _check_options(own, {**(defaults or {}), **own}.get("method"), f"[systems.{name}]")
            if "run" in entry:
                entry["run"] = path.parent / entry["run"]
            elif entry["model"].startswith("."):
                entry["model"] = path.parent / entry["model"]
            if isinstance(entry.get("heads"), str):
                entry["heads"] = _typed("heads", entry["heads"])
            systems.append(as_system(name, entry if "run" in entry else {**(defaults or {}), **entry}))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return systems


def check_names(systems: Sequence[System]) -> None:
    """Raise ValueError where two systems have one name, or names that make one file name."""
    seen: dict[str, str] = {}
    for system in systems:
        file = file_name(system.name)
        if file in seen:
            raise ValueError(
                f"systems {seen[file]!r} and {system.name!r} have one name (in files: {file}); say NAME=... of one"
            )
        seen[file] = system.name


def file_name(name: str) -> str:
    """Return `name` as a file name and a TREC tag: what is no letter, digit, dot, plus or minus becomes _."""
    return re.sub(r"[^\w.+-]+", "_", name)


def _check_options(options: Mapping[str, Any], method: Any, where: str) -> None:
    """Raise ValueError naming the valid ones if an option is no keyword of the method, or of any where none is said."""
    known = {*load_keywords(method if method in list_methods() else None), "method"}
    if unknown := [key for key in options if key not in known]:
        spellings = {name: spelling for spelling, name in _SPELLINGS.items()}
        valid = ", ".join(sorted(spellings.get(name, name) for name in known - {"token"}))
        whose = f"method {method}" if method in list_methods() else "any method"
        raise ValueError(f"{where}: {unknown[0]!r} is no option of {whose}; one of {valid}")


def _typed(key: str, value: str) -> Any:
    if key == "heads" and re.fullmatch(r"[\d\s,-]+", value):
        return parse_heads(value)
    if key in _TEXTS or (key == "label" and not (value.isascii() and value.isdigit())):
        return value  # a label may be called true
    if value in ("true", "false"):
        return value == "true"
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
