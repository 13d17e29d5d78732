"""Checks of an index's files beyond their checksums, made once, when the index is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastrerank import ops
from fastrerank.search.texts import Texts

__all__ = ["check_items", "check_shards"]

_ITEMS = {
    "anchors": "int64",
    "ids": "int64",
    "text": "uint8",
    "text_ends": "int64",
    "query": "uint8",
    "query_ends": "int64",
}


def check_shards(header: Path, shards: Sequence[ops.PackedItems]) -> None:
    """Raise ValueError unless the shards belong together: one kind of scales, those of rows shared by all."""
    kinds = sorted({str(shard.scales) for shard in shards})
    if len(kinds) > 1:
        raise ValueError(f"{header}: its vectors have scales of several kinds ({', '.join(kinds)}); build it anew")
    first, *others = [shard.scale for shard in shards]
    same = all(first is not None and scale is not None and np.array_equal(scale, first) for scale in others)
    if shards[0].scales == "anchor" and not same:
        raise ValueError(f"{header}: its vectors have different scales of one row; build it anew")


def check_items(
    path: Path, arrays: Mapping[str, npt.NDArray[Any]], header: Mapping[str, Any], *, texts_too: bool
) -> None:
    """Raise ValueError naming `path` and its wrong content. Texts are read only if `texts_too`."""

    def wrong(what: str) -> ValueError:
        return ValueError(f"{path}: {what}; build the index anew")

    for name, array in arrays.items():
        if name not in _ITEMS:
            raise wrong(f"holds {name!r}, which no index has")
        if array.dtype != _ITEMS[name] or array.ndim != 1:
            raise wrong(f"{name!r} must be {_ITEMS[name]} of one dimension, got {array.dtype} {array.shape}")
    if "anchors" not in arrays:
        raise wrong("lacks 'anchors'")
    for name in ("text", "query"):
        if (name in arrays) != (f"{name}_ends" in arrays):
            raise wrong(f"holds only one of {name!r} and '{name}_ends'")
    count, following, anchors, ids = header["count"], header["following"], arrays["anchors"], arrays.get("ids")
    if anchors.size and not (anchors.min() >= 0 and anchors.max() < count):
        raise wrong(f"'anchors' must be places within 0 .. {count - 1}, got {anchors.min()} .. {anchors.max()}")
    if len(np.unique(anchors)) != len(anchors):
        raise wrong("'anchors' repeats an item")
    if ids is None:
        if following != count:
            raise wrong(f"lacks 'ids', though the next id is to be {following} for {count} items")
    elif len(ids):
        if not (np.diff(ids) > 0).all():
            raise wrong("'ids' must be ascending, each once")
        if ids[0] < 0 or ids[-1] >= following:
            raise wrong(f"'ids' must be within 0 .. {following - 1}, got {ids[0]} .. {ids[-1]}")
    for name, least in (("text", count), ("query", header["width"])):
        if name not in arrays:
            continue
        texts = Texts(arrays[name], arrays[f"{name}_ends"])
        if len(texts) != least:
            raise wrong(f"'{name}_ends' must hold {least} ends, got {len(texts)}")
        try:
            (texts.check if texts_too else texts.check_ends)()
        except ValueError as error:
            raise wrong(f"{name!r}: {error}") from error
