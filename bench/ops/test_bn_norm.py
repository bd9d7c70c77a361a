"""From statistics to a norm's rows: a few numbers per channel, so all that counts is what a call costs."""

from __future__ import annotations

import pytest
import torch

from bench.ops.contestants import BACKENDS, check, require
from fusedres.benchmarking.shapes import CHANNELS
from fusedres.ops.registry import OPS

OP = OPS["bn_norm"]


@pytest.mark.parametrize("contestant", BACKENDS)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("samples", [(), (8,)], ids=["batch", "8 samples"])
def test_bn_norm(race, channels, samples, contestant):
    require(contestant, torch.float32)
    count = 1000.0
    stats = torch.stack((torch.randn(*samples, channels), count * (torch.rand(*samples, channels) + 0.1)))
    gamma, beta, mean, var = torch.rand(4, channels).unbind(0)
    arguments = [stats, count, gamma, beta, mean.clone(), var.clone(), 0.1, 1e-5]
    check(OP, contestant, arguments)
    race(
        f"bn_norm {channels}{', of samples' if samples else ''}",
        lambda: OP.overload(contestant)(*arguments),
        dtype=torch.float32,
    )
