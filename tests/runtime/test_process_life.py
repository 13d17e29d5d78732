"""How a process that computes ends, forks and is interrupted: no signal's death, no hanging child, no deaf Ctrl-C."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

SUPPORT = Path(__file__).parents[1] / "support"
EXITS = 20
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform cannot fork")

# What the children share: a model whose calls take long enough to be met in the midst of one, and its calls.
PREPARED = """
import os, random, signal, sys, tempfile, threading, time
from pathlib import Path
import numpy as np
import helpers_tiny
helpers_tiny.HIDDEN, helpers_tiny.INTERMEDIATE, helpers_tiny.LAYERS, helpers_tiny.POSITIONS = 192, 768, 4, 256
import fastrerank
from fastrerank import ops
from fastrerank.serve.batching.batcher import AsyncReranker
model = fastrerank.CrossEncoder(helpers_tiny.save_tiny_cross_encoder(Path(sys.argv[1]) / "model"))
text = " ".join(helpers_tiny.WORDS[i % 15] for i in range(200))
pairs = [("how long do fleas live", text)] * 64
ids = np.random.default_rng(0).integers(5, 20, 64 * 200).astype(np.int32)
offsets = np.arange(65, dtype=np.int64) * 200
query, tokens = np.ones((32, 64), np.float32), np.random.default_rng(0).random((20000, 64), np.float32)
items = ops.cur_pack(np.random.default_rng(0).standard_normal((64, 20000), np.float32), "int8")
asked = np.random.default_rng(1).standard_normal((64, 64), np.float32)
# Tensors' addresses, as ops.attention hands them on: torch's own ops are not clean while the interpreter ends.
q, out = np.ones((2, 600, 4, 64), np.float32)
lo, hi = np.zeros(600, np.int32), np.full(600, 600, np.int32)
attention = [array.ctypes.data for array in (q, q, q, out)] + [0, lo.ctypes.data, hi.ctypes.data, 0, 0]
attention += [600, 600, 4, 4, 64, [256, 64] * 4, "float32", 0.125, 0.0, 2, ops.isa()]
calls = {
    "attention": lambda: ops._cpu.attention(*attention),
    "predict": lambda: model.predict(pairs),
    "forward": lambda: model.engine.forward(ids, None, offsets),
    "max_sim": lambda: ops.max_sim(query, tokens, np.arange(0, 20001, 50)),
    "cur_topk": lambda: ops.cur_topk(asked, items, 10),
}
"""

EXITING = """
def begin(what):
    if what.endswith("batcher"):
        batcher = AsyncReranker(model, max_batch_tokens=2000)
        for _ in range(20):
            batcher.submit("how long do fleas live", [text] * 64)
        return
    def go_on():
        while True:
            calls[what]()
    for _ in range(2):
        threading.Thread(target=go_on, daemon=True).start()

if sys.argv[2] == "torch batcher":
    import torch
    torch.set_num_threads(1)  # threads of torch's own would not be in a forked child
    model = fastrerank.CrossEncoder(sys.argv[1] + "/model", engine="torch", device="cpu")
statuses = []
for turn in range(int(sys.argv[3])):
    child = os.fork()
    if child == 0:
        begin(sys.argv[2])
        time.sleep(0.03 + 0.03 * random.random())
        sys.exit(turn % 5)  # the interpreter ends as every script's does
    statuses.append((os.waitpid(child, 0)[1], turn % 5 << 8))
wrong = [pair for pair in statuses if pair[0] != pair[1]]
print(f"{len(statuses)} exits, {len(wrong)} with another status: {wrong}")
assert not wrong
"""

FORKING = """
def forward():
    return model.engine.forward(ids[:1600], None, offsets[:9])
reference = forward()
def go_on():
    while True:
        forward()
ops.set_num_threads(2)
threading.Thread(target=go_on, daemon=True).start()
for turn in range(int(sys.argv[2])):
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # what hangs dies of a signal
        sys.exit(0 if (forward() == reference).all() else 1)
    assert os.waitpid(child, 0)[1] == 0, turn
