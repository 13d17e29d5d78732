"""Weight files that are truncated, rewritten or replaced under a process: an error with the file's name, never SIGBUS,
never the weights of two models. Every case runs in a process of its own, which must end by itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")
import tiny as factory
from safetensors.numpy import load_file, save_file

from fastrerank.checkpoints.checkpoint import Module
from fastrerank.checkpoints.tensors import Tensors
from fastrerank.checkpoints.weight_files import WeightFile, check_unchanged, file_marks
from fastrerank.engine.heads import module_head

ROWS = 60_000  # x 40 float32 are 9.6 MB: more than what is read whole

PROLOGUE = """
import os, sys
from pathlib import Path
import numpy as np
from fastrerank import CrossEncoder
folder = Path(sys.argv[1])
file = folder / "model.safetensors"
def score(model, text="the owl"):
    return float(model.predict([(text, "cats sleep all day")])[0])
def refused(call):
    try:
        call()
    except (ValueError, RuntimeError) as error:
        assert str(file) in str(error) and "changed" in str(error), error
    else:
        raise AssertionError("not refused")
def flip():
    with file.open("r+b") as f:  # the same size and inode, other values
        f.seek(-(4 << 20), 2)
        f.write(bytes(4 << 20))
"""


def save_large(folder: Path) -> Path:
    """A tiny bert whose word table has more rows than its tokenizer has tokens."""
    factory.save(folder, "bert")
    tensors = load_file(folder / "model.safetensors")
    name = "bert.embeddings.word_embeddings.weight"
    tensors[name] = np.concatenate([tensors[name], np.ones((ROWS - len(tensors[name]), 40), np.float32)])
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": ROWS}))
    return folder


def run(folder: Path, code: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROLOGUE + code, str(folder)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        check=False,
    )
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-2000:]}"


CASES = {
    # Rows that were read stay; one that was not is refused.
    "truncated": """
model = CrossEncoder(folder)
before = score(model)
os.truncate(file, 100)
assert score(model) == before
refused(lambda: score(model, "river bank"))
assert score(model) == before
""",
    "emptied": """
model = CrossEncoder(folder)
os.truncate(file, 0)
refused(lambda: score(model))
""",
    "rewritten": """
model = CrossEncoder(folder)
before = score(model)
flip()
assert score(model) == before
refused(lambda: score(model, "river bank"))
""",
    "replaced by a rename": """
model = CrossEncoder(folder)
expected = score(CrossEncoder(folder), "river bank")
other = folder / "other"
other.write_bytes(b"x")
os.rename(other, file)
assert score(model, "river bank") == expected
""",
    "removed": """
model = CrossEncoder(folder)
expected = score(CrossEncoder(folder), "river bank")
file.unlink()
assert score(model, "river bank") == expected
""",
    # In a child of a fork, rows are read from the same place.
    "read after a fork": """
model = CrossEncoder(folder, num_threads=1)
expected = score(CrossEncoder(folder, num_threads=1), "river bank")
child = os.fork()
if child == 0:
    os._exit(0 if score(model, "river bank") == expected else 3)
assert os.waitpid(child, 0)[1] == 0
""",
    "truncated while it loads": """
from fastrerank.checkpoints import weight_files
read, count = weight_files.WeightFile.read, 0
def counted(self, start, length, room=None):
    global count
    count += 1
    if count == 20:
        os.truncate(file, 5000)
    return read(self, start, length, room)
weight_files.WeightFile.read = counted
refused(lambda: CrossEncoder(folder))
assert count >= 20
""",
    "rewritten while it loads": """
from fastrerank.checkpoints import weight_files
read, count = weight_files.WeightFile.read, 0
def counted(self, start, length, room=None):
    global count
    count += 1
    if count == 20:
        flip()
    return read(self, start, length, room)
