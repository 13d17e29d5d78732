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
LABELS = (
    (1, 1024, "rms"),
    (2, 2560, "rms"),
    (2, 4096, "layer"),
    (26, 4096, None),
    (26, 4096, "layer"),
    (90, 896, "rms"),
)
ROTARY = ((64, 64, 4, "bfloat16"), (128, 128, 4, "bfloat16"), (80, 32, 1, "float32"), (96, 96, 2, "float32"))
NORMED = (
    (64, False, False),
    (128, False, False),
    (768, True, True),
    (1024, True, True),
    (4096, False, False),
    (8192, True, True),
)
GATED = ((1152, "gelu"), (3072, "silu"), (14336, "gelu_tanh"), (512, "relu"))
HEAD_SIZES = (32, 48, 64, 80, 96, 128, 160, 192, 256)
ELEMENTWISE = ("gated", "norm_rows", "rotary")  # passes over rows without products
DTYPES = ("bfloat16", "float16", "float32")
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
from fastrerank.ops._attention import triton as attention
from fastrerank.ops._attention_mass import triton as attention_mass
from fastrerank.ops._gated import triton as gated
from fastrerank.ops._label_logits import triton as label_logits
from fastrerank.ops._norm_rows import triton as norm_rows
from fastrerank.ops._rotary import triton as rotary

tools = Path(triton.backends.nvidia.__file__).parent / "bin"

def attention_of(arch, dtype, head_dim, softcap):
    chosen = attention.tile(head_dim, getattr(torch, dtype), arch, prefixed=True)
    fixed = {"G": 2, "BM": chosen.rows, "BN": chosen.keys, "PREFIX": True, "SOFTCAP": softcap, "WITH_LSE": True}
    kinds = {"Q": "*", "K": "*", "V": "*", "OUT": "*", "LO": "*i32", "HI": "*i32", "PLO": "*i32", "PHI": "*i32"}
    kinds |= {"LSE": "*fp32", "inner": "fp32", "factor": "fp32"}
    options = {"num_warps": chosen.warps, "num_stages": chosen.stages}
    fixed |= attention.constants(head_dim, getattr(torch, dtype), arch)
    return attention.kernel, fixed, kinds, ("_row", "_head"), options

def attention_alone_of(arch, dtype, head_dim):
    chosen = attention.tile(head_dim, getattr(torch, dtype), arch)
    kernel, fixed, kinds, multiples, _ = attention_of(arch, dtype, head_dim, False)
    fixed |= {"BM": chosen.rows, "BN": chosen.keys, "PREFIX": False}
    return kernel, fixed, kinds, multiples, {"num_warps": chosen.warps, "num_stages": chosen.stages}

def attention_mass_of(arch, dtype, head_dim, softcap):
    chosen = attention_mass.tile(head_dim, getattr(torch, dtype), arch)
    fixed = {"G": 7, "P": 7, "PP": 8, "BM": chosen.queries, "BN": chosen.keys, "WEIGHTED": True, "SOFTCAP": softcap,
             "ADD": False}
    kinds = {"Q": "*", "K": "*", "LO": "*i32", "HI": "*i32", "inner": "fp32", "factor": "fp32"}
    kinds |= dict.fromkeys(("LSE", "WEIGHT", "HEADS", "OUT"), "*fp32")
    options = {"num_warps": chosen.warps, "num_stages": chosen.stages}
    multiples = ("q_row", "q_head", "k_row", "k_head")
    fixed |= attention_mass.constants(head_dim, getattr(torch, dtype), arch)
    return attention_mass.kernel, fixed, kinds, multiples, options

def gather_of(arch, dtype, parts):
    fixed = {"N": parts, "BLOCK": attention_mass.GATHERED}
    return attention_mass.gather, fixed, {"PARTS": "*fp32", "OUT": "*fp32"}, ("none",), {"num_warps": 4}

