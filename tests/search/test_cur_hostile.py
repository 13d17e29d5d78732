"""Index folders that lie, change or run out of room: refused by name, and the index that was there stays whole."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cur_data import Scorer, noisy

import fastrerank
from fastrerank.search import contents, files, store
from fastrerank.search.files import read_arrays

SUPPORT = Path(__file__).parents[1] / "support"
Arrays = dict[str, Any]
WIDTH, COUNT = 20, 150


def index_of(storage: str = "int8", scales: str | None = "item") -> fastrerank.CURIndex:
    """An index with everything that one may hold: several shards, ids, texts, queries."""
    scores = noisy(5, 30, COUNT + 10)
    texts = [f"text {i} é" for i in range(COUNT + 10)]
    index = fastrerank.CURIndex.from_scores(scores[:WIDTH], storage=storage, scales=scales, items=texts)
    index._contents = contents.replace(index._contents, queries=contents.Texts.of([f"query {i}" for i in range(WIDTH)]))
    index.remove(np.arange(0, 20, 2))
    return index


@pytest.fixture(scope="module", params=[("int8", "item"), ("int8", "anchor"), ("float32", None)])
def folder(request: Any, tmp_path_factory: Any) -> Path:
    path = tmp_path_factory.mktemp("whole") / "index"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contents, "SHARD", 64)
        index_of(*request.param).save(path)
    return path


def rewritten(folder: Path, tmp_path: Path, change: Callable[[Arrays], Any], part: str = "items") -> Path:
    """A copy whose items, or whose first shard, hold what `change` makes of the arrays, with right checksums."""
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    header = store.read_header(copy)
    entry = header["items"] if part == "items" else header["shards"][0]
    arrays, _ = read_arrays(copy / entry["name"], entry, verify=True, map_it=False)
    arrays = {name: array.copy() for name, array in arrays.items()}
    changed = change(arrays)
    arrays = arrays if changed is None else changed
    fresh = {**entry, **written(copy, part, arrays)}
    header = {**header, "items": fresh} if part == "items" else {**header, "shards": [fresh, *header["shards"][1:]]}
    store.commit(copy, header)
    return copy


def written(folder: Path, stem: str, arrays: Arrays) -> dict[str, Any]:
    kinds = {"uint8": "U8", "float32": "F32", "int64": "I64", "float64": "F64", "int32": "I32"}
    table, blob = {}, b""
    for name, array in arrays.items():
        content = np.ascontiguousarray(array).tobytes()
        span = [len(blob), len(blob) + len(content)]
        table[name] = {"dtype": kinds[array.dtype.name], "shape": array.shape, "data_offsets": span}
        blob += content
    head = json.dumps(table).encode()
    head += b" " * (-(8 + len(head)) % 64)  # as a save places the arrays
    whole = len(head).to_bytes(8, "little") + head + blob
    name = f"{stem}-{'0' * 16}.safetensors"
    (folder / name).write_bytes(whole)
    return {"name": name, "bytes": len(whole), "sha256": hashlib.sha256(whole).hexdigest()}


def put(name: str, place: Any, value: Any) -> Callable[[Arrays], None]:
    return lambda arrays: arrays[name].__setitem__(place, value)


def as_(name: str, change: Callable[[Any], Any]) -> Callable[[Arrays], None]:
    return lambda arrays: arrays.__setitem__(name, change(arrays[name]))


def without(name: str) -> Callable[[Arrays], Any]:
    return lambda arrays: {key: array for key, array in arrays.items() if key != name}


ITEMS = {
    "an id twice": put("ids", 5, 3),
    "ids that go down": as_("ids", lambda ids: ids[::-1]),
    "a negative id": put("ids", 0, -1),
    "an id that is still to be given": put("ids", -1, 10**6),
    "ids that are floats": as_("ids", lambda ids: ids.astype(np.float64)),
    "ids of 32 bits": as_("ids", lambda ids: ids.astype(np.int32)),
    "ids of two dimensions": as_("ids", lambda ids: ids[None]),
    "too few ids": as_("ids", lambda ids: ids[:-1]),
    "no ids": without("ids"),
    "an anchor beyond the items": put("anchors", 0, COUNT),
    "a negative anchor": put("anchors", 0, -1),
    "an anchor twice": put("anchors", slice(0, 2), 7),
    "anchors of two dimensions": as_("anchors", lambda anchors: anchors[:, None]),
    "anchors that are floats": as_("anchors", lambda anchors: anchors.astype(np.float32)),
    "no anchors": without("anchors"),
    "ends that go down": put("text_ends", 4, 0),
    "a negative end": put("text_ends", 0, -4),
    "ends beyond the text": put("text_ends", -1, 10**6),
    "ends before the text's end": as_("text", lambda text: np.append(text, np.uint8(65))),
    "an end within a character": as_("text_ends", lambda ends: ends - (np.arange(len(ends)) == 2)),
    "text that is not UTF-8": put("text", 3, 0xFF),
    "texts of floats": as_("text", lambda text: text[: len(text) // 4 * 4].view(np.float32)),
    "too many ends": as_("text_ends", lambda ends: np.append(ends, ends[-1])),
    "ends without text": without("text"),
    "text without ends": without("text_ends"),
    "queries whose ends go down": put("query_ends", 3, 0),
    "too few queries": as_("query_ends", lambda ends: np.append(ends[:-2], ends[-1])),
    "an array of something else": lambda arrays: arrays.__setitem__("scores", np.zeros(3, np.float32)),
}
SHARDS = {
    "no vectors": without("data"),
    "vectors of floats": as_("data", lambda data: data.view(np.float32)),
    "too few vectors": as_("data", lambda data: data[:-1]),
    "vectors of another width": as_("data", lambda data: data[:, :-16]),
    "vectors in a row": as_("data", lambda data: data.reshape(-1)),
}
SCALES = {
    "a scale that is NaN": put("scale", 0, np.nan),
    "a negative scale": put("scale", 0, -1.0),
    "a scale of zero": put("scale", 0, 0.0),
    "an infinite scale": put("scale", 0, np.inf),
    "too few scales": as_("scale", lambda scale: scale[:-1]),
    "no scales": without("scale"),
    "scales of bytes": as_("scale", lambda scale: scale.view(np.uint8)),
}
HEADER: dict[str, dict[str, Any]] = {
    "a count that is none": {"count": -1},
    "a count of text": {"count": "150"},
    "a width of zero": {"width": 0},
    "a huge width": {"width": 10**18},
    "no width": {"width": None},
    "a storage that is none": {"storage": "float8"},
    "a storage that is a list": {"storage": ["int8"]},
    "vectors of no kind": {"kind": "other"},
    "no spread": {"spread": 0},
    "a spread that is NaN": {"spread": float("nan")},
    "a next id that was given": {"following": 3},
    "no settings": {"settings": None},
    "settings of nothing": {"settings": {}},
    "rounds of zero": {"settings": {"rounds": 0, "first": 0.1, "ridge": 0.1}},
    "a negative ridge": {"settings": {"rounds": 3, "first": 0.1, "ridge": -0.1}},
    "a scorer that is a text": {"scorer": "x"},
    "no shards": {"shards": []},
    "shards of numbers": {"shards": [1]},
    "no items": {"items": None},
}


def refused(folder: Path, match: str = "", **options: Any) -> None:
    with pytest.raises(ValueError, match=match or "json|safetensors"):
        fastrerank.CURIndex.load(folder, **options)


@pytest.mark.parametrize("what", ITEMS)
def test_items_that_no_save_writes_are_refused(folder: Path, tmp_path: Path, what: str) -> None:
    copy = rewritten(folder, tmp_path, ITEMS[what])
    for mmap in (True, False):
        refused(copy, mmap=mmap)
    if what not in ("text that is not UTF-8", "an end within a character"):
        refused(copy, verify=False)
    else:  # texts are not read then, but named when they are
        index = fastrerank.CURIndex.load(copy, verify=False)
        with pytest.raises(ValueError, match=r"text \d is not UTF-8"):
            index.texts(index.ids[:4])


@pytest.mark.parametrize("what", [*SHARDS, *SCALES])
def test_vectors_that_no_save_writes_are_refused(folder: Path, tmp_path: Path, what: str) -> None:
    scaled = store.read_header(folder)["storage"] == "int8"
    if what in SCALES and not scaled:
        pytest.skip("float32 has no scales")
    copy = rewritten(folder, tmp_path, {**SHARDS, **SCALES}[what], "vectors")
    for verify in (True, False):
        refused(copy, "safetensors|json", verify=verify)


def test_shards_with_scales_of_their_own_for_rows_are_refused(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(contents, "SHARD", 64)
    index_of("int8", "anchor").save(tmp_path / "index")
    refused(
        rewritten(tmp_path / "index", tmp_path, as_("scale", lambda scale: 2 * scale), "vectors"), "different scales"
    )


@pytest.mark.parametrize("what", HEADER)
def test_headers_that_no_save_writes_are_refused(folder: Path, tmp_path: Path, what: str) -> None:
    copy = rewritten(folder, tmp_path, dict)
    body = {**store.read_header(copy), **HEADER[what], "format": store.FORMAT, "version": store.VERSION}
    (copy / store.HEADER).write_text(json.dumps({**body, "sha256": store._digest(body)}))
    refused(copy)


@pytest.mark.parametrize(
    ("kind", "header"),
    [(kind, False) for kind in ("up", "absolute", "device")]
    + [(kind, header) for kind in ("pipe", "folder", "link to a device", "link to a pipe") for header in (False, True)],
)
def test_only_regular_files_of_the_folder_are_opened(folder: Path, tmp_path: Path, kind: str, header: bool) -> None:
    copy = rewritten(folder, tmp_path, dict)
    body = store.read_header(copy)
    name = body["items"]["name"]
    names = {"up": f"../copy/{name}", "absolute": str(copy / name), "device": "/dev/zero"}
    if kind in names:
        body = {
            **body,
            "items": {**body["items"], "name": names[kind]},
            "format": store.FORMAT,
            "version": store.VERSION,
        }
        (copy / store.HEADER).write_text(json.dumps({**body, "sha256": store._digest(body)}))
        return refused(copy, "items is not what a save writes")
    path = copy / (store.HEADER if header else name)
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to a device":
        path.symlink_to("/dev/zero")
    else:
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to(tmp_path / "pipe")
    return refused(copy, "not a regular file")


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("layout", ["blobs", "linked folder"])
def test_an_index_whose_files_are_links_is_loaded(folder: Path, tmp_path: Path, layout: str, mmap: bool) -> None:
    copy = rewritten(folder, tmp_path, dict)
    if layout == "blobs":  # snapshots of the hub: every file is a link to one named by its digest
        (tmp_path / "blobs").mkdir()
        for i, path in enumerate(sorted(copy.iterdir())):
            path.rename(tmp_path / "blobs" / str(i))
            path.symlink_to(Path("../blobs") / str(i))
    else:  # mounted volumes: files lead through a link to the folder of the day
        linked = tmp_path / "linked"
        linked.mkdir()
        (linked / "..data").symlink_to(copy)
        for path in copy.iterdir():
            (linked / path.name).symlink_to(Path("..data") / path.name)
        copy = linked
    index = fastrerank.CURIndex.load(copy, mmap=mmap)
    np.testing.assert_array_equal(index.vectors(), fastrerank.CURIndex.load(folder).vectors())
    index.remove(index.ids[:1])
    index.save(copy)  # replaces links, and leaves what they lead to
    assert fastrerank.CURIndex.load(copy, mmap=mmap).count == index.count


SAVING = """
import sys, numpy as np, fastrerank
index = fastrerank.CURIndex.load(sys.argv[1])
for turn in range(int(sys.argv[2])):
    index.settings = fastrerank.search.Settings(rounds=turn + 1)
    index.remove(index.ids[:1])
    index.save(sys.argv[1])
