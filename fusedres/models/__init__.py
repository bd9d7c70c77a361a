"""Whole networks from stock PyTorch modules, fused on request.

Every function takes ``fused=True``, which applies :func:`fusedres.patch` to the network, or ``fused=False`` for the
stock one. Both have the same parameters and the same ``state_dict`` keys: torchvision's, where it has the network.
"""

from ..nn.init import init_weights
from .cifar import cifar_resnet
from .ode import odenet
from .resnet import (
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    wide_resnet50_2,
)

NETWORKS = (
    "cifar_resnet",
    "odenet",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "wide_resnet50_2",
)
"""The functions here that build a network without being told anything."""

__all__ = [
    "NETWORKS",
    "cifar_resnet",
    "init_weights",
    "odenet",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "wide_resnet50_2",
]