def label_logits_of(arch, dtype, labels, width, norm):
    chosen = label_logits.tile(labels, width)
    fixed = {"NORM": label_logits.NORMS[norm], "WITH_GAMMA": norm is not None, "WITH_BETA": norm == "layer",
             "WITH_BIAS": True, "SOFTCAP": True, "WITH_ORDER": labels <= chosen.labels, "BK": chosen.labels,
             "BH": chosen.columns}
    kinds = {"HIDDEN": "*", "WEIGHT": "*", "GAMMA": "*", "BETA": "*", "BIAS": "*", "OUT": "*fp32", "ORDER": "*i32"}
    kinds |= {"eps": "fp32", "scale": "fp32", "softcap": "fp32"}
    return label_logits.kernel, fixed, kinds, ("H", "_row"), {"num_warps": chosen.warps}

def rotary_of(arch, dtype, head_dim, rotated, heads, angles):
    fixed = {"D": head_dim, "R": rotated, "BT": rotary.tokens_of(rotated), "HEADS": heads,
             "BR": triton.next_power_of_2(rotated // 2), "BD": triton.next_power_of_2(max(1, head_dim - rotated))}
    kinds = {"Q": "*", "K": "*", "OUT": "*", **dict.fromkeys(("COS", "SIN"), "*fp32" if angles == "float32" else "*")}
    return rotary.kernel, fixed, kinds, ("_row", "_head"), {"num_warps": rotary.WARPS}

def norm_rows_of(arch, dtype, width, layer, residual):
    chosen = norm_rows.tile(width)
    fixed = {"W": width, "LAYER": layer, "WITH_RESIDUAL": residual, "WITH_BETA": layer, "BM": chosen.rows,
             "BW": chosen.columns}
    kinds = {**dict.fromkeys(("X", "RESIDUAL", "GAMMA", "BETA", "OUT"), "*"), "eps": "fp32"}
    multiples = ("_row", "residual_outer", "residual_inner")
    return norm_rows.kernel, fixed, kinds, multiples, {"num_warps": chosen.warps}

def gated_of(arch, dtype, inner, activation):
    block = gated.block_of(inner)
    fixed = {"ACT": gated.ACTIVATIONS[activation], "BLOCK": block}
    return gated.kernel, fixed, {"X": "*", "OUT": "*"}, ("inner", "_row"), {"num_warps": block // 256}

for op, arch, dtype, *case in json.loads(sys.argv[1]):
    kernel, fixed, kinds, multiples, options = globals()[op + "_of"](arch, dtype, *case)
    element = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[dtype]
    names = kernel.arg_names
    signature = {name: "constexpr" if name in fixed else kinds.get(name, "i32") for name in names}
    signature = {name: kind + element if kind == "*" else kind for name, kind in signature.items()}
    aligned = [i for i, n in enumerate(names) if signature[n][0] == "*" or n.endswith(multiples) and n not in fixed]
    compiled = triton.compile(
        ASTSource(kernel, signature=signature, constexprs=fixed,
                  attrs={(i,): [["tt.divisibility", 16]] for i in aligned}),
        target=GPUTarget("cuda", arch, 32),
        options=options,
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        command = [tools / "cuobjdump", "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True)
    print(json.dumps({"key": [op, arch, dtype, *case], "shared": compiled.metadata.shared,
                      "usage": usage.stdout + usage.stderr, "ptx": compiled.asm["ptx"]}))
"""


@pytest.fixture(scope="module", params=[90, *(pytest.param(arch, marks=pytest.mark.nightly) for arch in (80, 89, 100))])
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[Any, ...], dict[str, Any]]:
    """What every configuration of an architecture compiled to.

    By ("attention" or "attention_mass", arch, dtype, head size, softcap), ("gather", arch, dtype, key heads),
    ("label_logits", arch, dtype, labels, h, norm), ("gated", arch, dtype, columns, activation),
    ("norm_rows", arch, dtype, width, mean and bias, residual) or
    ("rotary", arch, dtype, head size, columns that turn, heads of a program, dtype of the angles).
    """
    wanted: list[tuple[Any, ...]] = [
        *(("attention", arch, "bfloat16", d, False) for arch in ARCHS for d in HEAD_SIZES),
        *(("attention", 89, "bfloat16", d, False) for d in (64, 128, 256)),
        *(("attention_alone", 90, "bfloat16", d) for d in (32, 64, 128)),
        *(("attention", arch, "float32", d, False) for arch in ARCHS for d in (64, 128, 256)),
        *(("attention", arch, "float16", 64, True) for arch in ARCHS),
        *(("attention_mass", arch, "bfloat16", d, False) for arch in (*ARCHS, 89) for d in HEAD_SIZES),
        *(("attention_mass", arch, "float32", d, False) for arch in ARCHS for d in (64, 128, 256)),
        *(("attention_mass", arch, "float16", d, True) for arch in ARCHS for d in (64, 256)),
        *(("gather", arch, "float32", 8) for arch in ARCHS),
        *(("label_logits", arch, "bfloat16", *case) for arch in ARCHS for case in LABELS),
        *(("rotary", arch, dtype, *case) for arch in ARCHS for dtype in DTYPES for case in ROTARY),
        *(("norm_rows", arch, "bfloat16", *case) for arch in ARCHS for case in NORMED),
        *(("norm_rows", arch, "float32", *case) for arch in ARCHS for case in NORMED[::2]),
        *(("gated", arch, dtype, *case) for arch in ARCHS for dtype in ("bfloat16", "float32") for case in GATED),
        *(("label_logits", arch, dtype, 26, 4096, "rms") for arch in ARCHS for dtype in ("float32", "float16")),
    ]
    wanted = [one for one in wanted if one[1] == request.param]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), environment.get("PYTHONPATH", "")])
    workers = os.cpu_count() or 1

    def compile_some(first: int) -> list[dict[str, Any]]:
        command = [sys.executable, "-W", "ignore", "-c", SCRIPT, json.dumps(wanted[first::workers])]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-4000:]
        return [json.loads(line) for line in done.stdout.splitlines()]

    with ThreadPoolExecutor(workers) as pool:
        results = [result for part in pool.map(compile_some, range(workers)) for result in part]
    assert len(results) == len(wanted)
    return {tuple(r["key"]): r for r in results}


def stack(result: dict[str, Any]) -> int:
    (found,) = re.findall(r"STACK:(\d+)", result["usage"])
    return int(found)


def test_shared_memory_is_within_the_limit(compiled) -> None:
    for configuration, result in compiled.items():
        assert result["shared"] <= SHARED_MEMORY[configuration[1]], configuration


def test_products_of_16_bit_inputs_run_on_tensor_cores(compiled) -> None:
    for configuration, result in compiled.items():
        op, arch, dtype, *_ = configuration
        if (
            op in ("label_logits", "gather", *ELEMENTWISE) or dtype == "float32"
        ):  # IEEE, which tensor cores do not offer
            assert not re.search(r"tf32|mma", result["ptx"]), configuration
        else:
            assert TENSOR_CORES[arch] in result["ptx"], configuration


def test_tiles_in_shared_memory_have_one_layout(compiled) -> None:
    # ptxas 12.8 mixes up descriptors whose upper words differ, see `constants` of the attention kernel.
    for configuration, result in compiled.items():
        if configuration[1] == 90:
            constants = re.findall(r"(?:or\.b64|add\.s64)[^;\n]*, (-?\d{18,20});", result["ptx"])
            layouts = {int(value) % 2**64 >> 32 for value in constants}
            assert len(layouts) <= 1, configuration


# Bytes of stack per thread that a configuration may take. A few words at the tiles that fill the registers; float32
# products, which have no tensor cores, keep both operands of a head in registers.
def allowed(op: str, dtype: str, head_dim: int) -> int:
    if op in ELEMENTWISE:
        return 0
    if op == "label_logits":
        return 8  # the frame of a call to the square root's rare case, where 60 registers are in use
    if op == "attention_mass":
        return 128 if dtype == "float32" else 8
    if dtype == "float32":
        return 256 if head_dim <= 128 else 2304
    return 64


def test_registers_are_not_spilled_beyond_what_is_stated(compiled) -> None:
    beyond = {key: stack(result) for key, result in compiled.items() if stack(result) > allowed(key[0], *key[2:4])}
    assert not beyond
