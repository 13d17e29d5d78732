"""What this installation found on this machine: versions, CPU level, GPU, optional packages."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from fastrerank.ops import cpu_info, cuda_info
from fastrerank.runtime.version import VERSION

REQUIRED = ("numpy", "tokenizers", "safetensors", "huggingface_hub")
_DEVICE_FILES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg")
OPTIONAL = ("torch", "transformers", "triton", "ir_measures", "sentence-transformers", "onnxruntime", "openvino")


def report(*, ask_torch: bool = False) -> dict[str, Any]:
    """What was found, as JSON-ready values; imports neither torch nor transformers unless `ask_torch`.

    Returns:
        "fastrerank", "python", "platform": versions, as strings;
        "cpu": the name of the instruction set level that the kernels use; "cpu levels": all that this CPU can run;
        "threads": how many threads a call uses; "kernels": where the native kernels were loaded from;
        "cuda kernels": what they are built for, and which devices they run on or why none;
        "gpu": a line of nvidia-smi for each GPU, "no GPU", or what is wrong with the driver of the one that is there;
        "torch": "not installed", "installed, not asked (--torch asks)" or, with `ask_torch`, what torch sees;
        "packages": package -> version; "optional packages": package -> version, or None if it is not installed.

    Example:
        >>> report()["packages"]["numpy"]                                                # doctest: +SKIP
        '2.4.6'
    """
    cpu = cpu_info()
    kernels = importlib.util.find_spec("fastrerank._cpu")
    return {
        "fastrerank": VERSION,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu["isa"],
        "cpu levels": list(cpu["supported"]),
        "threads": cpu["threads"],
        "kernels": kernels.origin if kernels else None,
        "cuda kernels": _cuda(),
        "gpu": _gpus(),
        "torch": _torch(ask_torch),
        "packages": {name: _version(name) for name in REQUIRED},
        "optional packages": {name: _version(name) for name in OPTIONAL},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _has_gpu() -> bool:
    """Whether the kernel's driver has a GPU, without asking CUDA: its files, native and of Windows' subsystem."""
    return any(Path(name).exists() for name in _DEVICE_FILES)


def _gpus() -> list[str] | str:
    if not _has_gpu():
        return "no GPU"
    program = shutil.which("nvidia-smi")
    if program is None:
        return "there is a GPU, but no nvidia-smi on the PATH to ask"
    command = [program, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"there is a GPU, but nvidia-smi failed: {error}"
    return answer.stdout.splitlines() or "no GPU"


def _cuda() -> str:
    info = cuda_info()
    if not info["built"]:
        return f"not built ({info['problem']})"
    built = f"CUDA {info['runtime']} for sm {', '.join(info['architectures'])}"
    names = [
        f"{device['name']} ({device['capability']}{'' if device['supported'] else ', not supported'})"
        for device in info["devices"]
    ]
    # CUDA's own word for a host without a GPU is that the driver is too old.
    return f"{built}; {', '.join(names) or (info['problem'] if _has_gpu() else '') or 'no GPU'}"


def _torch(ask: bool) -> str:
    if importlib.util.find_spec("torch") is None:
        return "not installed"
    if not ask:
        return "installed, not asked (--torch asks)"
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        return f"{torch.__version__}, {'no usable GPU' if _has_gpu() else 'no GPU'}"
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return f"{torch.__version__}, {', '.join(names)}"
