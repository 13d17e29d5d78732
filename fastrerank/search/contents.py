"""The contents of an index: adding, removing, saving, opening. They are immutable: each change makes new ones."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastrerank import ops
from fastrerank.search import store
from fastrerank.search.build import discard
from fastrerank.search.files import Watched
from fastrerank.search.loading import check_items, check_shards
from fastrerank.search.texts import Texts

__all__ = ["Contents", "Settings", "add", "open_folder", "pack", "remove", "save", "spread_of"]

Ids = npt.NDArray[np.int64]
_TRIES = 100  # of a load, while others save
SHARD = 1 << 16  # items that are packed at a time; a shard with fewer takes the next ones that are added


@dataclass(frozen=True)
class Settings:
    """How `search` spends a budget where the call does not say.

    `rounds`; `first`: share of the budget that the first round takes; `ridge`: relative to the mean squared distance
    of the item vectors from their mean.
    """

    rounds: int = 10
    first: float = 0.1
    ridge: float = 0.02


@dataclass(frozen=True)
class Contents:
    """An index's state.

    `anchors`: positions of the items that first rounds score. `spread`: the mean squared distance of item vectors from
    their mean. `ids`: the items' ids, ascending, or None for 0 .. N - 1. `following`: the id that the next item gets.
    `kind`: "scores" of anchor queries, or "vectors" that were given. `scorer`: what the scores come from, if known.
    `files`: the header entries of those of `shards` that `folder` holds already, by `id` of the shard. `unsaved`: the
    folder of a build's scores, which are not needed once the index is saved. `watched`: files that are mapped.
    """

    shards: tuple[ops.PackedItems, ...]
    anchors: Ids
    spread: float
    settings: Settings
    kind: str = "scores"
    ids: Ids | None = None
    following: int = 0
    texts: Texts | None = None
    queries: Texts | None = None
    scorer: dict[str, Any] | None = None
    folder: Path | None = None
    files: dict[int, dict[str, Any]] = field(default_factory=dict)
    unsaved: Path | None = None
    watched: Watched = field(default_factory=Watched)

    def __post_init__(self) -> None:
        # Python may give the id of a freed shard to a later one, whose file does not exist.
        own = {id(shard) for shard in self.shards}
        kept = {number: entry for number, entry in self.files.items() if number in own}
        object.__setattr__(self, "files", kept)

    @property
    def width(self) -> int:
        return self.shards[0].K

    @property
    def count(self) -> int:
        return sum(shard.N for shard in self.shards)

    def check_files(self, *, seldom: bool = False) -> None:
        """Raise ValueError if a file that is mapped was changed in place. `seldom`: see `Watched.check`."""
        self.watched.check(seldom=seldom)

    def check_searchable(self, *, seldom: bool = False) -> int:
        """Return the number of items. Raise ValueError for none, and as `check_files` does."""
        if self.count == 0:
            raise ValueError("the index is empty: add items before searching")
        self.check_files(seldom=seldom)
        return self.count

    def named(self, places: Ids) -> Ids:
        """The ids of the items at `places`."""
        return places if self.ids is None else self.ids[places]

    def positions(self, name: str, ids: Ids) -> Ids:
        """Where the items `ids` are. ValueError for an id that the index does not have."""
        if self.ids is None:
            unknown = ids[(ids < 0) | (ids >= self.count)]
            places = ids
        else:
            places = np.searchsorted(self.ids, ids)
            inside = np.minimum(places, max(len(self.ids) - 1, 0))
            unknown = ids[self.ids[inside] != ids] if len(self.ids) else ids
        if unknown.size:
            raise ValueError(f"{name} has item {int(unknown[0])}, which the index does not hold")
        return places


def pack(vectors: npt.NDArray[Any], storage: str, scales: str | None) -> tuple[ops.PackedItems, ...]:
    """Columns as shards, at least one; scales of rows are those of all columns."""
    blocks = [vectors[:, begin : begin + SHARD] for begin in range(0, max(vectors.shape[1], 1), SHARD)]
    if scales != "anchor" or len(blocks) == 1:
        return tuple(ops.cur_pack(np.asarray(block, np.float32), storage, scales=scales) for block in blocks)
    largest = [np.asarray(np.abs(block).max(axis=1, keepdims=True), np.float32) for block in blocks]
    first = ops.cur_pack(np.maximum.reduce(largest), storage, scales=scales)
    empty = _empty(first)
    return tuple(empty.append(np.asarray(block, np.float32)) for block in blocks)


def spread_of(vectors: npt.NDArray[Any]) -> float:
    """Mean squared distance of the columns from their mean, of at most 65,536 of them; 1 if they are all equal."""
    some = np.asarray(vectors[:, :: max(1, vectors.shape[1] >> 16)], np.float64)
    if not some.shape[1]:
        return 1.0
    value = float(np.square(some - some.mean(axis=1, keepdims=True)).sum(axis=0).mean())
    return value if value > 0 else 1.0


def add(old: Contents, vectors: npt.NDArray[Any], texts: Sequence[str] | None) -> Contents:
    """The contents with the columns of `vectors` as further items, and their texts where the index holds texts."""
    more = vectors.shape[1]
    if (texts is None) != (old.texts is None) or (texts is not None and len(texts) != more):
        has = "holds its items' texts" if old.texts is not None else "holds no texts"
        raise ValueError(
            f"items must have one text per new item exactly if the index has texts: it {has}, got "
            f"{'none' if texts is None else len(texts)} for {more} items"
        )
    if more == 0:
        return old
    if old.count == 0:
        return replace(
            old,
            shards=pack(vectors, old.shards[0].storage, old.shards[0].scales),
            spread=spread_of(vectors),
            anchors=np.arange(more)[:0],
            **_named(old, more, texts),
        )
    shards = list(old.shards)
    begin = 0
    if shards[-1].N < SHARD:
        begin = min(more, SHARD - shards[-1].N)
        shards[-1] = shards[-1].append(np.asarray(vectors[:, :begin], np.float32))
    if begin < more:
        for shard in pack(vectors[:, begin:], shards[-1].storage, shards[-1].scales):
            shards.append(_like(shard, shards[0], vectors, begin))
            begin += shard.N
    return replace(old, shards=tuple(shards), **_named(old, more, texts))


def _like(shard: ops.PackedItems, first: ops.PackedItems, vectors: npt.NDArray[Any], begin: int) -> ops.PackedItems:
    """`shard`; where scales belong to rows, and so are shared by all items, repacked with those of the first shard."""
    if first.scales != "anchor":
        return shard
    return _empty(first).append(np.asarray(vectors[:, begin : begin + shard.N], np.float32))


def _empty(like: ops.PackedItems) -> ops.PackedItems:
    """No items, with the scales of rows that `like` has."""
    return ops.PackedItems(like.data[:0], like.scale, storage=like.storage, width=like.K, count=0)


def _named(old: Contents, more: int, texts: Sequence[str] | None) -> dict[str, Any]:
    following = old.count if old.ids is None else old.following
    ids = None if old.ids is None else np.concatenate([old.ids, np.arange(following, following + more)])
    kept = None if old.texts is None or texts is None else old.texts.append(texts)
    return {"ids": ids, "following": following + more, "texts": kept}


def remove(old: Contents, positions: Ids) -> Contents:
    """The contents without the items at `positions`; the others keep their ids. Shards that lose items are copied."""
    keep = np.ones(old.count, bool)
    keep[positions] = False
    shards = []
    begin = 0
    for shard in old.shards:
        own = keep[begin : begin + shard.N]
        begin += shard.N
        if own.all():
            shards.append(shard)
        elif own.any():
            shards.append(_taken(shard, np.flatnonzero(own)))
    if not shards:
        shards = [_taken(old.shards[0], np.arange(0))]
    places = np.cumsum(keep) - 1
    ids = np.arange(old.count) if old.ids is None else old.ids
    return replace(
        old,
        shards=tuple(shards),
        anchors=places[old.anchors[keep[old.anchors]]],
        ids=ids[keep],
        following=old.count if old.ids is None else old.following,
        texts=None if old.texts is None else old.texts.take(np.flatnonzero(keep)),
    )


def _taken(shard: ops.PackedItems, positions: Ids) -> ops.PackedItems:
    if shard.scales == "anchor":
        return _empty(shard).append(shard.vectors(positions))
    return ops.cur_pack(shard.vectors(positions), shard.storage, scales=shard.scales)


def save(contents: Contents, folder: Path) -> Contents:
    """Write the contents to `folder` in one step, and return them with the files that they now have there.

    Shards that the folder holds already are not written again.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; an index is saved to a folder")
    if folder.is_dir() and not (folder / store.HEADER).exists() and any(folder.iterdir()):
        strangers = [path.name for path in folder.iterdir() if not store.is_ours(path.name)]
        if strangers:
            raise FileExistsError(f"{folder} holds {strangers[0]!r} and no index; save to a new or empty folder")
    with store.saving(folder):
        files = _write(contents, folder)
    if contents.unsaved is not None:
        discard(contents.unsaved)
    return replace(contents, folder=folder.resolve(), files=files, unsaved=None)


