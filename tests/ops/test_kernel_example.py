"""CONTRIBUTING's example of a kernel, applied to a copy of the repository as it stands on the page."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"<!-- kernel: (\S+?)(?:, (?:after: (.+?)|(at the end)))? -->\n```\w+\n(.*?)```", re.DOTALL)
COMPILER = shutil.which("g++")
NEW_FILES = 4  # the kernel, its interface, its Python face, its test


def apply(tree: Path) -> set[str]:
    """Write the page's files and insertions to a copy of the repository; returns their paths."""
    touched = set()
    for path, anchor, at_the_end, text in BLOCK.findall((tree / "CONTRIBUTING.md").read_text("utf-8")):
        touched.add(path)
        file = tree / path
        if anchor:
            before, line, after = re.split(
                rf"(^ *{re.escape(anchor)}.*\n)", file.read_text("utf-8"), flags=re.MULTILINE
            )
            file.write_text(before + line + text + after, "utf-8")
        elif at_the_end:
            file.write_text(file.read_text("utf-8") + "\n\n" + text, "utf-8")
        else:
            assert not file.exists()
            file.parent.mkdir(exist_ok=True)
            file.write_text(text, "utf-8")
    return touched


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What a build and a test of the repository need."""
    folder = tmp_path / "repository"
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("csrc", "fastrerank", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("CONTRIBUTING.md", "CMakeLists.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    return folder


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"FASTRERANK_CUDA": "OFF", "PYTHONPATH": str(cwd)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    arguments = [str(part) for part in command]
    return subprocess.run(arguments, cwd=cwd, env=environment | {"PATH": path}, capture_output=True, text=True)


def test_a_kernel_is_five_files_and_two_more_for_its_reference_and_its_test(tree: Path) -> None:
    touched = apply(tree)
    assert len(touched - {"fastrerank/ops/reference.py", "tests/ops/test_log_sum_exp.py"}) == 5
    assert sum(not (ROOT / path).exists() for path in touched) == NEW_FILES
    for path in touched:
        if path.endswith((".py", ".pyi")):
            compile((tree / path).read_text("utf-8"), path, "exec")


@pytest.mark.skipif(COMPILER is None, reason="no g++")
@pytest.mark.parametrize("there", [True, False])
def test_a_level_without_the_kernel_does_not_compile(tree: Path, there: bool) -> None:
    apply(tree)
    if not there:
        ops = tree / "csrc" / "isa" / "ops.inl"
        ops.write_text(ops.read_text("utf-8").replace('#include "log_sum_exp/log_sum_exp.inl"\n', ""), "utf-8")
    level = run(str(COMPILER), "-std=c++20", "-fsyntax-only", "-Icsrc", "csrc/isa/portable.cpp", cwd=tree)
    assert (level.returncode == 0) == there, level.stderr
    assert there or "log_sum_exp" in level.stderr


@pytest.mark.nightly
def test_the_example_builds_and_passes_its_test(tree: Path) -> None:
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is not installed, which the build needs")
    apply(tree)
    options = ["-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O1", "-DCMAKE_INTERPROCEDURAL_OPTIMIZATION=OFF"]
    options += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"]
    for step in (["-S", ".", "-B", "build", *options], ["--build", "build", "--parallel", "2"]):
        done = run("cmake", *step, cwd=tree)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (built,) = (tree / "build").glob("_cpu.*.so")
    shutil.copy(built, tree / "fastrerank")
    test = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", "tests/ops/test_log_sum_exp.py"]
    done = run(sys.executable, *test, cwd=tree)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "passed" in done.stdout
