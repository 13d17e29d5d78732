"""The CUDA scan of packed items without a device: its selection on the host, and its code for several GPUs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrerank import _cpu_tests
from fastrerank.ops import reference

NVCC = shutil.which("nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))
SOURCES = Path(__file__).resolve().parents[2] / "csrc"


@given(
    values=st.lists(st.integers(-4, 4) | st.sampled_from([-np.inf, np.inf, -0.0]), max_size=200),
    k=st.integers(1, 70),
    batch=st.sampled_from([1, 3, 16, 64]),
    blocks=st.sampled_from([1, 2, 7]),
    order=st.sampled_from(["as drawn", "ascending", "descending"]),
)
@settings(max_examples=200, deadline=None)
def test_the_selection_is_the_references(values: list[float], k: int, batch: int, blocks: int, order: str) -> None:
    line = np.array(values, np.float32)
    line = {"as drawn": line, "ascending": np.sort(line), "descending": -np.sort(-line)}[order]
    ids, scores = _cpu_tests.reservoir_topk(line.tolist(), k, batch, blocks)
    true_ids, true_scores = reference.cur_topk(np.ones((1, 1)), line[None].astype(np.float64), k)
    assert ids == true_ids[0].tolist()
    np.testing.assert_array_equal(np.array(scores, np.float32), true_scores[0])


def test_the_kernels_take_as_many_as_python_wants_and_its_statuses_are_theirs() -> None:
    pytest.importorskip("torch")
    from fastrerank.ops._cur_topk import cuda as _cur_cuda

    header = (SOURCES / "cur_topk" / "cuda_topk.h").read_text()
    assert f"kCurMostK = {_cur_cuda._wider(_cur_cuda._MOST_K)};" in header
    assert f"kCurNotFinite = {_cur_cuda._NOT_FINITE};" in header


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_the_kernels_compile_without_spills(arch: str, tmp_path: Path) -> None:
    command = [
        str(NVCC),
        "-std=c++17",
        "-O3",
        f"-arch=sm_{arch}",
        "-Xptxas",
        "-v",
        f"-I{SOURCES}",
        "-cubin",
        "-o",
        str(tmp_path / "x.cubin"),
        str(SOURCES / "cur_topk" / "cur_topk.cu"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if f"Value 'sm_{arch}' is not defined" in done.stderr:
        pytest.skip(f"this nvcc does not know sm_{arch}")
    assert done.returncode == 0, done.stderr[-2000:]
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stdout + done.stderr)
    # rounding; int8, of four queries, bfloat16; merge; sample, of 32 queries, choice; int8, bfloat16; the end
    assert len(spills) == 11
    assert all(pair == ("0", "0") for pair in spills), spills