def _write(contents: Contents, folder: Path) -> dict[int, dict[str, Any]]:
    """Write the files that the folder lacks, then the header. Return the shards' entries by the shard's `id`."""
    store.sync_folder(folder.resolve().parent)
    held = contents.files if contents.folder == folder.resolve() else {}
    files: dict[int, dict[str, Any]] = {}
    for shard in contents.shards:
        entry = held.get(id(shard))
        if entry is None or not (folder / entry["name"]).is_file():
            arrays: dict[str, npt.NDArray[Any]] = {"data": shard.data}
            if shard.scale is not None:
                arrays["scale"] = shard.scale
            entry = {**store.write_file(folder, "vectors", arrays), "count": shard.N}
        files[id(shard)] = entry
    rest: dict[str, npt.NDArray[Any]] = {"anchors": np.ascontiguousarray(contents.anchors, np.int64)}
    if contents.ids is not None:
        rest["ids"] = contents.ids
    for name, texts in (("text", contents.texts), ("query", contents.queries)):
        if texts is not None:
            rest[f"{name}_ends"], rest[name] = texts.ends, texts.data
    header = {
        "count": contents.count,
        "width": contents.width,
        "storage": contents.shards[0].storage,
        "kind": contents.kind,
        "spread": contents.spread,
        "following": contents.following,
        "settings": asdict(contents.settings),
        "scorer": contents.scorer,
        "shards": [files[id(shard)] for shard in contents.shards],
        "items": store.write_file(folder, "items", rest),
    }
    store.commit(folder, header)
    return files


