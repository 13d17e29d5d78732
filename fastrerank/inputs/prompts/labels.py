"""Labels of a template as token ids: each must be a single token where the answer begins."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fastrerank.inputs.prompts.compiler import Compiler
from fastrerank.inputs.prompts.template import Template
from fastrerank.inputs.prompts.template_layout import Piece, Values, fill
from fastrerank.inputs.text_pieces import Marker, strip_left

__all__ = ["label_ids"]

# How SentencePiece writes the blank before a word. A label that begins with it is looked up in the vocabulary as it is.
_BLANK = "▁"


def label_ids(
    compiler: Compiler, template: Template, last: Sequence[Piece], instruction: str, count: int | None
) -> npt.NDArray[np.int64]:
    """Ids of the template's labels (K,), or of its first `count` identifiers, behind the prompt's `last` text.

    Raises ValueError as `PromptTokenizer.label_ids` does.
    """
    if template.identifiers:
        if count is None:
            raise ValueError(f"template {template.name!r} reads identifiers: say of how many documents")
        labels = template.identifier_labels(count)
    else:
        if count is not None:
            raise ValueError(f"template {template.name!r} has the labels {template.labels}, not identifiers")
        labels = template.labels
    if template.model == "seq2seq":
        before, anchored = template.decoder, False
    elif template.segments:  # a label is a segment of its own
        before, anchored = "", False
    else:
        before, anchored = _behind_markers(compiler, last, Values("a", instruction, ["a", "a"], ["a", "a"]))
    return np.array([_label_id(compiler, template, label, before, anchored) for label in labels], np.int64)


def _label_id(compiler: Compiler, template: Template, label: str, before: str, anchored: bool) -> int:
    tokenizer = compiler.text.tokenizer
    marker = compiler.text.markers.get(label)
    if marker is not None:
        return marker.id
    if label.startswith(_BLANK):
        piece: int | None = tokenizer.token_to_id(label)
        if piece is None:
            raise ValueError(
                f"the label {label!r} of template {template.name!r} is no piece of this tokenizer's vocabulary: the "
                "checkpoint answers with other words; take the template that it was trained with"
            )
        return piece
    alone, behind = compiler.text.encode([before, before + label], anchored)
    if behind[:-1] != alone:
        new = [tokenizer.id_to_token(token) for token in behind]
        raise ValueError(
            f"the label {label!r} of template {template.name!r} is not a single token of this tokenizer behind "
            f"{before[-20:]!r}: the tokens there are {new[-max(4, len(behind) - len(alone)) :]}"
        )
    return behind[-1]


def _behind_markers(compiler: Compiler, last: Sequence[Piece], values: Values) -> tuple[str, bool]:
    """The text between the last marker and the readout position, and whether a marker stands before it."""
    flat = compiler.flat(last)
    places = [i for i, item in enumerate(flat) if isinstance(item, Marker)]
    run = flat[places[-1] + 1 :] if places else flat
    text = fill([item for item in run if not isinstance(item, Marker)], values)
    marker = flat[places[-1]] if places else None
    return strip_left(text) if isinstance(marker, Marker) and marker.rstrip else text, bool(places)
