"""Which method and prompt a checkpoint was trained for: by its configuration files and its name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from fastrerank.checkpoints.checkpoint import Checkpoint
from fastrerank.inputs.prompts.toml_files import Table, read_toml

__all__ = [
    "Published",
    "is_classifier",
    "is_layerwise",
    "is_yes_no",
    "logit_score",
    "method_of",
    "names_of",
    "other_training",
    "published_checkpoints",
    "read_published",
    "recognised_template",
]

_LAYERWISE = "LayerWiseMiniCPMForCausalLM"

_FOLDER = Path(__file__).with_name("published")
_SENTENCE_TRANSFORMERS = "sentence-transformers"


@dataclass(frozen=True)
class Published:
    """A published checkpoint, or a family of them: one file of `rerankers/published`.

    Most have the configuration of their base model, so that only the name tells them apart.

    Attributes:
        name: the file's stem. source: where the checkpoint or its code was published.
        methods: what scores it; `load` takes the first one.
        template: the prompt that it was trained with; it holds the labels, the stop words, the limits and the schedule.
        names: what it goes by, without the owner, in small letters.
        patterns: regular expressions that the beginning of such a name matches.
        architectures: in its config.json, where these identify it under any name.
    """

    name: str
    methods: tuple[str, ...]
    template: str
    source: str
    names: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()

    def matches(self, name: str) -> bool:
        """Whether a checkpoint of this name, in small letters and without its owner, is one of these."""
        return name in self.names or any(re.match(pattern, name) for pattern in self.patterns)


def read_published(files: Iterable[Path]) -> tuple[Published, ...]:
    """Read files of published checkpoints.

    Raises ValueError naming the file and the field: unknown fields, wrong types, no method, nothing that identifies the
    checkpoint, or a name, a pattern or an architecture that another file has or matches.
    """
    found: list[Published] = []
    for path in files:
        table = Table(path, read_toml(path))
        one = Published(**{"name": path.stem} | table.values(Published))
        if not one.methods:
            raise table.error("methods", "is empty", "at least one method")
        if not one.names + one.patterns + one.architectures:
            raise table.error("names", "is missing", "names, patterns or architectures")
        for pattern in one.patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise table.error("patterns", f"holds {pattern!r} ({error})", "regular expressions") from None
        for wrong in (name for name in one.names if name != name.lower() or "/" in name):
            raise table.error("names", f"holds {wrong!r}", "names without the owner, in small letters")
        for other in found:
            shared = {*one.names, *one.patterns, *one.architectures}
            shared &= {*other.names, *other.patterns, *other.architectures}
            shared |= {name for name in one.names if other.matches(name)}
            shared |= {name for name in other.names if one.matches(name)}
            if shared:
                raise table.error("names", f"hold {sorted(shared)[0]!r}", f"what {other.name}.toml does not have")
        found.append(one)
    return tuple(found)


@lru_cache(maxsize=1)
def published_checkpoints() -> tuple[Published, ...]:
    """Return the published checkpoints that ship as data, read once.

    Example:
        >>> [one.template for one in published_checkpoints() if one.matches("mt5-base-mmarco-v2")]
        ['monot5-yes']
    """
    return read_published(sorted(_FOLDER.glob("*.toml")))


def is_classifier(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint is a sequence classifier."""
    return any(name.endswith("ForSequenceClassification") for name in checkpoint.config.get("architectures") or [])


def is_layerwise(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint has a scoring head after each of its upper layers (bge-reranker-v2-minicpm-layerwise)."""
    return _LAYERWISE in (checkpoint.config.get("architectures") or [])


def other_training(checkpoint: Checkpoint) -> str | None:
    """Return what a checkpoint was trained as if its files show that it is no embedding model; None otherwise.

    An embedding model has modules behind the Transformer, such as Pooling and Dense.

    Example:
        >>> other_training(open_checkpoint("path/to/bge-reranker-base"))                 # doctest: +SKIP
        'a classifier (XLMRobertaForSequenceClassification)'
    """
    if any(module.type not in ("Transformer", "LogitScore") for module in checkpoint.modules):
        return None
    for name in checkpoint.config.get("architectures") or []:
        if name.endswith("ForSequenceClassification"):
            return f"a classifier ({name})"
        if name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
            return f"a language model ({name})"
        if name.endswith(("ForMaskedLM", "ForPreTraining")):
            return f"a model of masked words ({name})"
    return None


def is_yes_no(checkpoint: Checkpoint, given: bool) -> bool:
    """Whether the checkpoint is a plain language model whose logits of "yes" and "no" score pairs.

    That is a published reranker that CrossEncoder takes too, or any model for which a chat template was `given`.
    """
    names = checkpoint.config.get("architectures") or [""]
    if checkpoint.modules or is_layerwise(checkpoint) or not str(names[0]).endswith("ForCausalLM"):
        return False
    found = _published(checkpoint)
    return given or (found is not None and "cross-encoder" in found.methods)


def logit_score(checkpoint: Checkpoint) -> list[int] | None:
    """Return the token ids (true, false) or (true,) of sentence-transformers' LogitScore module; None without one.

    Raises ValueError naming the module's file if its ids are no token ids.
    """
    for module in checkpoint.modules:
        if module.type == "LogitScore":
            ids = [module.config.get("true_token_id"), module.config.get("false_token_id")]
            found = ids if ids[1] is not None else ids[:1]
            if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in found):
                raise ValueError(
                    f"{module.path / 'config.json'}: true_token_id must be a token id, and false_token_id one or null, "
                    f"got {ids[0]!r} and {ids[1]!r}"
                )
            return [int(i) for i in found if i is not None]
    return None


def recognised_template(checkpoint: Checkpoint, kind: str) -> str | None:
    """Return the template of this kind that the checkpoint was trained with; None where nothing tells."""
    if kind == "pointwise" and logit_score(checkpoint) is not None:
        return _SENTENCE_TRANSFORMERS
    found = _published(checkpoint)
    if found is not None:
        return found.template if found.methods[0] == kind else None
    return _SENTENCE_TRANSFORMERS if kind == "pointwise" and is_classifier(checkpoint) else None


def method_of(checkpoint: Checkpoint) -> str | None:
    """Return the method of a language model checkpoint; None where it is none, or nothing tells."""
    if is_layerwise(checkpoint) or logit_score(checkpoint) is not None:
        return "pointwise"
    found = _published(checkpoint)
    return None if found is None else found.methods[0]


def _published(checkpoint: Checkpoint) -> Published | None:
    """The published checkpoint that this one is, by its architecture or by its name."""
    architectures = checkpoint.config.get("architectures") or []
    for one in published_checkpoints():
        if any(name in architectures for name in one.architectures):
            return one
    names = names_of(checkpoint)
    return next((one for name in names for one in published_checkpoints() if one.matches(name)), None)


def names_of(checkpoint: Checkpoint) -> list[str]:
    """Return the checkpoint's names in small letters: those of its hub id, of its folder and in config.json."""
    names = [checkpoint.path.name, str(checkpoint.config.get("_name_or_path") or "")]
    if checkpoint.path.parent.name == "snapshots":  # .../models--owner--name/snapshots/revision
        names.insert(0, checkpoint.path.parents[1].name.split("--")[-1])
    return [Path(name).name.lower() for name in names]