print("done")
"""

INTERRUPTED = """
import json
def long_call(scale):
    many = np.tile(ids, scale), np.arange(64 * scale + 1, dtype=np.int64) * 200
    return {
        "predict": lambda: model.predict(pairs * scale),
        "rank": lambda: model.rank("how long do fleas live", [text] * (64 * scale)),
        "forward, one thread": lambda: one.engine.forward(many[0], None, many[1]),
        "max_sim": lambda: ops.max_sim(np.tile(query, (scale, 1)), tokens, np.arange(0, 20001, 50)),
        "cur_topk": lambda: ops.cur_topk(np.tile(asked, (scale, 1)), items, 10),
        "attention": lambda: attention(600 * scale),
    }[what]
def attention(rows):
    q, lo = torch.ones(rows, 2, 64), torch.zeros(rows, dtype=torch.int32)
    return ops.attention(q, q, q, lo, torch.full((rows,), rows, dtype=torch.int32))
ops.set_num_threads(2)
one = fastrerank.CrossEncoder(sys.argv[1] + "/model", num_threads=1)
reference = model.predict(pairs)
answers = {}
for what in sys.argv[2:]:
    if what == "attention":
        import torch
    scale, whole = 1, 0.0
    while whole < 0.8:  # a call that is long whatever the machine
        scale = scale if not whole else max(scale + 1, min(8 * scale, int(scale / whole) + 1))
        call = long_call(scale)
        start = time.perf_counter()
        call()
        whole = time.perf_counter() - start
    waited = []
    for _ in range(2):
        sent = []
        def interrupt():
            time.sleep(0.1 * whole)
            sent.append(time.perf_counter())
            os.kill(os.getpid(), signal.SIGINT)
        sender = threading.Thread(target=interrupt)
        sender.start()
        try:
            call()
        except KeyboardInterrupt:
            waited.append(time.perf_counter() - sent[0])
        sender.join()
        assert (model.predict(pairs) == reference).all()  # the pool is whole
    answers[what] = [whole, waited]
# A handler that raises nothing disturbs nothing, not even with calls of its own.
inside = []
signal.signal(signal.SIGALRM, lambda *_: inside.append((model.predict(pairs) == reference).all()))
signal.setitimer(signal.ITIMER_REAL, 0.05)
assert (model.predict(pairs * 16).reshape(16, 64) == reference).all()
assert inside == [True]
print(json.dumps(answers))
"""


def child(code: str, *arguments: Any, seconds: float = 240) -> str:
    """What a process printed that ran PREPARED and `code`, and ended well."""
    done = subprocess.run(
        [sys.executable, "-c", PREPARED + textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
        env={**os.environ, "PYTHONPATH": str(SUPPORT), "OMP_NUM_THREADS": "2"},
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"
    assert "terminate called" not in done.stderr
    return done.stdout


@pytest.mark.parametrize("what", ["predict", "forward", "max_sim", "cur_topk", "attention", "batcher"])
def test_a_process_ends_as_it_says_while_threads_compute(tmp_path: Path, what: str) -> None:
    assert f"{EXITS} exits, 0" in child(EXITING, tmp_path, what, EXITS)


@pytest.mark.nightly
def test_a_process_ends_as_it_says_while_torch_computes_a_batch(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    assert "3 exits, 0" in child(EXITING, tmp_path, "torch batcher", 3)


def test_a_child_that_is_forked_while_threads_compute_can_compute(tmp_path: Path) -> None:
    assert "done" in child(FORKING, tmp_path, 10)


def check_answers(printed: str) -> None:
    for what, (whole, waited) in json.loads(printed).items():
        assert len(waited) == 2, f"{what}: {2 - len(waited)} of 2 interrupted calls ended without KeyboardInterrupt"
        assert min(waited) < 0.4 * whole, f"{what}: Ctrl-C was answered after {waited} s of a call of {whole:.2f} s"


def test_ctrl_c_is_answered_during_a_call_and_the_next_call_is_right(tmp_path: Path) -> None:
    check_answers(child(INTERRUPTED, tmp_path, "predict", "forward, one thread"))


@pytest.mark.nightly
def test_ctrl_c_is_answered_during_every_long_call(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    check_answers(child(INTERRUPTED, tmp_path, "rank", "max_sim", "cur_topk", "attention"))
