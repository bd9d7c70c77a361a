"""The steps that are timed: training and inference of a network, in float32 and bfloat16."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..patch import patch
from ..testing import Comparison, compare
from .rotation import copies

__all__ = ["FORMATS", "INFERENCE_BF16", "INFERENCE_FP32", "TRAIN_BF16", "TRAIN_FP32", "Batch", "Workload", "settle"]

FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
"""Layouts by their names."""


@dataclass(frozen=True)
class Batch:
    """Images, and their classes."""

    images: Tensor
    classes: Tensor
    layout: str = "channels_last"

    @classmethod
    def random(
        cls,
        size: int,
        resolution: int,
        seed: int = 0,
        num_classes: int = 1000,
        device: torch.device | str = "cpu",
        layout: str = "channels_last",
    ) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(size, 3, resolution, resolution, generator=generator)
        classes = torch.randint(num_classes, (size,), generator=generator)
        return cls(images.to(device).contiguous(memory_format=FORMATS[layout]), classes.to(device), layout)

    @classmethod
    def several(
        cls,
        size: int,
        resolution: int,
        num_classes: int = 1000,
        device: torch.device | str = "cpu",
        layout: str = "channels_last",
    ) -> tuple[Batch, ...]:
        """As many different ones as it takes for none to be in a cache when its turn comes."""
        first = cls.random(size, resolution, 0, num_classes, device, layout)
        others = range(1, copies(first.images.nbytes, device))
        return (first, *(cls.random(size, resolution, seed, num_classes, device, layout) for seed in others))

    def to(self, dtype: torch.dtype) -> Batch:
        """With images of this dtype."""
        return replace(self, images=self.images.to(dtype))

    def first(self, count: int) -> Batch:
        """The first images of it."""
        return replace(self, images=self.images[:count], classes=self.classes[:count])

    def shifted(self, seed: int) -> Tensor:
        """The images moved to the side by as many pixels: other numbers in the same shape and layout."""
        return self.images.roll(seed, 3).contiguous(memory_format=FORMATS[self.layout])

    def loss(self, logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), self.classes)

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Workload:
    """What a step does.

    Attributes:
        name: for tables.
        training: forward, loss, backward and an SGD step with momentum, or a forward without gradients.
        autocast: the dtype of autocast, if any.
        dtype: of the model and its input.
    """

    name: str
    training: bool
    autocast: torch.dtype | None = None
    dtype: torch.dtype = torch.float32

    def prepared(self, model: nn.Module) -> nn.Module:
        """A copy of ``model`` in the mode and the dtype of this workload."""
        return copy.deepcopy(model).train(self.training).to(self.dtype)

    def step(self, model: nn.Module, call: Callable[[Tensor], Tensor], batches: Sequence[Batch]) -> Callable[[], Any]:
        """The call to be timed, on the batches in turn.

        Args:
            model: prepared; has the parameters that an optimizer steps.
            call: what maps images to logits, as a rule ``model``.
        """
        images = itertools.cycle([batch.to(self.dtype) for batch in batches])
        return self._train_step(model, call, images) if self.training else self._inference_step(call, images)

    def stepper(self, batch: Batch) -> Callable[[nn.Module], Callable[[], Any]]:
        """Makes, from a prepared model, its step on one batch."""
        return lambda model: self.step(model, model, [batch])

    def _train_step(
        self, model: nn.Module, call: Callable[[Tensor], Tensor], batches: Iterator[Batch]
    ) -> Callable[[], Any]:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

        def step() -> None:
            batch = next(batches)
            with self.autocasting(batch):
                loss = batch.loss(call(batch.images))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def _inference_step(self, call: Callable[[Tensor], Tensor], batches: Iterator[Batch]) -> Callable[[], Any]:
        def step() -> None:
            batch = next(batches)
            with torch.no_grad():
                call(batch.images)

        return step

    def autocasting(self, batch: Batch) -> torch.autocast:
        """The context in which a forward runs."""
        return torch.autocast(batch.images.device.type, self.autocast, enabled=self.autocast is not None)

    def check(self, model: nn.Module, images: Callable[[int], Tensor], memory: str = "auto") -> Comparison:
        """The errors of ``model``, stock and fused, against float64, on the images that a seed gives."""
        return compare(
            model.train(self.training),
            partial(patch, memory=memory),
            lambda seed: [images(seed)],
            dtype=self.dtype,
            autocast=self.autocast,
            backward=self.training,
        )


TRAIN_BF16 = Workload("train step, bf16 autocast", training=True, autocast=torch.bfloat16)
TRAIN_FP32 = Workload("train step, fp32", training=True)
INFERENCE_BF16 = Workload("inference, bf16", training=False, dtype=torch.bfloat16)
INFERENCE_FP32 = Workload("inference, fp32", training=False)


def settle(model: nn.Module, images: Tensor) -> None:
    """Gives a network that was never trained running statistics that fit its weights, from one batch."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(images)
    for norm, momentum in zip(norms, before):
        norm.momentum = momentum
