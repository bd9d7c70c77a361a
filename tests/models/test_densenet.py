"""The dense networks: torchvision's weights and numbers."""

from __future__ import annotations

import pytest
import torch
from network_agreement import assert_agrees
from torchvision_shim import torchvision_models

from fusedres import models
from fusedres.models.densenet import DenseNet

SIZES = (8, (2, 3, 2), 16)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_torchvisions_numbers(training, fused):
    theirs = torchvision_models().densenet.DenseNet(*SIZES, num_classes=7)
    assert_agrees(theirs, lambda: DenseNet(*SIZES, num_classes=7), fused=fused, training=training)


def test_the_same_seed_gives_torchvisions_weights():
    torch.manual_seed(0)
    theirs = torchvision_models().densenet.DenseNet(*SIZES)
    torch.manual_seed(0)
    ours = DenseNet(*SIZES)
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, ours.state_dict()[key]), key


def test_dropout_is_for_training():
    model = DenseNet(*SIZES, dropout=0.5)
    x = torch.randn(2, 3, 32, 32)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_options():
    model = models.densenet121(num_classes=5, in_channels=1)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 5)
