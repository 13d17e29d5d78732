"""What a checkpoint of a native family stores, tensor by tensor: required, ruled out by config.json, or left over.

All of it is checked by name and shape before anything is packed or allocated, so a missing bias is an error and never
a bias of zeros.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastrerank.checkpoints.config_values import shown
from fastrerank.checkpoints.tensors import Tensor, Tensors
from fastrerank.checkpoints.weight_files import Arena
from fastrerank.engine.families import Dense, Family, Fused

__all__ = ["Slot", "body_slots", "check_body", "check_shape", "check_unread", "head_slots", "values", "warn_unread"]

log = logging.getLogger("fastrerank")

_FLOATS = ("F32", "F16", "BF16", "F64")
_ALIASES = {".weight": ".gamma", ".bias": ".beta"}  # of norms, in old conversions from TensorFlow

# Buffers, and the heads of pre-training: every published base model leaves them in its file, and none of them has a
# part in a reranker's scores.
_HARMLESS = re.compile(
    r"(.*\.)?(embeddings\.position_ids|embeddings\.token_type_ids|rotary_emb\.inv_freq)$"
    r"|(cls\.(predictions|seq_relationship)|lm_head|lm_loss|generator_predictions|generator_lm_head"
    r"|discriminator_predictions|lm_predictions|mask_predictions|vocab_transform|vocab_layer_norm|vocab_projector"
    r"|decoder|predictions|sop_classifier)\."
)
# Names of task heads. A tensor of such a name that is not read belongs to a head that gives other scores.
_HEAD = re.compile(
    r"(classifier|classification_head|pre_classifier|score|scores|head|heads|out_proj|output_proj|dense|linear|logits"
    r"|regressor|regression|ranking_head|rank_head|projection|projector|proj|qa_outputs|pruning_head|token_classifier"
    r"|sequence_summary|logits_proj)[._0-9]"
)


@dataclass(frozen=True)
class Slot:
    """One tensor that config.json says something of.

    Attributes:
        name: its name in the file.
        shape: its shape; None in it is any size.
        stored: whether the file must hold it; else it must not.
        norm: whether it belongs to a norm, whose weight and bias old files call gamma and beta.
    """

    name: str
    shape: tuple[int | None, ...]
    stored: bool = True
    norm: bool = False

    def find(self, tensors: Mapping[str, Tensor]) -> str | None:
        """Return the name that the file has it under; None if it has none."""
        if self.name in tensors:
            return self.name
        if not self.norm:
            return None
        stem, dot, kind = self.name.rpartition(".")
        alias = stem + _ALIASES[dot + kind]
        return alias if alias in tensors else None


def body_slots(family: Family, prefix: str) -> Iterator[Slot]:
    """Yield every tensor of the body that config.json requires or rules out, layer by layer.

    A generator: a config.json of a billion layers is refused at the first that is missing.
    """
    hidden, embedding = family.hidden, family.embedding or family.hidden
    yield Slot(prefix + family.word, (family.vocabulary, embedding))
    if family.position:
        yield Slot(prefix + family.position, (family.positions, embedding))
    if family.type:
        yield Slot(prefix + family.type, (family.types, embedding))
    yield from _norm(prefix + family.embedding_norm, embedding, True, family.norm_bias)
    if family.projection:
        yield from _linear(prefix + family.projection, (hidden, embedding), True)
    for name in family.ruled_out:
        for kind in ("weight", "bias"):
            yield Slot(f"{prefix}{name}.{kind}", (), False)
    shapes = {"up": (family.intermediate, hidden), "gate": (family.intermediate, hidden)}
    shapes |= {"down": (hidden, family.intermediate)}
    for i in range(family.layers):
        for slot, part in family.layer.items():
            name, index, parts = (part.name, part.index, part.parts) if isinstance(part, Fused) else (part, 0, 1)
            if index == 0:  # a fused matrix is one tensor
                rows, columns = shapes.get(slot, (hidden, hidden))
                bias = family.mlp_bias if slot in shapes else family.attention_bias
                yield from _linear(prefix + name.format(i), (parts * rows, columns), bias)
        for slot, name in family.norms.items():
            there = i > 0 or slot != "attention" or family.first_norm
            yield from _norm(prefix + name.format(i), hidden, there, there and family.norm_bias)
    if family.final_norm:
        yield from _norm(prefix + family.final_norm, hidden, True, family.norm_bias)


def head_slots(family: Family, prefix: str) -> list[Slot]:
    """Return every tensor of the family's classification head; `prefix` is what the body's weights carry."""
    slots: list[Slot] = []
    for number, part in enumerate(family.head):
        name = (prefix if part.name in family.head_in_base else "") + part.name
        if isinstance(part, Dense):
            rows = family.labels if number + 1 == len(family.head) else family.hidden
            slots += _linear(name, (rows, family.hidden), part.bias)
        else:
            slots += _norm(name, family.hidden, True, part.bias)
    return slots


def _linear(name: str, shape: tuple[int | None, int], bias: bool) -> tuple[Slot, Slot]:
    return Slot(f"{name}.weight", shape), Slot(f"{name}.bias", shape[:1], bias)


def _norm(name: str, width: int, there: bool, bias: bool) -> tuple[Slot, Slot]:
    return Slot(f"{name}.weight", (width,), there, True), Slot(f"{name}.bias", (width,), bias, True)


def check_body(path: Path, family: Family, tensors: Tensors, prefix: str) -> set[str]:
    """Check the body's tensors against config.json and return the names of those that are read.

    Raises ValueError naming the first that is missing, ruled out, of another shape, or no floating point numbers.
    """
    return check_slots(path, body_slots(family, prefix), tensors)


def check_slots(path: Path, slots: Iterable[Slot], tensors: Mapping[str, Tensor]) -> set[str]:
    """Check some tensors; return the names of those that are read. Raises ValueError naming the first that is wrong."""
    read = set()
    for slot in slots:
        found = slot.find(tensors)
        if slot.stored:
            if found is None:
                raise ValueError(f"{path}: the weights lack {slot.name!r}, which config.json says is there")
            check_shape(path, tensors[found], slot.shape)
            read.add(found)
        elif found is not None:
            raise ValueError(
                f"{path}: the weights hold {shown(found)}, which config.json rules out; a score without it would not "
                "be the trained model's"
            )
    return read


def check_shape(path: Path, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
    """Raise ValueError unless a tensor has this shape (None is any size but 0) and holds floating point numbers."""
    if tensor.dtype not in _FLOATS:
        raise ValueError(
            f"{path}: the tensor {shown(tensor.name)} is stored as {tensor.dtype}; weights must be {', '.join(_FLOATS)}"
        )
    fits = len(tensor.shape) == len(shape) and all(
        size == wanted if wanted is not None else size > 0 for size, wanted in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape) + ("," if len(shape) == 1 else "")
        raise ValueError(
            f"{path}: the weight {shown(tensor.name)} has shape {tensor.shape}, expected ({wanted}) by config.json"
        )


def values(tensor: Tensor, room: Arena | None = None) -> npt.NDArray[np.generic]:
    """Return a weight as the kernels pack it: float32, float16, or bfloat16 as uint16, read into memory of its own.

    In `room` it is valid until that is reset.
    """
    return tensor.float32() if tensor.dtype == "F64" else tensor.read(room)


def check_unread(path: Path, family: Family, tensors: Tensors, prefix: str, read: set[str], *, task: bool) -> None:
    """Say which tensors nothing reads: an error for a head's where the head is what is asked for, else one warning.

    Quiet are buffers, the heads of pre-training, the pooler of a body that is read token by token, and the family's
    own classification head where only the body is asked for.
    """
    names = [name for name in tensors if name not in read and not _HARMLESS.match(name)]
    roots = {slot.name.removeprefix(prefix).split(".")[0] for slot in body_slots(_one_layer(family), prefix)}
    own = {part.name.split(".")[0] for part in family.head} | {"pooler"}
    foreign: list[str] = []
    left: list[str] = []
    for name in names:
        inside = prefix and name.startswith(prefix)
        root = name.removeprefix(prefix).split(".")[0]
        if root == "pooler" or (not task and not inside and root in own):
            continue
        (left if root in roots and (inside or not prefix) else foreign).append(name)
    _refuse_projection(path, foreign)
    if foreign and task:
        raise ValueError(
            f"{path}: the weights hold {_listed(foreign)}, outside the body and no part of the classification head of "
            f"{family.model_type!r}; a score without it would not be the trained model's. Serve the checkpoint with "
            "the library that it was trained with, or remove what is left over from another task"
        )
    warn_unread(path, foreign + left)


def check_unexpected(path: Path, names: Iterable[str], prefix: str, *, task: bool) -> None:
    """What `check_unread` does, for the names that transformers says it did not use; `prefix` is the body's."""
    names = [name for name in sorted(names) if not _HARMLESS.match(name) and ".pooler." not in f".{name}"]
    outside = [name for name in names if not name.startswith(prefix) and _HEAD.match(name)]
    _refuse_projection(path, outside)
    if task and outside:
        raise ValueError(
            f"{path}: the weights hold {_listed(outside)}, which the model that config.json names does not read; a "
            "score without it would not be the trained model's. Serve the checkpoint with the library that it was "
            "trained with, or remove what is left over from another task"
        )
    warn_unread(path, [name for name in names if task or name not in outside])


def warn_unread(path: Path, names: list[str]) -> None:
    """Log one warning that names the tensors that nothing reads; nothing if there are none."""
    if names:
        log.warning("%s: nothing reads %s; the scores are those of the model without it", path, _listed(names))


def _refuse_projection(path: Path, names: list[str]) -> None:
    if "linear.weight" in names:
        raise ValueError(
            f"{path}: the weights hold 'linear.weight' beside the body: a ColBERT checkpoint in Stanford's layout, "
            "whose projection and markers fastrerank does not compute; its scores would be wrong. colbert-ai, PyLate "
            "or sentence-transformers' MultiVectorEncoder serve it"
        )


def _one_layer(family: Family) -> Family:
    from dataclasses import replace

    return replace(family, layers=min(family.layers, 1))


def _listed(names: list[str]) -> str:
    first = ", ".join(map(shown, names[:3]))
    return first + (f" and {len(names) - 3} more" if len(names) > 3 else "")
