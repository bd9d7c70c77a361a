"""From statistics to a norm's rows: a few numbers per channel, so all that counts is what a call costs."""

from __future__ import annotations

import pytest
import torch

from bench.ops.contestants import BACKENDS, Contest, check, group_of
from bench.shapes import BATCH, CHANNELS
from fusedres.ops.registry import OPS

OP = OPS["bn_norm"]


@pytest.mark.parametrize("contestant", BACKENDS)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("samples", [(), BATCH[:1]], ids=["batch", "samples"])
def test_bn_norm(race, channels, samples, contestant):
    group = group_of("bn_norm", torch.float32, (*samples, channels), "of samples" if samples else "")

    def contest():
        count = 1000.0
        stats = torch.stack((torch.randn(*samples, channels), count * (torch.rand(*samples, channels) + 0.1)))
        gamma, beta, mean, var = torch.rand(4, channels).unbind(0)
        arguments = [stats, count, gamma, beta, mean.clone(), var.clone(), 0.1, 1e-5]
        calls = {name: lambda given, name=name: lambda: OP.overload(name)(*given) for name in BACKENDS}
        return Contest(group, arguments, calls, {name: lambda name=name: check(OP, name, arguments) for name in calls})

    race(group, contestant, contest)
