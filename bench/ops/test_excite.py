"""From the squeeze to the gate: a few values per sample, so all that counts is what a call costs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bench.ops.contestants import COMPILED, Contest, affine_rows, check, group_of, nbytes
from bench.shapes import CHANNELS
from fusedres.ops.activations import RELU
from fusedres.ops.registry import OPS

OP = OPS["excite"]
BATCH = 8


@pytest.mark.parametrize("contestant", ["eager", COMPILED, "reference"])
@pytest.mark.parametrize("channels", CHANNELS)
def test_excite(race, channels, contestant):
    group = group_of("excite", torch.float32, (BATCH, channels))

    def eager(given):
        means, rows, w1, _, w2, *_ = given
        return lambda: torch.sigmoid(F.linear(torch.relu(F.linear(rows[2] * means + rows[3], w1)), w2))

    def contest():
        hidden, rows = max(channels // 16, 1), affine_rows(channels)
        means, w1, w2 = torch.randn(BATCH, channels), torch.randn(hidden, channels), torch.randn(channels, hidden)
        arguments = [means, rows, w1, None, w2, None, RELU.code, RELU.param, "sigmoid", None]
        calls = {"eager": eager, "reference": lambda given: lambda: OP.overload("reference")(*given)}
        checks = {"reference": lambda: check(OP, "reference", arguments)}
        return Contest(group, arguments, calls, checks, nbytes(means, rows, w1, w2, means)).with_compiled()

    race(group, contestant, contest)
