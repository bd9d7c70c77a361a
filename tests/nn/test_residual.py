"""The residual blocks against the blocks as the survey writes them: numbers, keys, and what Module promises."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from fusedres.nn import BottleneckBlock, ResidualBlock, init_weights
from fusedres.testing import channels_last, compare


class PlainResidual(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=bias)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=bias)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.shortcut(x)
        out = self.conv1(x)
        out = self.bn1(out)
        out = torch.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        out += residual
        return torch.relu(out)


class PlainBottleneck(nn.Module):
    expansion = 4

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, bias: bool = True) -> None:
        super().__init__()
        mid = out_channels // self.expansion
        self.conv1 = nn.Conv2d(in_channels, mid, 1, bias=bias)
        self.bn1 = nn.BatchNorm2d(mid)
        self.conv2 = nn.Conv2d(mid, mid, 3, stride=stride, padding=1, bias=bias)
        self.bn2 = nn.BatchNorm2d(mid)
        self.conv3 = nn.Conv2d(mid, out_channels, 1, bias=bias)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=bias), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        out = torch.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += self.shortcut(x)
        return torch.relu(out)


PAIRS = {"residual": (PlainResidual, ResidualBlock), "bottleneck": (PlainBottleneck, BottleneckBlock)}
SHAPES = {"identity": (32, 32, 1), "channels": (24, 48, 1), "stride": (32, 32, 2)}


def fused_form(kind: str, shape: str, **options):
    """Makes the fused block with a plain one's state."""

    def make(plain: nn.Module) -> nn.Module:
        block = PAIRS[kind][1](*SHAPES[shape], **options).train(plain.training)
        block.load_state_dict(plain.state_dict())
        return block.to(next(plain.parameters()).dtype)

    return make


def inputs_of(shape: str, size: int = 16):
    return lambda seed: [channels_last((4, SHAPES[shape][0], size, size), seed=seed)]


@pytest.mark.parametrize("run", [{}, {"dtype": torch.bfloat16}, {"autocast": torch.bfloat16}], ids=str)
@pytest.mark.parametrize("mode", ["train", "frozen", "infer"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", PAIRS)
def test_against_the_survey(kind, shape, mode, run):
    plain = PAIRS[kind][0](*SHAPES[shape]).train(mode == "train")
    size = 24 if run else 16
    compare(plain, fused_form(kind, shape), inputs_of(shape, size), backward=mode != "infer", **run).check()


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", [{"bias": False}, {"memory": "low"}], ids=str)
def test_options(kind, shape, options):
    plain = PAIRS[kind][0](*SHAPES[shape], bias=options.get("bias", True)).train()
    compare(plain, fused_form(kind, shape, **options), inputs_of(shape)).check()


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("shape", SHAPES)
def test_keys_both_ways(kind, shape):
    plain, fused = (cls(*SHAPES[shape]) for cls in PAIRS[kind])
    assert list(fused.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(fused.state_dict())
    fused.load_state_dict(plain.state_dict())


def test_channels_alone():
    block = ResidualBlock(16)
    assert block.conv1.in_channels == block.conv2.out_channels == 16
    assert block(channels_last((2, 16, 5, 5))).shape == (2, 16, 5, 5)


@pytest.mark.parametrize("kind", PAIRS)
def test_copies_and_files(kind):
    block = PAIRS[kind][1](24, 48, 2).eval()
    x = channels_last((2, 24, 8, 8))
    with torch.no_grad():
        expected = block(x)
        file = io.BytesIO()
        torch.save(block, file)
        file.seek(0)
        for other in (copy.deepcopy(block), torch.load(file, weights_only=False)):
            assert torch.equal(other(x), expected)


def test_what_init_weights_does():
    model = nn.Sequential(nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24), ResidualBlock(24), BottleneckBlock(24, 48, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    init_weights(model)
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            fan_out = m.out_channels * m.kernel_size[0] * m.kernel_size[1]
            assert float(m.weight.detach().std()) == pytest.approx((2 / fan_out) ** 0.5, rel=0.2)
            assert not m.bias.any()
        elif isinstance(m, nn.BatchNorm2d):
            assert (m.weight == 1).all() and not m.bias.any()


def test_zeroing_the_last_gamma_makes_blocks_their_shortcuts():
    block, projection = ResidualBlock(24), BottleneckBlock(24, 48, 2)
    model = nn.Sequential(nn.BatchNorm2d(24), block, projection)
    init_weights(model, zero_last_gamma=True)
    assert not block.bn2.weight.any() and not projection.bn3.weight.any()
    for norm in (model[0], block.bn1, projection.bn1, projection.bn2, projection.shortcut[1]):
        assert (norm.weight == 1).all()
    x = channels_last((2, 24, 5, 5))
    torch.testing.assert_close(block(x), torch.relu(x))


def test_norms_without_parameters_are_left_alone():
    init_weights(nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.Linear(2, 2)), zero_last_gamma=True)
