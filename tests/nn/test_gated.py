"""The skip connections against the survey's formulas written out in plain PyTorch."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from fusedres.benchmarking.memory import saved_bytes
from fusedres.nn import HighwaySkip, IdentitySkip, ProjectionSkip, ResidualBlock, SparseSkip
from fusedres.testing import channels_last, compare

CHANNELS = 12
THRESHOLD = 0.55


class Plain(nn.Module):
    """``fn`` and the other modules of a skip, under the names that the survey gives them."""

    def __init__(self, kind: str, linear: bool = False) -> None:
        super().__init__()
        self.kind = kind
        self.fn = _branch(linear, CHANNELS + 4 if kind == "projection" else CHANNELS)
        if kind == "projection":
            self.projection = _layer(linear, CHANNELS + 4)
        elif kind != "identity":
            self.gate = _layer(linear, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "identity":
            return self.fn(x) + x
        if self.kind == "projection":
            return self.fn(x) + self.projection(x)
        gate = torch.sigmoid(self.gate(x))
        if self.kind != "highway":
            mask = (gate > THRESHOLD).to(gate.dtype)
            gate = mask + (gate - gate.detach()) if self.kind == "straight" else mask
        return gate * self.fn(x) + (1 - gate) * x


def _layer(linear: bool, channels: int) -> nn.Module:
    return nn.Linear(CHANNELS, channels) if linear else nn.Conv2d(CHANNELS, channels, 1)


def _branch(linear: bool, channels: int) -> nn.Module:
    if linear:
        return nn.Sequential(nn.Linear(CHANNELS, channels), nn.ReLU())
    return nn.Sequential(nn.Conv2d(CHANNELS, channels, 3, padding=1), nn.BatchNorm2d(channels))


KINDS = {
    "highway": lambda fn, linear: HighwaySkip(fn, CHANNELS, linear=linear),
    "sparse": lambda fn, linear: SparseSkip(fn, CHANNELS, THRESHOLD, linear=linear),
    "straight": lambda fn, linear: SparseSkip(fn, CHANNELS, THRESHOLD, True, linear=linear),
    "projection": lambda fn, linear: ProjectionSkip(fn, _layer(linear, CHANNELS + 4)),
    "identity": lambda fn, linear: IdentitySkip(fn),
}


def ours(plain: Plain, linear: bool = False) -> nn.Module:
    module = KINDS[plain.kind](copy.deepcopy(plain.fn), linear).train(plain.training)
    module.to(next(plain.parameters()).dtype).load_state_dict(plain.state_dict())
    return module


def images(seed: int) -> list[Tensor]:
    return [channels_last((4, CHANNELS, 9, 8), seed=seed)]


@pytest.mark.parametrize("run", [{}, {"dtype": torch.bfloat16}, {"autocast": torch.bfloat16}], ids=str)
@pytest.mark.parametrize("mode", ["train", "infer"])
@pytest.mark.parametrize("kind", KINDS)
def test_against_the_survey(kind, mode, run):
    plain = Plain(kind).train(mode == "train")
    compare(plain, ours, images, backward=mode == "train", **run).check()


@pytest.mark.parametrize("kind", KINDS)
def test_linear_gates(kind):
    plain = Plain(kind, linear=True)
    compare(plain, lambda p: ours(p, True), lambda seed: [torch.randn(33, CHANNELS)]).check()


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_keys_both_ways(kind, linear):
    plain = Plain(kind, linear)
    block = KINDS[kind](_branch(linear, CHANNELS + 4 if kind == "projection" else CHANNELS), linear)
    assert list(block.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(block.state_dict())
    block.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_copies_files_and_empty_batches(kind):
    block = ours(Plain(kind)).eval()
    (x,) = images(0)
    with torch.no_grad():
        expected = block(x)
        file = io.BytesIO()
        torch.save(block, file)
        file.seek(0)
        for other in (copy.deepcopy(block), torch.load(file, weights_only=False)):
            assert torch.equal(other(x), expected)
    out = block(x[:0])
    out.sum().backward()
    assert out.shape == (0, *expected.shape[1:])


def test_a_gate_without_bias():
    assert [name for name, _ in HighwaySkip(nn.Identity(), 4, bias=False).named_parameters()] == ["gate.weight"]
    assert SparseSkip(nn.Identity(), 4, linear=True, bias=False).gate.bias is None


def test_a_sparse_gate_learns_only_straight_through():
    (x,) = images(0)
    for straight_through in (False, True):
        block = SparseSkip(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), CHANNELS, 0.5, straight_through)
        block(x).sum().backward()
        assert (block.gate.weight.grad is not None) is straight_through
        assert block.fn.weight.grad is not None


def test_a_threshold_of_zero_or_one_is_the_branch_or_the_skip():
    (x,) = images(0)
    fn = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
    with torch.no_grad():
        assert torch.equal(SparseSkip(fn, CHANNELS, 0.0)(x), fn(x))
        assert torch.equal(SparseSkip(fn, CHANNELS, 1.0)(x), x)


@pytest.mark.parametrize("kind", ["highway", "sparse", "straight"])
def test_fewer_bytes_are_saved(kind):
    plain = Plain(kind)
    block = ours(plain)
    x = images(0)[0].requires_grad_()
    assert saved_bytes(block, lambda: block(x)) < saved_bytes(plain, lambda: plain(x))


@pytest.mark.parametrize("kind", KINDS)
def test_compiled(kind):
    block = ours(Plain(kind)).eval()
    (x,) = images(0)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(block, backend="eager", fullgraph=True)(x), block(x))


def test_around_a_fused_block():
    fn = ResidualBlock(CHANNELS)
    block = HighwaySkip(fn, CHANNELS)
    (x,) = images(0)
    gate = torch.sigmoid(block.gate(x))
    expected = gate * copy.deepcopy(fn)(x) + (1 - gate) * x
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_branches_of_another_shape_are_refused(kind):
    wrong = nn.Conv2d(CHANNELS, CHANNELS, 3)  # without padding
    with pytest.raises(ValueError, match=r"\(4, 1[26], 9, 8\).*\(4, 12, 7, 6\)|\(4, 12, 7, 6\).*\(4, 1[26], 9, 8\)"):
        KINDS[kind](wrong, False)(*images(0))
