"""What a result says of the machine that it was measured on."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from importlib import metadata
from typing import Any

import torch

_CLOCKS = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "temperature.gpu")
_PACKAGES = ("torch", "triton", "transformers", "sentence-transformers", "tokenizers", "numpy")


def host(device: str) -> dict[str, Any]:
    """Equals what the JSON says of machine and versions."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    found: dict[str, Any] = {
        "system": platform.platform(),
        "python": sys.version.split()[0],
        "versions": versions,
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
