"""A short real training: a CIFAR ResNet on handwritten digits, the same seed for every run."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

import torch
import torch.nn.functional as F

from .. import models
from ..patch import patch
from ..select import backend_for
from .data import Digits

__all__ = ["Training", "deviation", "train"]

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
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (len(data.train_images) // _BATCH))
    losses = []
    start = perf_counter()
    for _ in range(epochs):
        for batch in torch.randperm(len(data.train_images)).split(_BATCH):
            if len(batch) < _BATCH:
                continue
            images = data.train_images[batch].contiguous(memory_format=memory_format)
            loss = F.cross_entropy(model(images), data.train_classes[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    seconds = perf_counter() - start
    with torch.no_grad():
        predicted = model.eval()(data.test_images.contiguous(memory_format=memory_format)).argmax(1)
    return Training(tuple(losses), (predicted == data.test_classes).float().mean().item(), seconds)


def deviation(a: Training, b: Training) -> float:
    """The largest difference between two loss curves."""
    return max(abs(x - y) for x, y in zip(a.losses, b.losses))
