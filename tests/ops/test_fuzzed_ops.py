"""Ops under wrong arguments: a refusal, or the reference's result, and never a crash."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parents[1] / "support"


def fuzz(seed: int, calls: int) -> str:
    """What a process printed that made the calls and ended well."""
    # Triton's interpreter would take CPU tensors where kernels of a GPU must refuse them.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SUPPORT / "fuzzed_ops.py"), str(seed), str(calls)],
        capture_output=True,
        text=True,
        check=False,
        env={**environment, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr[-4000:]}"
    return done.stdout


def test_wrong_arguments_are_refused_or_taken_as_the_reference_takes_them() -> None:
    printed = fuzz(1, 1000)
    assert "max_sim refused" in printed
    assert "max_sim right" in printed


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(2, 12))
def test_a_hundred_thousand_wrong_calls(seed: int) -> None:
    fuzz(seed, 10_000)
