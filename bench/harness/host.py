"""What a result says of the machine that it was measured on."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

NOT_INSTALLED = "not installed"
_CLOCKS = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "temperature.gpu")
_PACKAGES = ("torch", "triton", "transformers", "sentence-transformers", "tokenizers", "numpy")


class _Asked(Protocol):
    @property
    def threads(self) -> int: ...

    @property
    def command(self) -> str: ...


def host(options: _Asked) -> dict[str, Any]:
    """Return what a result says of the machine whose CPU it was measured on, and of the command."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": options.threads,
        "system": platform.platform(),
        "python": platform.python_version(),
        "command": options.command,
    }


def gpu_host(device: str) -> dict[str, Any]:
    """Return what a result says of the machine whose GPU (or CPU, with tiny shapes) it was measured on."""
    import torch

    found: dict[str, Any] = {
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions(_PACKAGES),
        "clocks before": clocks(),
    }
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "cuda of torch": torch.version.cuda,
        }
    return found


def cpu_name() -> str:
    """Return the CPU's model name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return each package's version, NOT_INSTALLED where there is none."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = NOT_INSTALLED
    return found


def clocks() -> list[dict[str, str]]:
    """Equals what nvidia-smi says of name, driver, clocks, power and temperature per GPU; empty where it is missing."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    done = subprocess.run(
        [tool, f"--query-gpu={','.join(_CLOCKS)}", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    if done.returncode:
        return [{"error": (done.stderr or done.stdout).strip()[:200]}]
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    return [dict(zip(_CLOCKS, (cell.strip() for cell in line.split(",")), strict=False)) for line in lines]
