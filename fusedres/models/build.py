"""What every function that builds a network ends with."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from ..patch import patch

__all__ = ["built"]

Network = TypeVar("Network", bound=nn.Module)


def built(model: Network, fused: bool) -> Network:
    """``model``, patched if ``fused``."""
    if fused:
        patch(model)
    return model
