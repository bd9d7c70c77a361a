"""From the squeeze to the gate: a few values per sample, so all that counts is what a call costs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bench.ops.contestants import affine_rows, check
from fusedres.benchmarking.shapes import CHANNELS
from fusedres.ops.activations import RELU
from fusedres.ops.registry import OPS

OP = OPS["excite"]


@pytest.mark.parametrize("contestant", ["eager", "reference"])
@pytest.mark.parametrize("channels", CHANNELS)
def test_excite(race, channels, contestant):
    hidden, rows = max(channels // 16, 1), affine_rows(channels)
    means, w1, w2 = torch.randn(8, channels), torch.randn(hidden, channels), torch.randn(channels, hidden)
    arguments = [means, rows, w1, None, w2, None, RELU.code, RELU.param, "sigmoid", None]
    check(OP, "reference", arguments)

    def eager():
        return torch.sigmoid(F.linear(torch.relu(F.linear(rows[2] * means + rows[3], w1)), w2))

    call = eager if contestant == "eager" else lambda: OP.overload("reference")(*arguments)
    race(f"excite {channels}", call, dtype=torch.float32)
