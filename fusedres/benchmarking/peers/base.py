"""What a contestant is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from ..workloads import Workload

__all__ = ["Peer", "not_installed"]


class Peer(ABC):
    """A way to run a network.

    Attributes:
        name: for tables.
        trains, infers: which workloads it can run.
        devices: the kinds of device that it runs on.
        seconds: about how long it takes to prepare ResNet-50 on two cores with cold caches, for a training step and
            for inference.
        foreign: whether a failure of it is its own matter, to be told, and not an error of ours.
        schedule: which schedule of :mod:`fusedres.analysis.traffic` is the model of what it does, if any.
    """

    name: str
    trains = True
    infers = True
    devices: tuple[str, ...] = ("cpu", "cuda")
    seconds: tuple[float, float] = (0.5, 0.5)
    foreign = True
    schedule: str | None = None

    def available(self) -> str | None:
        """``None`` where what it needs is installed, else what is missing."""
        return None

    def refuses(self, workload: Workload, device: torch.device) -> str | None:
        """``None`` where it can run this workload there, else the reason, in words."""
        if workload.training and not self.trains:
            return "inference only"
        if not workload.training and not self.infers:
            return "training only"
        if device.type not in self.devices:
            return f"runs on {' and '.join(self.devices)} only"
        return self.available()

    @abstractmethod
    def prepare(self, model: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
        """What maps images to logits.

        Args:
            model: a stock network in its mode, dtype and layout; the peer's own, which it may change. Where it trains,
                the parameters stay those of ``model``.
            example: images of the shape, dtype and layout that will come.
        """

    def cached(self) -> bool:
        """Whether the last preparation found its work done on disk."""
        return False


def not_installed(*packages: str) -> str | None:
    """Which of ``packages`` is not installed, in words; ``None`` where all are."""
    missing = [package for package in packages if not _found(package)]
    return f"{', '.join(missing)} not installed" if missing else None


def _found(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # of the package that it would be in
        return False
