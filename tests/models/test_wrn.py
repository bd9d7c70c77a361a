"""The wide networks: the paper's depths and sizes, and the numbers of blocks stacked by hand."""

from __future__ import annotations

import pytest
import torch
from network_agreement import assert_agrees
from survey_blocks import WideResidualBlock
from torch import Tensor, nn

from fusedres import models


class ByHand(nn.Module):
    """WRN-16-2."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        for i, (c, k, stride) in enumerate(((16, 32, 1), (32, 64, 2), (64, 128, 2)), 1):
            blocks = WideResidualBlock(c, k, stride, bias=False), WideResidualBlock(k, k, bias=False)
            self.add_module(f"layer{i}", nn.Sequential(*blocks))
        self.bn1 = nn.BatchNorm2d(128)
        self.fc = nn.Linear(128, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(torch.relu(self.bn1(x)).mean((2, 3)))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_numbers(training, fused):
    ours = lambda: models.wrn(16, 2, num_classes=7, fused=False)  # noqa: E731
    assert_agrees(ByHand(), ours, fused=fused, training=training, size=12)


# Parameters in millions, from Zagoruyko and Komodakis (2016), table 5.
@pytest.mark.parametrize("depth, width, millions", [(40, 4, 8.9), (16, 8, 11.0), (28, 10, 36.5)])
def test_depth_and_size_are_the_papers(depth, width, millions):
    with torch.device("meta"):
        model = models.wrn(depth, width, fused=False)
    convolutions = [m for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and "shortcut" not in name]
    assert len(convolutions) + 3 == depth  # the paper counts the shortcuts' convolutions, and not the classifier
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


def test_dropout_is_for_training():
    model = models.wrn(10, 1, dropout=0.5)
    x = torch.randn(2, 3, 16, 16)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_blocks_that_start_as_their_shortcuts():
    block = models.wrn(16, 1, fused=False, zero_init_residual=True).layer1[1]
    x = torch.randn(2, 16, 4, 4)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize("depth", [4, 20, 27])
def test_other_depths_are_refused(depth):
    with pytest.raises(ValueError, match=rf"6n \+ 4.*got {depth}"):
        models.wrn(depth)


def test_no_width_is_refused():
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        models.wrn(28, 0)
