"""Where one packed forward spends its time: kernels by kind, and the gaps between them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

# Names of GPU kernels, and of ATen's operators where there is no GPU. The first kind that matches counts.
_KINDS = {
    "attention": r"^kernel(_\d\w*)?$|fastrerank::attention|flash|fmha|attention",
    "matmul": r"gemm|cutlass|nvjet|xmma|cublas|splitk|wgmma|aten::(addmm|mm|bmm|linear|matmul|_addmm)|mkldnn",
    "norms": r"layer_?norm|rms_?norm|RowwiseMoments",
    "activations": r"gelu|silu|tanh|relu|sigmoid|softmax",
    "embeddings, gathers": r"embedding|gather|index|segment_reduce",
    "copies, casts": r"memcpy|memset|copy|cat(array|_|$)|::cat|::to|_to_copy|clone|contiguous|fill|stack|pin_memory",
    "element-wise": r"elementwise|triton_poi|::(add|mul|sub|div|neg|cos|sin|arange|cumsum)_?$",
    "fused by torch.compile": r"^triton_",
}


@dataclass
class Profile:
    """Seconds per kind of a forward's device work, the time between kernels, launches, and the longest kernels."""

    span: float
    kinds: dict[str, float] = field(default_factory=dict)
    gaps: float = 0.0
    launches: int = 0
    longest: list[tuple[str, int, float]] = field(default_factory=list)


def kind_of(name: str) -> str:
    """Equals the kind of a kernel or operator.

    Examples
    --------
    >>> kind_of("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_bias_TNN"), kind_of("kernel"), kind_of("Memcpy HtoD")
    ('matmul', 'attention', 'copies, casts')
    """
    return next((kind for kind, names in _KINDS.items() if re.search(names, name, re.IGNORECASE)), "other")


def profile(run: Callable[[], Any], device: torch.device) -> Profile:
    """Equals the profile of one call of `run`, which must end with its device work done.

    On a GPU the kernels' own times, on one stream; `gaps` is what of the span from the first to the last no kernel
    fills. On a CPU the operators' own times, and no gaps.
    """
    from torch.profiler import ProfilerActivity

    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    run()
    with torch.profiler.profile(activities=activities) as found:
        run()
        if on_gpu:
            torch.cuda.synchronize(device)
    if on_gpu:
        events = [e for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        work = [(e.name, e.time_range.start, e.time_range.end) for e in events]
    else:
        averages = [(e.key, e.count, e.self_cpu_time_total) for e in found.key_averages()]
        return _cpu_profile([entry for entry in averages if entry[0].startswith(("aten::", "fastrerank::"))])
    if not work:
        raise RuntimeError("torch.profiler saw no kernel on the GPU")
    return _gpu_profile(work)


def _gpu_profile(work: list[tuple[str, float, float]]) -> Profile:
    """`work`: (kernel, start, end) in microseconds; overlapping kernels fill their common time once."""
    work = sorted(work, key=lambda entry: entry[1])
    times: dict[str, list[float]] = defaultdict(list)
    filled, until = 0.0, work[0][1]
    for name, start, end in work:
        times[name].append(end - start)
        filled += max(0.0, end - max(start, until))
        until = max(until, end)
    span = until - work[0][1]
    return _summed({name: (len(some), sum(some)) for name, some in times.items()}, span, span - filled)


def _cpu_profile(work: list[tuple[str, int, float]]) -> Profile:
    return _summed({name: (count, total) for name, count, total in work}, sum(total for _, _, total in work), 0.0)


def _summed(times: dict[str, tuple[int, float]], span: float, gaps: float) -> Profile:
    kinds: dict[str, float] = defaultdict(float)
    for name, (_, total) in times.items():
        kinds[kind_of(name)] += total * 1e-6
    longest = sorted(((name[:160], count, total * 1e-6) for name, (count, total) in times.items()), key=lambda e: -e[2])
    return Profile(span * 1e-6, dict(kinds), gaps * 1e-6, sum(count for count, _ in times.values()), longest[:20])
