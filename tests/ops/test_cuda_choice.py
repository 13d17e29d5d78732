"""When a build compiles the CUDA kernels: AUTO, ON and OFF, with an nvcc that only says that it was asked."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pybind11 = pytest.importorskip("pybind11", reason="pybind11 is not installed, which the build needs")
SAYS_NO = "No CUDA kernels: this host has no NVIDIA driver"


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder with all that a configuration runs, and nothing of CUDA."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("cmake", "c++", "ar", "ranlib", "ld", "as", "make", "ninja", "uname", "sh", "cat"):
        place = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        if place is None:
            if name == "cmake":
                pytest.skip("no cmake")
            continue
        # a file that calls it: tools look for their parts beside the file that they are, not beside a link
        script(folder / name, f'exec "{place}" "$@"')
    return folder


def script(path: Path, line: str) -> None:
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


def configure(tools: Path, cuda: str) -> tuple[str, bool]:
    """What the configuration printed, and whether the build would make the CUDA module."""
    build = tools.parent / "build"
    environment = {"PATH": str(tools), "FASTRERANK_CUDA": cuda, "HOME": str(tools.parent)}
    command = [
        "cmake",
        "-S",
        ROOT,
        "-B",
        build,
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    done = subprocess.run(
        [str(tools / "cmake"), *map(str, command[1:])], env=environment, capture_output=True, text=True
    )
    if cuda != "ON":
        assert done.returncode == 0, done.stderr
    rules = [path.read_text() for name in ("build.ninja", "Makefile") if (path := build / name).exists()]
    return done.stdout + done.stderr, any("_cuda" in text for text in rules)


def asked(tools: Path) -> bool:
    return (tools.parent / "asked").exists()


def add_compiler(tools: Path) -> None:
    script(tools / "nvcc", f"echo asked > {tools.parent / 'asked'}; exit 1")


def host_has_a_driver() -> bool:
    places = ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/lib/wsl/lib")
    return Path("/dev/nvidiactl").exists() or any((Path(place) / "libcuda.so.1").exists() for place in places)


@pytest.mark.skipif(host_has_a_driver(), reason="this host has an NVIDIA driver")
def test_auto_leaves_nvcc_alone_without_a_driver(tools: Path) -> None:
    add_compiler(tools)
    printed, made = configure(tools, "AUTO")
    assert SAYS_NO in printed
    assert "FASTRERANK_CUDA=ON" in printed
    assert (asked(tools), made) == (False, False)


def test_auto_asks_nvcc_where_there_is_a_driver(tools: Path) -> None:
    add_compiler(tools)
    script(tools / "nvidia-smi", "exit 0")
    printed, made = configure(tools, "AUTO")
    assert SAYS_NO not in printed
    assert (asked(tools), made) == (True, False)  # this nvcc compiles nothing, so the module is left out


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_auto_makes_the_module_where_both_are(tools: Path) -> None:
    script(tools / "nvcc", f'exec "{shutil.which("nvcc")}" "$@"')
    script(tools / "nvidia-smi", "exit 0")
    environment_path = os.environ["PATH"].split(os.pathsep)
    for name in ("gcc", "g++", "cc1plus", "ls", "rm", "mkdir"):  # what nvcc itself calls
        place = shutil.which(name, path=os.pathsep.join(environment_path))
        if place is not None:
            script(tools / name, f'exec "{place}" "$@"')
    assert configure(tools, "AUTO")[1]


def test_on_insists_and_off_refuses(tools: Path) -> None:
    add_compiler(tools)
    script(tools / "nvidia-smi", "exit 0")
    assert configure(tools, "OFF")[1] is False
    assert not asked(tools)
    printed, _ = configure(tools, "ON")
    assert asked(tools)
    assert "CUDA" in printed
