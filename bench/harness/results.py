"""JSON of what a run found."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any


def write_json(findings: Any, path: Path, more: dict[str, Any] | None = None) -> None:
    """Write the dataclass `findings`, raw times (seconds) included, and the entries of `more` to `path`."""
    _write(asdict(findings) | (more or {}), path)


def write_precisions(findings: Any, path: Path, same: Callable[[Any, Any], bool]) -> None:
    """Write the dataclass `findings`; precisions that `path` has besides are kept if `same(old, new)` holds.

    `same` gets both as JSON holds them; `findings.results` has an entry per precision.
    """
    new: dict[str, Any] = json.loads(json.dumps(asdict(findings)))
    if path.exists():
        old = json.loads(path.read_text())
        if same(old, new):
            new["results"] = old["results"] | new["results"]
    _write(new, path)


def _write(found: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
