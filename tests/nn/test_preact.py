"""The pre-activation blocks."""

from __future__ import annotations

import pytest
import survey_blocks
from nn_contract import ResidualContract

from fusedres.nn import PreActBottleneckBlock, PreActResidualBlock

PENDING = {"residual": "pending"}


class TestPreActResidualBlock(ResidualContract):
    plain, fused, last = survey_blocks.PreActResidualBlock, PreActResidualBlock, "conv2"


class TestPendingPreActResidualBlock(ResidualContract):
    plain, fused, last = survey_blocks.PendingPreActResidualBlock, PreActResidualBlock, "conv2"
    options = PENDING


class TestPreActBottleneckBlock(ResidualContract):
    plain, fused, last = survey_blocks.PreActBottleneckBlock, PreActBottleneckBlock, "conv3"


class TestPendingPreActBottleneckBlock(ResidualContract):
    plain, fused, last = survey_blocks.PendingPreActBottleneckBlock, PreActBottleneckBlock, "conv3"
    options = PENDING


@pytest.mark.parametrize("block", [PreActResidualBlock, PreActBottleneckBlock])
def test_the_shortcut_reads_the_input_or_the_pending_value(block):
    with pytest.raises(ValueError, match="residual must be 'input' or 'pending', got 'argument'"):
        block(8, 8, residual="argument")


def test_channels_alone():
    block = PreActResidualBlock(16)
    assert block.conv1.in_channels == block.conv2.out_channels == 16


def test_a_bottleneck_needs_channels_in_the_middle():
    with pytest.raises(ValueError, match="out_channels must be at least 4, the expansion, got 3"):
        PreActBottleneckBlock(3, 3)
