"""Runs hand-written GPU kernels once on small inputs, for compute-sanitizer: `python tests/support/sanitized.py WHAT`.

WHAT is "cuda" (the CUDA kernels of csrc, no torch), "triton" (ops.attention), "mass" (ops.attention_mass), "labels"
(ops.label_logits), "glue" (rotary, norm_rows and gated), "cur" (ops.cur_topk) or "planted", a kernel that writes beyond
its tensor: what a checker must find.
Results are checked too.
"""

from __future__ import annotations

import sys


def cuda() -> None:
    from fastrerank import ops

    # The least size, and one that leaves a tail for the last threads.
    for size in (1 << 20, (1 << 20) + 16, (1 << 24) + 48):
        assert ops.bandwidth(0, size=size, rounds=1) > 0


def triton() -> None:
    import packing
    import torch

    from fastrerank import ops

    documents, segment = packing.documents, packing.Segment
    cases = [
        packing.Case(documents([5, 17, 1, 40, 23]), 4, 2, 64),
        packing.Case(documents([130, 200, 3]), 2, 2, 32),
        packing.Case(documents([21, 2, 150], "causal"), 2, 1, 80),
        packing.Case(documents([30, 1, 7, 145], "local"), 2, 1, 96),
        packing.Case([segment(37, None, "causal"), *documents([9, 1, 14, 3], "causal", 0)], 2, 1, 128, softcap=5.0),
        packing.Case([segment(3, None, "padding"), segment(20), segment(19, None, "padding")], 2, 1, 40),
        packing.Case(documents([33, 70]), 1, 1, 256),
    ]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for case in cases:
            inputs, spans = packing.tensors(case, dtype, "cuda"), packing.intervals(case.segments)
            used = spans if (spans[3] > spans[2]).any() else spans[:2]
            on_device = [torch.from_numpy(span).cuda() for span in used]
            out = torch.full_like(inputs[0], torch.nan)
            _, lse = ops.attention(*inputs, *on_device, softcap=case.softcap, out=out, return_lse=True)
            torch.cuda.synchronize()
            host = [tensor.cpu() for tensor in inputs]
            packing.check(out.cpu(), lse.cpu(), host, spans, case.softcap)


def mass() -> None:
    import test_attention_mass as tests
    import torch

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for case in tests.CASES.values():
            tests.check(tests.make(case, dtype, "cuda"))


def labels() -> None:
    import test_label_logits as tests
    import torch

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for name in ("rms, two labels", "layer, both vectors, head bias", "many labels"):
            tests.check(tests.tensors(tests.CASES[name], dtype, device="cuda"))


def glue() -> None:
    import test_gated as gates
    import test_norm_rows as norms
    import test_rotary as rotations
    import torch

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for case in rotations.CASES.values():
            rotations.check(rotations.tensors(case, dtype))
        for name in norms.CASES:
            norms.check(norms.tensors(name, dtype))
        for activation in gates.PLAIN:
            gates.check(gates.rows((3, 2 * 1152), dtype), activation)
            gates.check(gates.rows((2, 5, 2 * 17), dtype), activation)


def cur() -> None:
    import test_gpu_cur as tests

    for storage, scales in tests.KINDS:
        tests.check_equals_the_cpu(37, 3001, 50, storage, scales, rows=1)
        tests.check_equals_the_cpu(20, 4000, 1000, storage, scales, rows=1)
        tests.check_equals_the_cpu(37, 140_001, 2, storage, scales, rows=40)  # int8: on tensor cores


def planted() -> None:
    import torch
    import triton
    import triton.language as tl

    @triton.jit
    def beyond(X, n: tl.constexpr):
        tl.store(X + n + tl.arange(0, 32), 1.0)

    tensor = torch.zeros(1024, device="cuda")
    beyond[(1,)](tensor, 1024)
    torch.cuda.synchronize()


if __name__ == "__main__":
    {"cuda": cuda, "triton": triton, "mass": mass, "labels": labels, "glue": glue, "cur": cur, "planted": planted}[
        sys.argv[1]
    ]()
    print(f"{sys.argv[1]}: done")
