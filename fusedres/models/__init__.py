"""Whole networks from stock PyTorch modules, fused on request.

Every function takes ``fused=True``, which applies :func:`fusedres.patch` to the network, or ``fused=False`` for the
stock one. Both have the same parameters and the same ``state_dict`` keys: torchvision's, where it has the network, else
timm's. The two classes, the networks of the survey, consist of the blocks of ``fusedres.nn``.
"""

from ..nn.init import init_weights
from .cifar import cifar_resnet, plain
from .densenet import densenet121, densenet161, densenet169, densenet201
from .ode import odenet
from .preresnet import cifar_preresnet, preresnet18, preresnet34, preresnet50, preresnet101, preresnet152
from .resnet import (
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    seresnet50,
    wide_resnet50_2,
)
from .survey import MyResNet, SurveyResNet
from .wrn import wrn

NETWORKS = (
    "cifar_preresnet",
    "cifar_resnet",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "odenet",
    "plain",
    "preresnet18",
    "preresnet34",
    "preresnet50",
    "preresnet101",
    "preresnet152",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "seresnet50",
    "wide_resnet50_2",
    "wrn",
)
"""The functions here that build a network without being told anything."""

__all__ = [
    "NETWORKS",
    "MyResNet",
    "SurveyResNet",
    "cifar_preresnet",
    "cifar_resnet",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "init_weights",
    "odenet",
    "plain",
    "preresnet18",
    "preresnet34",
    "preresnet50",
    "preresnet101",
    "preresnet152",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "seresnet50",
    "wide_resnet50_2",
    "wrn",
]
