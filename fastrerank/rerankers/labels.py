"""Which of a head's labels ranks, and what its score is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["label_scores", "named_label", "resolve_label"]

# Label names that mean "this one ranks", in lower case without blanks, "_" and "-". Other names, LABEL_1 among them,
# say nothing.
_RANKING = frozenset({"relevant", "entailment", "yes", "true"})


def named_label(labels: Sequence[str]) -> int | None:
    """Return the number of the one label whose name says that it ranks; None where none does, or several do.

    Args:
        labels: names of the head's labels in their order; a single one is number 0.

    Example:
        >>> named_label(["not_relevant", "relevant"]), named_label(["LABEL_0", "LABEL_1"])
        (1, None)
    """
    if len(labels) == 1:
        return 0
    found = [i for i, name in enumerate(labels) if _plain(name) in _RANKING]
    return found[0] if len(found) == 1 else None


def resolve_label(label: str | int, labels: Sequence[str]) -> int:
    """Return the number of a label given by its name or its number.

    Raises TypeError for what is neither, ValueError naming the labels that there are.

    Example:
        >>> resolve_label("Entailment", ["contradiction", "entailment", "neutral"])
        1
    """
    if isinstance(label, (bool, np.bool_)) or not isinstance(label, (str, int, np.integer)):
        raise TypeError(f"label must be a name (str) or a number (int), got {type(label).__name__}")
    if isinstance(label, str):
        exact = [i for i, name in enumerate(labels) if name == label]
        found = exact or [i for i, name in enumerate(labels) if _plain(name) == _plain(label)]
        if len(found) == 1:
            return found[0]
    elif 0 <= label < len(labels):
        return int(label)
    known = ", ".join(f"{i} ({name!r})" for i, name in enumerate(labels))
    raise ValueError(f"label must be one of {known}, got {label!r}")


def label_scores(logits: npt.NDArray[np.float32], label: int, multi_label: bool = False) -> npt.NDArray[np.float32]:
    """Return the raw score of a label, float32 (N,): its log-odds.

    Args:
        logits: float32 (N, K), finite.
        label: number of the label, from 0 to K - 1.
        multi_label: whether labels are independent of each other; else they exclude each other.

    The score is the logit itself where K is 1 or labels are independent, so that its sigmoid is the label's
    probability. Else it is the logit less the log-sum-exp of the others, whose sigmoid is the softmax's value; for two
    labels that is the difference of the logits. It is computed in float64.

    Example:
        >>> label_scores(np.array([[1.0, 3.0]], np.float32), 1).tolist()
        [2.0]
    """
    if logits.shape[1] == 1 or multi_label:
        return np.ascontiguousarray(logits[:, label])
    others = np.delete(logits, label, axis=1).astype(np.float64)
    largest = others.max(axis=1)
    rest = largest + np.log(np.exp(others - largest[:, None]).sum(axis=1))
    limit = float(np.finfo(np.float32).max)
    scores: npt.NDArray[np.float32] = np.clip(logits[:, label] - rest, -limit, limit).astype(np.float32)
    return scores


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
