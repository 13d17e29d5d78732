"""Values of --alias and --label, and checks of the names and labels of served models."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from fastrerank.rerankers.refusal import OptionRefused
from fastrerank.serve.batching.batcher import AsyncReranker

__all__ = ["check_labels", "hub_names", "parse_aliases", "parse_labels"]

_HUB_ID = re.compile(r"[\w.-]+/([\w.-]+)")


def hub_names(models: Mapping[str, str]) -> dict[str, str]:
    """Return {alias: name} for checkpoints of the hub: their id and its last part, where one model alone has them.

    Args:
        models: {name: checkpoint}.

    Example:
        >>> hub_names({"base": "BAAI/bge-reranker-base"})
        {'BAAI/bge-reranker-base': 'base', 'bge-reranker-base': 'base'}
    """
    found: list[tuple[str, str]] = []
    for name, checkpoint in models.items():
        match = _HUB_ID.fullmatch(checkpoint)
        if match and not Path(checkpoint).exists():
            found += [(checkpoint, name), (match[1], name)]
    count = Counter(alias for alias, _ in found)
    return {alias: name for alias, name in found if count[alias] == 1 and alias not in models}


def parse_aliases(values: Sequence[str], names: Collection[str]) -> dict[str, str]:
    """Return {alias: name} of `--alias` values, "ALIAS=NAME".

    Raises ValueError for a name that is no model, and for an alias that is given twice or is a model's name.

    Example:
        >>> parse_aliases(["rerank-v3.5=small"], ["small"])
        {'rerank-v3.5': 'small'}
    """
    aliases: dict[str, str] = {}
    for value in values:
        alias, separator, name = value.rpartition("=")
        if not separator or not alias or not name:
            raise ValueError(f"--alias must be ALIAS=NAME, got {value!r}")
        if name not in names:
            raise ValueError(f"--alias {value}: no model is named {name!r}; one of {', '.join(names)}")
        if alias in names or aliases.get(alias, name) != name:
            raise ValueError(f"--alias {value}: {alias!r} is the name of another model")
        aliases[alias] = name
    return aliases


def parse_labels(values: Sequence[str], names: Collection[str]) -> dict[str, str | int]:
    """Return {model: label} of `--label` values: "LABEL" for all models, or "NAME=LABEL" for one.

    A label of digits is a number. Raises ValueError for two labels of one model.

    Example:
        >>> parse_labels(["1", "nli=entailment"], ["small", "nli"])
        {'nli': 'entailment', 'small': 1}
    """
    labels: dict[str, str | int] = {}
    common: list[str | int] = []
    for value in values:
        name, separator, label = value.partition("=")
        own = bool(separator) and name in names
        label = label if own else value
        if not label:
            raise ValueError(f"--label must be LABEL or NAME=LABEL, got {value!r}")
        parsed = int(label) if label.isascii() and label.isdigit() else label
        if own and name in labels:
            raise ValueError(f"--label {value}: {name!r} has the label {labels[name]!r} already")
        if own:
            labels[name] = parsed
        else:
            common.append(parsed)
    if len(common) > 1:
        raise ValueError(f"--label names {common[0]!r} and {common[1]!r} for all models: give NAME=LABEL for each")
    return labels | {name: common[0] for name in names if common and name not in labels}


def check_labels(models: Mapping[str, AsyncReranker]) -> None:
    """Raise ValueError for a model with several labels where none is known to rank."""
    for name, served in models.items():
        try:
            served.reranker.check_options()
        except ValueError as error:
            reason = error.reason if isinstance(error, OptionRefused) else error
            raise ValueError(
                f"model {name!r} cannot be served as it is: {reason}. Give the label when it is loaded: --label LABEL, "
                f"--label {name}=LABEL for this model alone, or label= in Python"
            ) from None
