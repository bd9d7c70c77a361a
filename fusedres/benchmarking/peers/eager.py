"""Stock PyTorch, op by op, in either layout."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ..workloads import FORMATS
from .base import Peer

__all__ = ["Eager"]


class Eager(Peer):
    """The network as it is. In the other layout than the images', the conversion of the images is part of a call."""

    foreign = False
    schedule = "stock"

    def __init__(self, layout: str) -> None:
        self._format = FORMATS[layout]
        self.name = "eager" if layout == "channels_last" else f"eager, {layout}"

    def prepare(self, model: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
        model.to(memory_format=self._format)
        return lambda images: model(images.contiguous(memory_format=self._format))
