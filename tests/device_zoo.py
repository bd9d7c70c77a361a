"""Whole networks on a device against float64 there, for a GPU and, to see that it works, for a CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torchvision_shim import timm_models, torchvision_models

from fusedres import models
from fusedres.patch import patch
from fusedres.testing import channels_last, compare

__all__ = ["NETWORKS", "check_network"]


def ours(name: str, *arguments: int) -> Callable[[], nn.Module]:
    return lambda: getattr(models, name)(*arguments, fused=False)


def torchvision(name: str) -> Callable[[], nn.Module]:
    return lambda: getattr(torchvision_models(), name)(num_classes=7)


def timm(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        timm_models()
        from timm import create_model

        return create_model(name, num_classes=7)

    return build


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "cifar_resnet": ours("cifar_resnet", 14),
    "cifar_preresnet": ours("cifar_preresnet", 20),
    "wrn": ours("wrn", 16, 2),
    "preresnet18": ours("preresnet18"),
    "seresnet50": ours("seresnet50"),
    "torchvision resnet18": torchvision("resnet18"),
    "torchvision resnet50": torchvision("resnet50"),
    "torchvision resnext50_32x4d": torchvision("resnext50_32x4d"),
    "torchvision wide_resnet50_2": torchvision("wide_resnet50_2"),
    "torchvision densenet121": torchvision("densenet121"),
    "timm resnetv2_50": timm("resnetv2_50"),
    "timm seresnet50": timm("seresnet50"),
    "timm regnety_002": timm("regnety_002"),
}
"""Those without chance in them, whose draws would differ from stock PyTorch's."""


def check_network(name: str, dtype: torch.dtype, training: bool, device: str, backend: str) -> None:
    """Fuses at least one site, and holds every output, gradient and running statistic to its budget."""
    torch.manual_seed(0)
    model = NETWORKS[name]().train(training).to(device, memory_format=torch.channels_last)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.2, 0.2)

    def fuse(module: nn.Module) -> None:
        assert patch(module, backend=backend).fused

    # Without a backward where nothing is trained: gradients of a network in evaluation are another test's.
    draw = lambda seed: [channels_last((8, 3, 64, 64), seed=seed).to(device)]  # noqa: E731
    compare(model, fuse, draw, dtype=dtype, backward=training).check()
