"""The index on the disk: round trips, growth, damage, and kill -9 at any moment."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cur_data import Scorer, TextScorer, noisy, top

import fastrerank
from fastrerank import ops
from fastrerank.search import contents, store

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture
def scores() -> Any:
    return noisy(5, 40, 300)


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize(
    ("storage", "scales"), [("float32", None), ("bfloat16", None), ("int8", "item"), ("int8", "anchor")]
)
def test_a_saved_index_is_the_same(scores: Any, tmp_path: Path, storage: str, scales: str | None, mmap: bool) -> None:
    texts = [f"text {i} \ud800é" for i in range(300)]
    index = fastrerank.CURIndex.from_scores(scores[:30], storage=storage, scales=scales, items=texts)
    index.save(tmp_path / "index")
    again = fastrerank.CURIndex.load(tmp_path / "index", mmap=mmap)
    np.testing.assert_array_equal(again.vectors(), index.vectors())
    assert again.info() == index.info()
    assert again._contents.texts is not None
    assert [again._contents.texts[i] for i in range(300)] == texts
    for k in (1, 10):
        found = [some.search(Scorer(scores[35]), k=k, budget=40) for some in (index, again)]
        np.testing.assert_array_equal(found[0][0], found[1][0])
        np.testing.assert_array_equal(found[0][1], found[1][1])


@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_added_and_removed_items(scores: Any, tmp_path: Path, monkeypatch: Any, storage: str) -> None:
    monkeypatch.setattr(contents, "SHARD", 64)  # several shards, the last one not full
    index = fastrerank.CURIndex.from_scores(scores[:30, :150], storage=storage)
    assert index.add(scores[:30, 150:]).tolist() == list(range(150, 300))
    whole = fastrerank.CURIndex.from_scores(scores[:30], storage=storage)
    np.testing.assert_array_equal(index.vectors(), whole.vectors())
    gone = top(scores[35:36], 4)[0]
    index.remove(gone)
    assert index.count == 296
    left = [i for i in range(300) if i not in gone]
    assert index.ids.tolist() == left
    np.testing.assert_allclose(index.vectors(), whole.vectors()[:, left], rtol=1e-6)
    index.save(tmp_path)
    for some in (index, fastrerank.CURIndex.load(tmp_path)):
        ids, found = some.search(Scorer(scores[35]), k=5, budget=296)
        assert ids.tolist() == top(scores[35:36], 9)[0, 4:].tolist()
        np.testing.assert_array_equal(found, scores[35, ids])
        assert some.top_k(scores[:1, 0].repeat(30), k=296)[0][0].tolist().count(int(gone[0])) == 0
        assert some.add(np.zeros((30, 2))).tolist() == [300, 301]  # ids are not given twice
        with pytest.raises(ValueError, match=f"ids has item {gone[0]}, which the index does not hold"):
            some.remove(gone[:1])
    with pytest.raises(ValueError, match=r"failed|NaN or infinity for items \[301\]"):
        index.search(lambda ids: np.where(ids == 301, np.nan, 0.0), k=1, budget=298)


@pytest.mark.parametrize("saved", [True, False])
def test_shards_share_the_scales_of_rows(scores: Any, tmp_path: Path, monkeypatch: Any, saved: bool) -> None:
    scores[:, 64:] *= 5  # what the first shard's scales cannot hold
    whole = fastrerank.CURIndex.from_scores(scores[:30], storage="int8", scales="anchor")
    monkeypatch.setattr(contents, "SHARD", 64)
    index = fastrerank.CURIndex.from_scores(scores[:30], storage="int8", scales="anchor")
    if saved:
        index.save(tmp_path / "index")
        index = fastrerank.CURIndex.load(tmp_path / "index")
    np.testing.assert_array_equal(index.vectors(), whole.vectors())
    for found, expected in zip(index.top_k(np.eye(30), 20), whole.top_k(np.eye(30), 20), strict=True):
        np.testing.assert_array_equal(found, expected)
    own = [
        ops.cur_pack(scores[:30, begin : begin + 64].astype(np.float32), "int8", scales="anchor") for begin in (0, 64)
    ]
    with pytest.raises(ValueError, match="items must share their scales of rows"):
        ops.cur_topk(np.ones((1, 30), np.float32), own, 3)


def test_an_index_may_lose_all_items_and_gain_new_ones(scores: Any) -> None:
    index = fastrerank.CURIndex.from_scores(scores[:30])
    index.remove(np.arange(300))
    with pytest.raises(ValueError, match="the index is empty"):
        index.search(Scorer(scores[35]))
    assert index.add(scores[:30]).tolist() == list(range(300, 600))
    ids, _ = index.search(lambda ids: scores[35][ids - 300], k=3, budget=300)
    assert (ids - 300).tolist() == top(scores[35:36], 3)[0].tolist()


def test_a_second_save_writes_only_what_is_new(scores: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(contents, "SHARD", 64)
    index = fastrerank.CURIndex.from_scores(scores[:30, :64])
    index.save(tmp_path)
    before = {path.name for path in tmp_path.glob("vectors-*")}
    index.add(scores[:30, 64:128])
    index.save(tmp_path)
    after = {path.name for path in tmp_path.glob("vectors-*")}
    assert before < after
    assert len(after) == 2
    assert len(list(tmp_path.iterdir())) == 4


def test_a_save_never_takes_a_new_shard_for_an_old_one(scores: Any, tmp_path: Path) -> None:
    index = fastrerank.CURIndex.from_scores(scores[:30, :200])
    for round_ in range(20):  # shards come and go, and Python gives the id of one that is gone to another
        index.save(tmp_path / "index")
        for item in range(3):
            index.add(scores[:30, 200 + 3 * round_ + item :][:, :1])
            index.remove([200 + 3 * round_ + item] if item else [round_])
            held = index._contents
            assert held.files.keys() <= {id(shard) for shard in held.shards}
        index.save(tmp_path / "index")
        again = fastrerank.CURIndex.load(tmp_path / "index")
        np.testing.assert_array_equal(again.ids, index.ids)
        np.testing.assert_array_equal(again.vectors(), index.vectors())


def test_a_header_whose_files_hold_other_items_is_refused(scores: Any, tmp_path: Path) -> None:
    index = fastrerank.CURIndex.from_scores(scores[:30])
    index.save(tmp_path / "index")
    header = store.read_header(tmp_path / "index")
    store.commit(tmp_path / "index", header | {"count": 299})
    with pytest.raises(ValueError, match=r"index\.json: 299 items, but its files hold \[300\]"):
        fastrerank.CURIndex.load(tmp_path / "index")


def test_damage_is_refused_by_name(scores: Any, tmp_path: Path) -> None:
    fastrerank.CURIndex.from_scores(scores[:30]).save(tmp_path)
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        for place in (len(whole) // 2, len(whole) - 10):
            damaged = bytearray(whole)
            damaged[place] ^= 1
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=path.name):
                fastrerank.CURIndex.load(tmp_path)
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=path.name):
            fastrerank.CURIndex.load(tmp_path)
        path.unlink()
        with pytest.raises((ValueError, FileNotFoundError), match=path.name):
            fastrerank.CURIndex.load(tmp_path)
        path.write_bytes(whole)
    fastrerank.CURIndex.load(tmp_path)
    header = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({**header, "version": 99}))
    with pytest.raises(ValueError, match="version 99, but this fastrerank reads version 2"):
        fastrerank.CURIndex.load(tmp_path)


def test_a_folder_of_something_else_is_left_alone(scores: Any, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"'thesis.txt' and no index"):
        fastrerank.CURIndex.from_scores(scores[:30]).save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(FileNotFoundError, match="holds no index"):
        fastrerank.CURIndex.load(tmp_path)


@pytest.mark.skipif(store.fcntl is None, reason="needs locks of files")
def test_a_process_forked_in_a_save_does_not_keep_its_lock(tmp_path: Path) -> None:
    with store.saving(tmp_path):
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
    handle = os.open(tmp_path, os.O_RDONLY)
    try:
        store.fcntl.flock(handle, store.fcntl.LOCK_EX | store.fcntl.LOCK_NB)  # BlockingIOError if it is kept
    finally:
        os.close(handle)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


class Stops(TextScorer):
    """Fails after so many calls."""

    left = 3

    def score_many(self, queries: Any, documents: Any) -> Any:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return super().score_many(queries, documents)


def test_an_interrupted_build_goes_on(tmp_path: Path) -> None:
    matrix = noisy(7, 12, 50)
    items, queries = [str(i) for i in range(50)], [str(i) for i in range(10)]
    first = Stops(matrix)
    with pytest.raises(KeyboardInterrupt):
        fastrerank.CURIndex.build(first, items, queries, checkpoint=tmp_path / "build", block=64)
    assert first.pairs == 3 * 64
    seen: list[tuple[int, int]] = []
    second = Stops(matrix)
    second.left = -1
    index = fastrerank.CURIndex.build(
        second, items, queries, checkpoint=tmp_path / "build", block=64, progress=lambda *at: seen.append(at)
    )
    assert second.pairs == 500 - 3 * 64
    assert seen[0] == (192, 500)
    assert seen[-1] == (500, 500)
    np.testing.assert_array_equal(index.vectors(), matrix[:10].astype(np.float32))
    with pytest.raises(ValueError, match="holds scores of another build"):
        fastrerank.CURIndex.build(second, items[:-1], queries, checkpoint=tmp_path / "build", block=64)
    index.save(tmp_path / "index")
    assert not (tmp_path / "build").exists()


def test_a_build_names_the_items_that_failed(tmp_path: Path) -> None:
    matrix = noisy(7, 3, 8)
    matrix[1, 5] = np.nan
    with pytest.raises(ValueError, match=r"NaN or infinity for items \[5\]"):
        fastrerank.CURIndex.build(TextScorer(matrix), [str(i) for i in range(8)], ["0", "1"], checkpoint=tmp_path)
    with pytest.raises(TypeError, match="items must hold texts, got int at position 1"):
        fastrerank.CURIndex.build(TextScorer(matrix), ["0", 1], ["0"])  # type: ignore[list-item]


WORK = """
    import sys
    sys.path.insert(0, {tests!r})
    import numpy as np
    from cur_data import TextScorer, noisy
    import fastrerank
    from fastrerank.search import contents

    contents.SHARD = 32
    folder, checkpoint = sys.argv[1:3]
    matrix = noisy(9, 12, 4000)

    class Slow(TextScorer):
        def score_many(self, queries, documents):
            scores = super().score_many(queries, documents)
            print("scored", sum(map(len, documents)), flush=True)
            return scores

    def load():
        try:
            return fastrerank.CURIndex.load(folder)
        except FileNotFoundError:
            index = fastrerank.CURIndex.build(
                Slow(matrix), [str(i) for i in range(40)], [str(i) for i in range(8)], checkpoint=checkpoint, block=32
            )
            index.save(folder)
            print("saved", index.count, flush=True)
            return index

    fastrerank.CURIndex.from_scores(np.ones((4, 20)))  # what is imported late is imported now
    print("ready", flush=True)
    sys.stdin.readline()
    index = load()
    while index.count < 4000:
        start = index.count
        index.add(matrix[:8, start : start + 9], [str(i) for i in range(start, start + 9)])
        index.save(folder)
        print("saved", index.count, flush=True)
