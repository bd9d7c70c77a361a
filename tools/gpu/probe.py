"""``python -m tools.gpu.probe``: what this machine has, as JSON. Every question may go wrong without the others."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import shutil
import subprocess
import sys
from typing import Any

__all__ = ["capability", "found"]

PACKAGES = ("torch", "triton", "numpy", "rich", "setuptools", "ninja", "pytest", "pytest-benchmark", "hypothesis")
PACKAGES += ("torchvision", "timm", "matplotlib", "onnxruntime", "tensorrt", "apex", "torchdiffeq")

TOOLS = {
    "nvcc": ["--version"],
    "g++": ["--version"],
    "ninja": ["--version"],
    "nvidia-smi": ["--query-gpu=name,driver_version,compute_cap,memory.total", "--format=csv,noheader"],
    "compute-sanitizer": ["--version"],
    "ncu": ["--version"],
}

_PLACES = "/usr/local/cuda/bin"
"""Where tools of CUDA lie that are not on the path."""


def found() -> dict[str, Any]:
    """Versions of Python, of packages and of tools, and what torch says of the GPU."""
    return {
        "python": f"{platform.python_version()} at {sys.executable}",
        "system": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "tools": {name: _tool(name, arguments) for name, arguments in TOOLS.items()},
        "torch": _torch(),
    }


def which(tool: str) -> str | None:
    """The path of a tool, also where CUDA's folder is not on the path."""
    return shutil.which(tool) or shutil.which(tool, path=_PLACES)


def capability(probed: dict[str, Any]) -> str | None:
    """The GPU's compute capability, as ``"9.0"``: the driver's word, else torch's."""
    smi = probed.get("tools", {}).get("nvidia-smi") or ""
    if match := re.search(r"\b(\d+\.\d)\s*,\s*\d+ MiB", smi):
        return match[1]
    return probed.get("torch", {}).get("capability")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _tool(name: str, arguments: list[str]) -> str | None:
    path = which(name)
    if path is None:
        return None
    try:
        result = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{path}: {error}"
    lines = [line for line in (result.stdout + result.stderr).splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"\d+\.\d+", line)]
    return f"{path}: {(telling or lines or ['no output'])[0].strip()}"


def _torch() -> dict[str, Any]:
    try:
        import torch
    except Exception as error:  # whatever an import of a broken torch may raise
        return {"error": f"{type(error).__name__}: {error}"}
    about: dict[str, Any] = {"version": torch.__version__, "cuda": torch.version.cuda}
    try:
        if torch.cuda.is_available():
            properties = torch.cuda.get_device_properties(0)
            about |= {
                "gpu": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory": properties.total_memory,
                "multiprocessors": properties.multi_processor_count,
                "cudnn": torch.backends.cudnn.version(),
                "sum": float(torch.ones(8, device="cuda").sum()),
            }
        else:
            about["error"] = "torch sees no usable GPU"
    except Exception as error:  # a driver that does not fit, a device that is lost
        about["error"] = f"{type(error).__name__}: {error}"
    return about


if __name__ == "__main__":
    print(json.dumps(found()))
