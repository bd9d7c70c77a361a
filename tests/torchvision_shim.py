"""Makes torchvision importable where its compiled operators are missing, as they are beside a CPU build of PyTorch."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch

__all__ = ["timm_models", "torchvision_models", "torchvision_ops"]

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_libraries: list[torch.library.Library] = []


def torchvision_models() -> ModuleType:
    """``torchvision.models``; skips the calling test where torchvision is not installed."""
    return _import("torchvision", "models")


def torchvision_ops() -> ModuleType:
    """``torchvision.ops``; skips the calling test where torchvision is not installed."""
    return _import("torchvision", "ops")


def timm_models() -> ModuleType:
    """``timm.models``; skips the calling test where timm or torchvision, which it imports, is not installed."""
    torchvision_models()
    return _import("timm", "models")


def _import(package: str, name: str) -> ModuleType:
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    try:
        return importlib.import_module(f"{package}.{name}")
    except RuntimeError as error:
        if "does not exist" not in str(error):
            raise
        _define_operators()
    return importlib.import_module(f"{package}.{name}")


def _define_operators() -> None:
    """Declares the operators that torchvision registers fakes for; a definition lives as long as its library."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(name + _SCHEMA)
    _libraries.append(library)
