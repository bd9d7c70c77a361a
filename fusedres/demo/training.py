"""A short real training: a CIFAR ResNet on handwritten digits, the same seed for every run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .. import models
from ..patch import patch
from ..select import backend_for
from .data import Digits

__all__ = ["Step", "Training", "deviation", "fit", "train"]

_BATCH = 64


@dataclass(frozen=True)
class Training:
    """The loss of every step, the share of test images that are classified rightly, and the seconds it took."""

    losses: tuple[float, ...]
    accuracy: float
    seconds: float


def train(
    data: Digits,
    epochs: int,
    *,
    fused: bool,
    memory_format: torch.memory_format = torch.channels_last,
) -> Training:
    """Trains from seed 0: the same weights and the same batches in the same order, whatever the other arguments.

    Images this small would run as stock, so the fused kernels are forced: it is their numbers that are to be seen.
    """
    torch.manual_seed(0)
    model = models.cifar_resnet(20, in_channels=1, fused=False).to(memory_format=memory_format)
    if fused:
        patch(model, backend=backend_for("cpu", torch.float32))
    start = perf_counter()
    losses = tuple(step.loss for step in fit(model, data, epochs, memory_format=memory_format))
    seconds = perf_counter() - start
    with torch.no_grad():
        predicted = model.eval()(data.test_images.contiguous(memory_format=memory_format)).argmax(1)
    return Training(losses, (predicted == data.test_classes).float().mean().item(), seconds)


class Step(NamedTuple):
    """A step of a training: its loss, and the share of its images that were classified wrongly, before the update."""

    loss: float
    error: float


def fit(
    model: nn.Module,
    data: Digits,
    epochs: int,
    *,
    batch: int = _BATCH,
    rate: float = 0.02,
    memory_format: torch.memory_format = torch.channels_last,
) -> Iterator[Step]:
    """Trains ``model`` by SGD with momentum on a cosine schedule, and yields every step. Incomplete batches are left
    out; the order is drawn from torch's generator."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (len(data.train_images) // batch))
    for _ in range(epochs):
        for chosen in torch.randperm(len(data.train_images)).split(batch):
            if len(chosen) < batch:
                continue
            images, classes = data.train_images[chosen], data.train_classes[chosen]
            logits = model(images.contiguous(memory_format=memory_format))
            loss = F.cross_entropy(logits, classes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            yield Step(loss.item(), float((logits.argmax(1) != classes).float().mean()))


def deviation(a: Training, b: Training) -> float:
    """The largest difference between two loss curves."""
    return max(abs(x - y) for x, y in zip(a.losses, b.losses))