def open_folder(folder: Path, *, mmap: bool, verify: bool) -> Contents:
    """The contents that `save` wrote. FileNotFoundError without an index, ValueError naming what is damaged."""
    header = store.read_header(folder)
    for _ in range(_TRIES):
        try:
            return _read(folder, header, mmap, verify)
        except ValueError:
            # Another process may have saved meanwhile, and the files that the old header names are gone.
            now = store.read_header(folder)
            if now == header:
                raise
            header = now
    raise ValueError(f"{folder}: another process saved the index {_TRIES} times while it was loaded; load it again")


def _read(folder: Path, header: dict[str, Any], mmap: bool, verify: bool) -> Contents:
    shards, files, watched = [], {}, []
    for entry in header["shards"]:
        arrays, mapped = store.open_file(folder, entry, verify=verify, mmap=mmap)
        watched.append(mapped)
        try:
            shard = ops.PackedItems(
                arrays["data"],
                arrays.get("scale"),
                storage=header["storage"],
                width=header["width"],
                count=entry["count"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{folder / entry['name']}: not the vectors that {store.HEADER} describes ({error})"
            ) from error
        shards.append(shard)
        files[id(shard)] = entry
    rest, mapped = store.open_file(folder, header["items"], verify=verify, mmap=mmap)
    watched.append(mapped)
    counts = [sum(shard.N for shard in shards), *(len(rest[name]) for name in ("ids", "text_ends") if name in rest)]
    if any(count != header["count"] for count in counts):
        raise ValueError(
            f"{folder / store.HEADER}: {header['count']} items, but its files hold {counts}; build it anew"
        )
    check_shards(folder / store.HEADER, shards)
    check_items(folder / header["items"]["name"], rest, header, texts_too=verify)
    texts = {name: Texts(rest[name], rest[f"{name}_ends"]) if name in rest else None for name in ("text", "query")}
    return Contents(
        shards=tuple(shards),
        anchors=rest["anchors"],
        spread=float(header["spread"]),
        settings=Settings(**header["settings"]),
        kind=header["kind"],
        ids=rest.get("ids"),
        following=int(header["following"]),
        texts=texts["text"],
        queries=texts["query"],
        scorer=header["scorer"],
        folder=Path(os.path.realpath(folder)),
        files=files,
        watched=Watched([mapped for mapped in watched if mapped is not None]),
    )
