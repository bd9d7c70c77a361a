"""Dense blocks, their layers, and the transition."""

from __future__ import annotations

import pytest
import survey_blocks
import torch
from nn_contract import BlockContract
from torchvision_shim import torchvision_models

from fusedres.nn import DenseBlock, DenseBottleneckBlock, DenseBottleneckLayer, Transition
from fusedres.testing import channels_last, compare

BLOCKS = {
    "four": {"num_layers": 4, "in_channels": 16, "growth_rate": 12},
    "odd": {"num_layers": 3, "in_channels": 7, "growth_rate": 5},
}


LAYERS = {
    "default": {"in_channels": 24, "growth_rate": 8},
    "narrow": {"in_channels": 9, "growth_rate": 6, "bn_size": 2},
}
TRANSITIONS = {"half": {"in_channels": 24, "out_channels": 12}, "more": {"in_channels": 8, "out_channels": 20}}


class TestDenseBlock(BlockContract):
    plain, fused, shapes = survey_blocks.DenseBlock, DenseBlock, BLOCKS


class TestDenseBottleneckBlock(BlockContract):
    plain, fused, shapes = survey_blocks.DenseBottleneckBlock, DenseBottleneckBlock, BLOCKS


class TestDenseBottleneckLayer(BlockContract):
    plain, fused, shapes = survey_blocks.DenseBottleneckLayer, DenseBottleneckLayer, LAYERS

    def test_several_tensors_are_concatenated(self, shape):
        layer = DenseBottleneckLayer(**shape).eval()
        x = self.inputs(shape)(0)[0]
        assert torch.equal(layer([x[:, :4], x[:, 4:]]), layer(x))


class TestTransition(BlockContract):
    plain, fused, shapes = survey_blocks.Transition, Transition, TRANSITIONS


def test_a_transition_halves_the_channels():
    assert Transition(24)(channels_last((2, 24, 7, 8))).shape == (2, 12, 3, 4)


def test_a_dense_block_of_torchvisions():
    densenet = torchvision_models().densenet
    theirs = torch.nn.Sequential(densenet._DenseBlock(3, 16, 4, 8, 0.0), densenet._Transition(40, 20))

    def fuse(stock):
        ours = torch.nn.Sequential(DenseBottleneckBlock(3, 16, 8, bias=False), Transition(40, bias=False))
        ours.load_state_dict(stock.state_dict())
        return ours.to(stock[1].conv.weight.dtype)

    compare(theirs, fuse, lambda seed: [channels_last((4, 16, 12, 12), seed=seed)]).check()


@pytest.mark.parametrize("block", [DenseBottleneckLayer, DenseBottleneckBlock])
def test_dropout_of_new_features(block):
    arguments = {"in_channels": 16, "growth_rate": 8, "dropout": 0.25}
    arguments |= {"num_layers": 1} if block is DenseBottleneckBlock else {}
    layer = block(**arguments)
    x = channels_last((8, 16, 16, 16))
    new = layer.train()(x)[:, -8:]
    dropped = float((new == 0).float().mean())
    assert dropped == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / new.numel()) ** 0.5)
    assert (layer.eval()(x)[:, -8:] != 0).all()


@pytest.mark.parametrize("block", [DenseBlock, DenseBottleneckBlock])
@pytest.mark.parametrize("name", ["num_layers", "growth_rate"])
def test_nothing_to_add_is_refused(block, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        block(**{"num_layers": 2, "in_channels": 4, "growth_rate": 4, name: 0})
