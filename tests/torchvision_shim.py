"""Packages of models for tests, which are skipped where a package is not installed."""

from __future__ import annotations

from importlib.util import find_spec
from types import ModuleType

import pytest

from fusedres.vision import import_with_torchvision

__all__ = ["timm_models", "torchvision_models", "torchvision_ops"]


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
    return import_with_torchvision(f"{package}.{name}")