"""


def test_kill_9_at_any_moment_loses_nothing_that_was_saved(tmp_path: Path) -> None:
    """Fifty times: a process that builds, adds and saves is killed; the next one goes on from what is there."""
    matrix = noisy(9, 12, 4000)
    script = tmp_path / "work.py"
    script.write_text(textwrap.dedent(WORK.format(tests=str(SUPPORT))))
    random = np.random.default_rng(0)
    saved = scored = builds_cut = 0
    workers = [_worker(script, tmp_path)]
    for _ in range(50):
        workers.append(_worker(script, tmp_path))  # the next one imports while this one works
        worker = workers.pop(0)
        assert worker.stdin is not None
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
        worker.stdin.write("go\n")
        worker.stdin.flush()
        lines = [worker.stdout.readline() for _ in range(random.integers(0, 6))]
        time.sleep(float(random.uniform(0, 0.004)))  # into whatever it does next
        os.kill(worker.pid, signal.SIGKILL)
        lines += worker.stdout.read().splitlines(keepends=True)
        lines = [line for line in lines if line.endswith("\n")]
        worker.wait()
        said = [int(line.split()[1]) for line in lines if line.startswith("saved")]
        built = [int(line.split()[1]) for line in lines if line.startswith("scored")]
        scored += sum(built)
        builds_cut += bool(built) and not said
        saved = max([saved, *said])
        if saved or (tmp_path / "index" / "index.json").exists():
            index = fastrerank.CURIndex.load(tmp_path / "index")
            assert index.count >= saved
            assert (index.count - 40) % 9 == 0
            np.testing.assert_array_equal(index.vectors(), matrix[:8, : index.count])
            saved = index.count
    for worker in workers:
        worker.kill()
        worker.communicate()
    assert saved > 40
    assert scored <= 320 + 32 * builds_cut  # each interruption cost one block of 32 scores at most
    index.add(matrix[:8, saved : saved + 1], ["x"])
    index.save(tmp_path / "index")
    names = {path.name.split("-")[0] for path in (tmp_path / "index").iterdir()}
    assert names == {"index.json", "items", "vectors"}  # what the killed ones left aside is gone


def _worker(script: Path, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(script), str(folder / "index"), str(folder / "build")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.skipif(store.fcntl is None or not hasattr(os, "fork"), reason="this platform has no locks or no fork")
@pytest.mark.parametrize("fails", [False, True])
def test_a_process_forked_during_a_save_does_not_hold_the_folder(tmp_path: Path, fails: bool) -> None:
    waiting, over = os.pipe()
    child = 0
    try:
        with contextlib.suppress(KeyError), store.saving(tmp_path):
            child = os.fork()
            if child == 0:
                os.close(over)
                os.read(waiting, 1)  # until the parent is done
                os._exit(0)
            if fails:
                raise KeyError
        handle = os.open(tmp_path, os.O_RDONLY)
        store.fcntl.flock(handle, store.fcntl.LOCK_EX | store.fcntl.LOCK_NB)  # BlockingIOError where it is held
        os.close(handle)
    finally:
        os.close(over)
        os.close(waiting)
        os.waitpid(child, 0)