weight_files.WeightFile.read = counted
refused(lambda: CrossEncoder(folder))
""",
}


@pytest.mark.parametrize("case", CASES)
def test_a_large_table_of_words(tmp_path: Path, case: str) -> None:
    run(save_large(tmp_path / "model"), CASES[case])


COPIED = """
model = CrossEncoder(folder, engine=None)
expected = score(CrossEncoder(folder), "river bank")
os.truncate(file, 0)
assert abs(score(model, "river bank") - expected) < 1e-5 * abs(expected), (score(model, "river bank"), expected)
"""


def test_a_small_model_leaves_its_file(tmp_path: Path) -> None:
    run(factory.save(tmp_path / "model", "bert"), COPIED)


def test_a_small_model_of_the_torch_engine_leaves_its_file(tmp_path: Path) -> None:
    run(
        factory.save(tmp_path / "model", "bert"),
        COPIED.replace("None", "'torch'"),
    )


def test_the_environment_asks_for_a_copy(tmp_path: Path) -> None:
    folder = save_large(tmp_path / "model")
    run(folder, COPIED, FASTRERANK_COPY_WEIGHTS="1")
    run(
        save_large(tmp_path / "other"),
        """
try:
    CrossEncoder(folder)
except ValueError as error:
    assert "FASTRERANK_COPY_WEIGHTS must be 0 or 1, got 'maybe'" in str(error)
else:
    raise AssertionError
""",
        FASTRERANK_COPY_WEIGHTS="maybe",
    )


def test_rows_that_are_read_late_give_the_same_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastrerank import CrossEncoder

    folder = save_large(tmp_path / "model")
    pairs = list(zip(factory.texts(60, 1), factory.texts(60, 2), strict=True))
    for dtype in ("float32", "bfloat16", "int8"):
        late = CrossEncoder(folder, dtype=dtype).predict(pairs)
        monkeypatch.setenv("FASTRERANK_COPY_WEIGHTS", "1")
        np.testing.assert_array_equal(late, CrossEncoder(folder, dtype=dtype).predict(pairs))
        monkeypatch.delenv("FASTRERANK_COPY_WEIGHTS")


def test_a_weight_file_says_that_it_changed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": np.arange(4, dtype=np.float32)}, path)
    marks, file = file_marks([path]), WeightFile(path)
    check_unchanged(marks)
    file.check(place=True)
    (tmp_path / "new").write_bytes(path.read_bytes())
    (tmp_path / "new").rename(path)
    file.check()  # what is open is the old file, whole
    with pytest.raises(ValueError, match="another file has its name"):
        file.check(place=True)
    with pytest.raises(ValueError, match="was changed while it was read"):
        check_unchanged(marks)
    with pytest.raises(ValueError, match="it ends before its tensors do"):
        file.read(0, 1 << 20)
    path.unlink()
    with pytest.raises(ValueError, match="it is gone"):
        file.check(place=True)
    file.close()
    with pytest.raises(ValueError, match="are closed"):
        file.read(0, 1)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in the file system")
def test_pipes_and_devices_hold_no_weights(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises((ValueError, OSError), match=r"regular file|[Ii]s a directory"):
            Tensors.of_file(path)


@pytest.mark.parametrize("kind", ["Dense", "LayerNorm"])
def test_a_modules_own_weights_that_change_while_they_are_read_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    stem, shape = ("linear", (4, 4)) if kind == "Dense" else ("norm", (4,))
    file = tmp_path / "model.safetensors"
    save_file({f"{stem}.weight": np.ones(shape, np.float32), f"{stem}.bias": np.ones(4, np.float32)}, file)
    modules = [Module("Transformer", tmp_path, {}), Module("Pooling", tmp_path, {}), Module(kind, tmp_path, {})]
    assert len(module_head(modules).steps) == 1
    read, count = WeightFile.read, 0

    def rewritten(self: WeightFile, *arguments: object) -> object:
        nonlocal count
        count += 1
        content = read(self, *arguments)  # type: ignore[arg-type]
        if count == 3:  # behind the two reads of the header and one of the two tensors
            with file.open("r+b") as opened:
                opened.seek(-16, 2)
                opened.write(bytes(16))
            os.utime(file, ns=(0, 0))
        return content

    monkeypatch.setattr(WeightFile, "read", rewritten)
    with pytest.raises(ValueError, match=r"model\.safetensors was changed while it was read"):
        module_head(modules)
    assert count == 4
