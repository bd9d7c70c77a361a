"""What ``tests/cuda/test_zoo.py`` runs on a GPU, with the CPU in its place."""

from __future__ import annotations

import pytest
import torch
from device_zoo import NETWORKS, check_network

from fusedres import env


@pytest.mark.skipif(env.library_missing() is not None, reason=str(env.library_missing()))
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_network(training):
    check_network("cifar_resnet", torch.float32, training, "cpu", "cpu")


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_can_be_built(name):
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in NETWORKS[name]().modules())