"""


def test_loads_while_another_process_saves(tmp_path: Path) -> None:
    index_of().save(tmp_path / "index")
    saver = subprocess.Popen([sys.executable, "-c", SAVING, str(tmp_path / "index"), "60"])
    loads, counts = 0, set()
    while saver.poll() is None or loads < 50:
        index = fastrerank.CURIndex.load(tmp_path / "index", mmap=loads % 2 == 0)
        assert index.search(Scorer(noisy(5, 30, COUNT + 10)[25]), k=3, budget=20)[0].shape == (3,)
        counts.add(index.count)
        loads += 1
    assert saver.returncode == 0
    assert fastrerank.CURIndex.load(tmp_path / "index").count == COUNT - 60
    assert len(counts) > 3


def test_a_load_goes_on_with_the_header_of_a_save_that_came_between(tmp_path: Path, monkeypatch: Any) -> None:
    index = index_of()
    index.save(tmp_path / "index")
    read, saves = store.read_header, []

    def then_saved(folder: Path) -> dict[str, Any]:
        header = read(folder)
        if len(saves) < 3:
            saves.append(1)
            index.remove(index.ids[:1])
            with monkeypatch.context() as patch:
                patch.setattr(store, "read_header", read)
                index.save(folder)
        return header

    monkeypatch.setattr(store, "read_header", then_saved)
    assert fastrerank.CURIndex.load(tmp_path / "index").count == COUNT - 3


def test_savers_of_one_folder_wait_for_one_another(tmp_path: Path) -> None:
    index_of().save(tmp_path / "index")
    savers = [subprocess.Popen([sys.executable, "-c", SAVING, str(tmp_path / "index"), "25"]) for _ in range(2)]
    assert [saver.wait() for saver in savers] == [0, 0]
    fastrerank.CURIndex.load(tmp_path / "index")
    assert len(list((tmp_path / "index").iterdir())) == 3  # the header, a shard, the items


@pytest.mark.parametrize("before", [True, False])
def test_a_save_that_fails_at_any_step_leaves_the_index_and_nothing_else(
    tmp_path: Path, monkeypatch: Any, before: bool
) -> None:
    folder = tmp_path / "index"
    if before:
        index_of().save(folder)
    old = sorted(path.name for path in folder.iterdir()) if before else []
    kept = fastrerank.CURIndex.load(folder).vectors() if before else None
    for name in ("fsync", "replace", "open"):
        for step in range(20):
            left = [step]
            real = {"fsync": os.fsync, "replace": Path.replace, "open": Path.open}[name]

            def fails(*arguments: Any, real: Any = real, left: list[int] = left, **options: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return real(*arguments, **options)

            other = index_of("float32", None)
            with monkeypatch.context() as patch:
                patch.setattr(os if name == "fsync" else Path, name, fails)
                try:
                    other.save(folder)
                    break
                except OSError:
                    pass
            if (folder / store.HEADER).exists() and store.read_header(folder)["storage"] == "float32":
                break  # the header was replaced: the save has happened, and only its confirmation failed
            assert (sorted(path.name for path in folder.iterdir()) if folder.exists() else []) == old
            if before:
                np.testing.assert_array_equal(fastrerank.CURIndex.load(folder).vectors(), kept)
        assert step > 0
        shutil.rmtree(folder)
        if before:
            index_of().save(folder)
            old = sorted(path.name for path in folder.iterdir())


def test_a_disk_without_room_leaves_no_half_of_a_file(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    folder = tmp_path / "index"
    index_of().save(folder)
    old = sorted(path.name for path in folder.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))  # a write beyond is cut, the next one fails
        with pytest.raises(OSError, match="File too large"):
            index_of("float32", None).save(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in folder.iterdir()) == old
    fastrerank.CURIndex.load(folder)


def test_files_of_a_save_that_was_killed_go_before_the_next_one_writes(tmp_path: Path, monkeypatch: Any) -> None:
    index = index_of()
    index.save(tmp_path / "index")
    left = [tmp_path / "index" / f"{stem}-{'a' * 16}.safetensors" for stem in ("vectors", "items")]
    for path in left:
        path.write_bytes(b"half")
    seen = []
    write = store.write_file

    def looks(*arguments: Any) -> Any:
        seen.append([path.exists() for path in left])
        return write(*arguments)

    monkeypatch.setattr(store, "write_file", looks)
    index.save(tmp_path / "index")
    assert seen == [[False, False]]


@pytest.mark.parametrize("how", ["cut", "written over"])
@pytest.mark.parametrize("part", ["vectors", "items"])
def test_a_mapped_file_that_changes_is_noticed_before_a_search(tmp_path: Path, how: str, part: str) -> None:
    scores = noisy(5, 30, COUNT + 10)
    index_of().save(tmp_path / "index")
    mapped, copied = (fastrerank.CURIndex.load(tmp_path / "index", mmap=mmap) for mmap in (True, False))
    expected = mapped.search(Scorer(scores[25]), k=5, budget=50)
    path = next((tmp_path / "index").glob(f"{part}-*"))
    time.sleep(0.02)  # the clock of files may tick slowly
    with path.open("r+b") as file:
        if how == "cut":
            file.truncate(4096 if part == "vectors" else 100)
        else:
            file.write(b"\0" * 10)
    for call in (
        lambda: mapped.search(Scorer(scores[25]), k=5, budget=50),
        lambda: mapped.top_k(np.zeros(WIDTH), 3),
        lambda: mapped.texts([1]),
        mapped.vectors,
        lambda: mapped.add(np.zeros((WIDTH, 1)), ["new"]),
        lambda: mapped.save(tmp_path / "other"),
    ):
        with pytest.raises(ValueError, match=f"{path.name}: was changed in place"):
            call()
    found = copied.search(Scorer(scores[25]), k=5, budget=50)
    np.testing.assert_array_equal(found[0], expected[0])


def test_top_k_looks_at_mapped_files_20_times_a_second_at_most(tmp_path: Path, monkeypatch: Any) -> None:
    index_of().save(tmp_path / "index")
    index = fastrerank.CURIndex.load(tmp_path / "index")
    query, looks, clock = np.ones(index.width, np.float32), [], [100.0]
    look = files.Mapped.check
    monkeypatch.setattr(files.Mapped, "check", lambda self: (looks.append(self.path), look(self)))
    monkeypatch.setattr(files, "monotonic", lambda: clock[0])
    for _ in range(3):
        index.top_k(query, k=2)
    assert sorted(looks) == sorted(map(str, (tmp_path / "index").glob("*.safetensors")))
    index.vectors()  # what takes longer looks every time
    assert len(looks) == 4
    clock[0] += 0.051
    time.sleep(0.02)
    with next((tmp_path / "index").glob("vectors-*")).open("r+b") as file:
        file.write(b"\0" * 10)
    for _ in range(2):  # a refusal is no look that counts
        with pytest.raises(ValueError, match="was changed in place"):
            index.top_k(query, k=2)


def test_a_mapped_file_that_is_replaced_stays_as_it_was(tmp_path: Path) -> None:
    scores = noisy(5, 30, COUNT + 10)
    index = index_of()
    index.save(tmp_path / "index")
    mapped = fastrerank.CURIndex.load(tmp_path / "index")
    expected = mapped.search(Scorer(scores[25]), k=5, budget=50)
    index.remove(index.ids[:50])
    index.save(tmp_path / "index")
    for path in (tmp_path / "index").iterdir():
        path.unlink()
    found = mapped.search(Scorer(scores[25]), k=5, budget=50)
    np.testing.assert_array_equal(found[0], expected[0])
    with contextlib.suppress(FileNotFoundError):
        mapped.save(tmp_path / "again")
    np.testing.assert_array_equal(fastrerank.CURIndex.load(tmp_path / "again").vectors(), mapped.vectors())
