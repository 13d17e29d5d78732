"""compute-sanitizer on every hand-written GPU kernel: no access outside memory, no race in shared memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from fastrerank import ops  # noqa: E402

FOLDER = Path(__file__).resolve().parents[1]
PLACES = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer"])
TOOL = shutil.which("compute-sanitizer", path=PLACES)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(TOOL is None, reason="no compute-sanitizer"),
]


def sanitized(tool: str, what: str) -> tuple[int, str]:
    """Exit status and output of support/sanitized.py under a tool of compute-sanitizer; 86: it found something."""
    # Tensors of torch's caching allocator lie side by side in one allocation, where nothing is out of bounds.
    environment = {
        **os.environ,
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "PYTHONPATH": f"{FOLDER.parent}:{FOLDER / 'support'}:{FOLDER / 'ops'}",
    }
    environment.pop("TRITON_INTERPRET", None)
    # Without the option, calls by which libraries find out what a driver can do count as errors when they fail.
    command = [str(TOOL), "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "86"]
    command += [sys.executable, str(FOLDER / "support" / "sanitized.py"), what]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=240, check=False, cwd=FOLDER.parent
    )
    output = done.stdout + done.stderr
    if "Device not supported" in output:
        pytest.skip("compute-sanitizer does not support this device or its driver")
    # What was found first says the most, and the end counts it.
    return done.returncode, output if len(output) <= 4000 else f"{output[:2500]}\n[...]\n{output[-1500:]}"


@pytest.mark.parametrize("what", ["cuda", "triton", "mass", "labels", "glue", "cur"])
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_kernels_are_clean(tool: str, what: str) -> None:
    if what in ("cuda", "cur") and not ops.cuda_info()["built"]:
        pytest.skip("this installation was built without the CUDA kernels")
    code, output = sanitized(tool, what)
    assert code == 0, output
    assert f"{what}: done" in output
    assert "0 errors" in output or "0 hazards" in output, output


def test_a_planted_write_beyond_a_tensor_is_found() -> None:
    code, output = sanitized("memcheck", "planted")
    assert code != 0, output
    assert "Invalid __global__ write" in output, output
