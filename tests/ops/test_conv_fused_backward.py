"""References of the fused convolutions' gradients against autograd in float64: bn_grad_rows, conv_fused_dgrad
and conv_fused_wgrad. The kernels' tests are under tests/triton/cases."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fusedres.ops.bn_norm import BN_NORM
from fusedres.ops.bn_stats import BN_STATS
from fusedres.ops.conv_fused_backward import BN_GRAD_ROWS, CONV_FUSED_DGRAD, CONV_FUSED_WGRAD
from fusedres.ops.join_backward import JOIN_BACKWARD_REDUCE
from fusedres.testing import channels_last

GEOMETRY = ([1, 1], [1, 1], [1, 1])


class Case:
    """``norm(conv(silu(norm(x))))`` with batch statistics, and the gradient behind it."""

    def __init__(self, training=True, dtype=torch.float64):
        generator = torch.Generator().manual_seed(1)
        self.training = training
        self.x, self.g = channels_last((2, 6, 5, 4), dtype, 2), channels_last((2, 5, 5, 4), dtype, 3)
        self.weight = torch.randn(5, 6, 3, 3, generator=generator).to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        self.before, self.behind = (torch.randn(2, c, generator=generator).to(wide) + 1.5 for c in (6, 5))
        self.norm = self.rows(self.x, self.before)
        value = F.silu(self.norm[2, :, None, None] * self.x + self.norm[3, :, None, None]).to(dtype)
        self.y = F.conv2d(value, self.weight, None, *GEOMETRY)
        norm = self.rows(self.y, self.behind)
        sums = JOIN_BACKWARD_REDUCE.reference(self.g, self.y, norm, None, None, 0, 0.0, False)[0]
        self.count = self.y.numel() / 5
        self.grad_rows = BN_GRAD_ROWS.reference(norm, sums if training else None, self.count)

    def rows(self, x, affine):
        if not self.training:
            return BN_NORM.reference(None, 1.0, *affine, *self.constants(affine), 0.0, 1e-5)
        return BN_NORM.reference(BN_STATS.reference(x), x.numel() / x.shape[1], *affine, None, None, 0.0, 1e-5)

    @staticmethod
    def constants(affine):
        return torch.full_like(affine[0], 0.25), torch.full_like(affine[0], 2.0)

    def autograd(self, addend):
        """Gradients of the pending value's argument, its norm's affine, and the weight."""
        leaves = [t.clone().requires_grad_() for t in (self.x, self.before, self.weight)]
        x, (gamma, beta), weight = leaves
        z = F.batch_norm(x, *self.constants(self.before), gamma, beta, self.training, 0.0, 1e-5)
        value = F.silu(z)
        y = F.conv2d(value, weight, None, *GEOMETRY)
        out = F.batch_norm(y, *self.constants(self.behind), *self.behind, self.training, 0.0, 1e-5)
        return torch.autograd.grad((out, value), (z, leaves[1], weight), (self.g, addend))


@pytest.mark.parametrize("training", [True, False])
def test_against_autograd(training):
    case = Case(training)
    addend = channels_last((2, 6, 5, 4), torch.float64, 5)
    dz, daffine, _ = case.autograd(addend)
    operands = (case.g, case.y, case.grad_rows)
    dx, sums = CONV_FUSED_DGRAD.reference(*operands, case.weight, case.x, case.norm, 4, 0.0, *GEOMETRY, addend)
    torch.testing.assert_close(dx, dz, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(sums, daffine.flip(0), rtol=1e-10, atol=1e-10)
    _, _, dweight = case.autograd(torch.zeros_like(addend))
    out = torch.empty_like(case.weight)
    CONV_FUSED_WGRAD.reference(*operands, case.x, case.norm, 4, 0.0, *GEOMETRY, out)
    torch.testing.assert_close(out, dweight, rtol=1e-10, atol=1e-10)


def test_rows_without_the_raw_output_are_refused():
    case = Case()
    with pytest.raises(ValueError, match="y must be given"):
        CONV_FUSED_DGRAD.reference(case.g, None, case.grad_rows, case.weight, case.x, None, 0, 0.0, *GEOMETRY)
