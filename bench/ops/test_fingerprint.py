"""The sign that weights were written to: taken at every inference call, so all that counts is what a call costs."""

from __future__ import annotations

import pytest
import torch

from bench.ops.contestants import BACKENDS, Contest, group_of
from bench.shapes import CHANNELS
from fusedres.ops.registry import OPS

OP = OPS["fingerprint"]


@pytest.mark.parametrize("contestant", BACKENDS)
@pytest.mark.parametrize("channels", CHANNELS)
def test_fingerprint(race, channels, contestant):
    """Of a convolution's weight and its norm's four rows."""
    group = group_of("fingerprint", torch.float32, (channels, channels))

    def contest():
        tensors = [torch.randn(channels, channels, 1, 1), *torch.randn(4, channels).unbind(0)]
        calls = {name: lambda tensors, name=name: lambda: OP.overload(name)(tensors) for name in BACKENDS}
        return Contest(group, tensors, calls, {"cpu": lambda: agrees(tensors)})

    race(group, contestant, contest)


def agrees(tensors):
    assert OP.overload("cpu")(tensors) == OP.overload("reference")(tensors)
