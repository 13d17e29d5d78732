"""Every configuration of the Triton kernels compiled to machine code for GPUs that need not be here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

ARCHS = (80, 90, 100)
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 89: 99 << 10}  # bytes that one block may have
TENSOR_CORES = {80: "mma.sync", 89: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}

# Compiles the configurations that it is given and prints what came out. A process of its own, because the kernels of
# this one may be the interpreter's. The machine code itself says what was spilled: its stack.
SCRIPT = r"""
import json, subprocess, sys, tempfile
from pathlib import Path
import torch
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fastrerank.ops.triton.attention import constants, kernel, tile

tools = Path(triton.backends.nvidia.__file__).parent / "bin"
for head_dim, dtype, arch, softcap in json.loads(sys.argv[1]):
    chosen = tile(head_dim, getattr(torch, dtype), arch)
    fixed = {"G": 2, "BM": chosen.rows, "BN": chosen.keys, "PREFIX": True, "SOFTCAP": softcap, "WITH_LSE": True}
    fixed |= constants(head_dim)
    kinds = {"Q": "*", "K": "*", "V": "*", "OUT": "*", "LO": "*i32", "HI": "*i32", "PLO": "*i32", "PHI": "*i32"}
    kinds |= {"LSE": "*fp32", "inner": "fp32", "factor": "fp32"}
    element = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[dtype]
    names = kernel.arg_names
    signature = {name: "constexpr" if name in fixed else kinds.get(name, "i32") for name in names}
    signature = {name: kind + element if kind == "*" else kind for name, kind in signature.items()}
    aligned = [i for i, n in enumerate(names) if signature[n][0] == "*" or n.endswith(("_row", "_head"))]
    compiled = triton.compile(
        ASTSource(kernel, signature=signature, constexprs=fixed,
                  attrs={(i,): [["tt.divisibility", 16]] for i in aligned}),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": chosen.warps, "num_stages": chosen.stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        command = [tools / "cuobjdump", "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True)
    print(json.dumps({"head_dim": head_dim, "dtype": dtype, "arch": arch, "softcap": softcap, "tile": chosen,
                      "shared": compiled.metadata.shared, "usage": usage.stdout + usage.stderr,
                      "ptx": compiled.asm["ptx"]}))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[Any, ...], dict[str, Any]]:
    """What every configuration compiled to, by (head size, dtype, arch, softcap)."""
    wanted: list[tuple[Any, ...]] = [
        *((d, "bfloat16", arch, False) for arch in ARCHS for d in (32, 48, 64, 80, 96, 128, 160, 192, 256)),
        *((d, "bfloat16", 89, False) for d in (64, 128, 256)),
        *((d, "float32", arch, False) for arch in ARCHS for d in (64, 128, 256)),
        *((64, "float16", arch, True) for arch in ARCHS),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), environment.get("PYTHONPATH", "")])
    workers = os.cpu_count() or 1

    def compile_some(first: int) -> list[dict[str, Any]]:
        command = [sys.executable, "-W", "ignore", "-c", SCRIPT, json.dumps(wanted[first::workers])]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-4000:]
        return [json.loads(line) for line in done.stdout.splitlines()]

    with ThreadPoolExecutor(workers) as pool:
        results = [result for part in pool.map(compile_some, range(workers)) for result in part]
    assert len(results) == len(wanted)
    return {(r["head_dim"], r["dtype"], r["arch"], r["softcap"]): r for r in results}


def stack(result: dict[str, Any]) -> int:
    (found,) = re.findall(r"STACK:(\d+)", result["usage"])
    return int(found)


def test_shared_memory_is_within_the_limit(compiled) -> None:
    for configuration, result in compiled.items():
        assert result["shared"] <= SHARED_MEMORY[configuration[2]], configuration


def test_products_of_16_bit_inputs_run_on_tensor_cores(compiled) -> None:
    for configuration, result in compiled.items():
        _, dtype, arch, _ = configuration
        if dtype == "float32":  # IEEE, which tensor cores do not offer
            assert not re.search(r"tf32|mma", result["ptx"]), configuration
        else:
            assert TENSOR_CORES[arch] in result["ptx"], configuration


# Bytes of stack per thread that a configuration may take. A few words at the tiles that fill the registers; float32
# products, which have no tensor cores, keep both operands of a head in registers.
def allowed(head_dim: int, dtype: str) -> int:
    if dtype == "float32":
        return 256 if head_dim <= 128 else 2304
    return 64


def test_registers_are_not_spilled_beyond_what_is_stated(compiled) -> None:
    beyond = {key: stack(result) for key, result in compiled.items() if stack(result) > allowed(*key[:2])}
    assert not beyond
