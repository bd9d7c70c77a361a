"""The wide block and its dropout."""

from __future__ import annotations

import pytest
import survey_blocks
import torch
from nn_contract import SHAPES, ResidualContract
from torch import Tensor, nn

from fusedres.nn import WideResidualBlock
from fusedres.ops.dropout import draw_seed, keep_scale
from fusedres.testing import channels_last, compare


class TestWideResidualBlock(ResidualContract):
    plain, fused, last = survey_blocks.WideResidualBlock, WideResidualBlock, "conv2"

    def test_dropout_is_for_training(self, shape):
        plain = self.plain(**shape, dropout=0.5).eval()
        compare(plain, self.fuse(shape, dropout=0.5), self.inputs(shape), backward=False).check()

    @pytest.mark.parametrize("run", [{}, {"autocast": torch.bfloat16}], ids=str)
    def test_dropout_with_the_mask_of_its_seed(self, shape, run):
        plain = self.plain(**shape).train()
        plain.dropout = _FromSeed(0.3)
        plain.register_forward_pre_hook(lambda *_: torch.manual_seed(0) and None)

        def fuse(stock: nn.Module) -> nn.Module:
            block = self.fuse(shape, dropout=0.3)(stock)
            block.register_forward_pre_hook(lambda *_: torch.manual_seed(0) and None)
            return block

        compare(plain, fuse, self.inputs(shape, **run), **run).check()


class _FromSeed(nn.Module):
    """Dropout by the mask that fusedres draws."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return x * keep_scale(x.shape, self.p, draw_seed(), x.dtype, x.device)


def test_how_often_elements_are_dropped():
    """With a second convolution that only picks one pixel, the output shows the mask."""
    block = WideResidualBlock(8, 8, dropout=0.3, bias=False).train()
    with torch.no_grad():
        block.bn2.weight.zero_()
        block.bn2.bias.fill_(1)  # what dropout sees is one everywhere
        nn.init.dirac_(block.conv2.weight)
    x = channels_last((16, 8, 32, 32))
    dropped = (block(x) - x).flatten()
    kept = dropped > 0.5
    torch.testing.assert_close(dropped, kept * (1 / 0.7), atol=1e-5, rtol=0)
    count = kept.numel()
    assert abs(int(kept.sum()) - 0.7 * count) < 5 * (0.3 * 0.7 * count) ** 0.5
    again = (block(x) - x).flatten() > 0.5
    assert abs(int((kept & again).sum()) - 0.49 * count) < 5 * (0.49 * 0.51 * count) ** 0.5


def test_everything_dropped_leaves_the_shortcut_and_the_bias():
    block = WideResidualBlock(**SHAPES["identity"], dropout=1.0).train()
    x = channels_last((2, 24, 6, 6))
    torch.testing.assert_close(block(x), x + block.conv2.bias[:, None, None])


@pytest.mark.parametrize("p", [-0.1, 1.1])
def test_other_probabilities_are_refused(p):
    with pytest.raises(ValueError, match="between 0 and 1"):
        WideResidualBlock(8, 8, dropout=p)
