"""The post-activation blocks."""

from __future__ import annotations

import pytest
import survey_blocks
from nn_contract import ResidualContract

from fusedres.nn import BottleneckBlock, ResidualBlock
from fusedres.testing import channels_last


class TestResidualBlock(ResidualContract):
    plain, fused, last = survey_blocks.ResidualBlock, ResidualBlock, "bn2"


class TestBottleneckBlock(ResidualContract):
    plain, fused, last = survey_blocks.BottleneckBlock, BottleneckBlock, "bn3"


def test_channels_alone():
    block = ResidualBlock(16)
    assert block.conv1.in_channels == block.conv2.out_channels == 16
    assert block(channels_last((2, 16, 5, 5))).shape == (2, 16, 5, 5)


def test_a_bottleneck_needs_channels_in_the_middle():
    with pytest.raises(ValueError, match="out_channels must be at least 4, the expansion, got 3"):
        BottleneckBlock(3, 3)
