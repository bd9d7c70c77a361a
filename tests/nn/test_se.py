"""Squeeze-and-excitation, on its own and in the bottleneck."""

from __future__ import annotations

import pytest
import survey_blocks
from nn_contract import SHAPES, BlockContract, ResidualContract
from torchvision_shim import timm_models

from fusedres.nn import SEBlock, SEBottleneckBlock
from fusedres.testing import channels_last, compare

EXCITED = {name: {**arguments, "reduction": 4} for name, arguments in SHAPES.items()}

GATES = {"default": {"channels": 48}, "little": {"channels": 12, "reduction": 3}}


class TestSEBlock(BlockContract):
    plain, fused, has_bias, shapes = survey_blocks.SEBlock, SEBlock, False, GATES


class TestSEBottleneckBlock(ResidualContract):
    plain, fused, last, shapes = survey_blocks.SEBottleneckBlock, SEBottleneckBlock, "se", EXCITED


@pytest.mark.parametrize("stage, index", [("layer1", 0), ("layer1", 1), ("layer2", 0)])
def test_timms_block(stage, index):
    timm = timm_models()
    theirs = getattr(timm.resnet.ResNet(timm.resnet.Bottleneck, (2, 1, 1, 1), block_args={"attn_layer": "se"}), stage)
    block = theirs[index]
    timm.resnet.nn.init.ones_(block.bn3.weight)  # timm starts it from zero, and nothing of the branch would show

    def fuse(stock):
        out_channels, in_channels = stock.conv3.out_channels, stock.conv1.in_channels
        ours = SEBottleneckBlock(in_channels, out_channels, 2 if stage == "layer2" else 1, bias=False)
        ours.load_state_dict(stock.state_dict())
        return ours.to(stock.conv1.weight.dtype)

    compare(block, fuse, lambda seed: [channels_last((2, block.conv1.in_channels, 10, 10), seed=seed)]).check()


def test_there_is_always_a_channel_between_the_layers():
    assert SEBlock(8).fc1.out_channels == 1


def test_a_reduction_of_nothing_is_refused():
    with pytest.raises(ValueError, match="reduction must be at least 1, got 0"):
        SEBlock(8, 0)
