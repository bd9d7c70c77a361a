"""``torchvision`` where its compiled operators are missing, as they are beside a CPU build of PyTorch.

Its import registers fakes for operators that its compiled library would have defined, and fails without it. Its models
need none of them.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch

__all__ = ["import_with_torchvision"]

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_libraries: list[torch.library.Library] = []


def import_with_torchvision(name: str) -> ModuleType:
    """The module ``name``, which is torchvision's or imports it, as timm does.

    Raises:
        ImportError: where it or torchvision is not installed.
    """
    try:
        return import_module(name)
    except RuntimeError as error:
        if "does not exist" not in str(error):
            raise
    # A definition lives as long as its library.
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(operator + _SCHEMA)
    _libraries.append(library)
    return import_module(name)
