"""``J - I`` against Jacobians written out."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

import fusedres
from fusedres.analysis import depth_network, jacobian_identity
from fusedres.cli import main


def exact(block: nn.Module, x: Tensor) -> Tensor:
    """The singular values of ``J - I``."""
    with fusedres.use_backend("stock"):
        jacobian = torch.autograd.functional.jacobian(block, x).reshape(x.numel(), x.numel())
    return torch.linalg.svdvals(jacobian - torch.eye(x.numel(), dtype=x.dtype))


BLOCKS = {
    "this library's": lambda: fusedres.nn.ResidualBlock(3),
    "this library's bottleneck": lambda: fusedres.nn.BottleneckBlock(4, 4),
    "patched": lambda: fused(depth_network("residual", 8, fused=False).layer1[0]),
    "stock": lambda: depth_network("pre-activation", 8, fused=False).layer1[0],
    "plain, patched": lambda: fused(depth_network("plain", 8, fused=False).layer1[0]),
}


def fused(block: nn.Module) -> nn.Module:
    fusedres.patch(block)
    return block


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("training", [True, False])
def test_against_the_jacobian_itself(name, training):
    block = BLOCKS[name]().double().train(training)
    channels = next(m for m in block.modules() if isinstance(m, nn.Conv2d)).in_channels
    x = torch.randn(2, channels, 3, 3, dtype=torch.float64)
    values = exact(block, x)
    found = jacobian_identity(block, x, iterations=2000, tolerance=1e-9, probes=64)
    assert found.converged
    assert found.dimension == x.numel()
    assert found.spectral == pytest.approx(float(values[0]), rel=1e-4)
    # The estimator's standard deviation, from its variance 2 (|A A^T|_F^2 - sum of squared diagonal) per probe, at most
    deviation = float((2 * values.pow(4).sum() / 64).sqrt())
    assert abs(found.frobenius**2 - float(values.square().sum())) < 4 * deviation


def test_the_identity_is_at_no_distance():
    block = depth_network("pre-activation", 8).layer1[0]
    nn.init.zeros_(block.conv2.weight)
    found = jacobian_identity(block, torch.randn(2, 16, 4, 4))
    assert (found.spectral, found.frobenius, found.rms) == (0, 0, 0)


def test_a_multiple_of_the_identity():
    scale = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.constant_(scale.weight, 3.0)
    found = jacobian_identity(scale, torch.randn(2, 1, 5, 5))
    assert (found.spectral, found.rms) == pytest.approx((2, 2))


def test_an_output_that_does_not_depend_on_the_input():
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ones_like(x).requires_grad_()

    assert jacobian_identity(Constant(), torch.randn(4)).spectral == pytest.approx(1)


def test_the_block_is_left_as_it_was():
    block = fusedres.nn.ResidualBlock(3)
    before = {key: value.clone() for key, value in block.state_dict().items()}
    jacobian_identity(block, torch.randn(2, 3, 4, 4), iterations=3)
    assert all(torch.equal(before[key], value) for key, value in block.state_dict().items())
    assert all(p.grad is None for p in block.parameters())


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"from \(1, 2, 4, 4\) to \(1, 4, 4, 4\)"):
        jacobian_identity(nn.Conv2d(2, 4, 1), torch.randn(1, 2, 4, 4))
    with pytest.raises(ValueError, match="at least 1, got 0 and 8"):
        jacobian_identity(nn.Identity(), torch.randn(2), iterations=0)


def test_the_command(tmp_path, capsys):
    figure, results = tmp_path / "figure.png", tmp_path / "results.json"
    options = ["--depth", "14", "--batch", "2", "--iterations", "2", "--out", str(figure), "--json", str(results)]
    assert main(["jacobian-identity", *options]) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert list(json.loads(results.read_text())["blocks"]["plain"]) == ["1", "2", "4", "6"]
    assert "pre-activation" in capsys.readouterr().out
    assert main(["jacobian-identity", "--depth", "9"]) == 2
