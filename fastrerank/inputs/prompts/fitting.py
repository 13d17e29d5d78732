"""Parts of a prompt, and how the documents among them are cut so that the prompt fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastrerank.inputs.limits import NO_LIMITS, TextLimits, TooLong

__all__ = ["Part", "Places", "fit", "int32"]

# int64 (2, n): where each token starts and ends, in characters.
Places = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Part:
    """Ids of a prompt; ids[start:end] belong to `document` (-1: none) and may be shortened.

    `cut` is whether the document's own limit cut it. `places`, where they are kept, count from the run's beginning.
    """

    ids: npt.NDArray[np.int32]
    document: int = -1
    start: int = 0
    end: int = 0
    cut: bool = False
    places: Places | None = None


def fit(
    parts: list[Part], count: int, limit: int | None, name: str, limits: TextLimits = NO_LIMITS
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """Join the parts, with the longest documents cut evenly so that the prompt has `limit` tokens.

    Returns the ids (T,), and (count,) which documents were cut. `limits` says at which end documents are cut (the last
    one by default). Raises TooLong where it says that none may be cut.
    """
    truncated = np.zeros(count, np.bool_)
    sizes: dict[int, int] = {}
    for part in parts:
        if part.document >= 0:
            truncated[part.document] = part.cut
            sizes[part.document] = part.end - part.start
    total = sum(len(part.ids) for part in parts)
    if limit is not None and total > limit:
        if not limits.truncate:
            raise TooLong("the prompt", total, limit)
        room = limit - (total - sum(sizes.values()))
        least = sum(min(1, size) for size in sizes.values())
        if room < least:
            raise ValueError(
                f"the query and the fixed text of template {name!r} leave no room for the documents: the prompt "
                f"exceeds its limit of {limit} tokens by {least - room} even with one token per document"
            )
        keep = _share(sizes, room)
        cut: list[Part] = []
        for part in parts:
            if part.document >= 0 and keep[part.document] < sizes[part.document]:
                truncated[part.document] = True
                gone = sizes[part.document] - keep[part.document]
                first = part.start if limits.cut_left() else part.end - gone
                cut.append(Part(np.concatenate([part.ids[:first], part.ids[first + gone :]])))
            else:
                cut.append(part)
        parts = cut
    return np.concatenate([part.ids for part in parts] or [int32([])]), truncated


def _share(sizes: dict[int, int], room: int) -> dict[int, int]:
    """How many tokens each document keeps, `room` in all: short ones keep all, the others get equal shares."""
    keep: dict[int, int] = {}
    waiting = sorted(sizes, key=lambda document: sizes[document])
    while waiting:
        share = room // len(waiting)
        if sizes[waiting[0]] <= share:
            document = waiting.pop(0)
            keep[document] = sizes[document]
            room -= keep[document]
            continue
        extra = room - share * len(waiting)
        for position, document in enumerate(sorted(waiting)):
            keep[document] = min(sizes[document], share + (position < extra))
        break
    return keep


def int32(ids: Sequence[int]) -> npt.NDArray[np.int32]:
    try:
        return np.fromiter(ids, np.int32, len(ids))
    except OverflowError:
        raise ValueError(f"tokenizer.json gives the token id {max(ids)}, which no table of embeddings has") from None
