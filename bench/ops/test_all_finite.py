"""The look at what enters oneDNN's fused convolutions: one read."""

from __future__ import annotations

import pytest
import torch

from bench.ops.contestants import BACKENDS, Contest, group_of, nbytes
from bench.shapes import MODIFIED
from fusedres.ops.registry import OPS
from fusedres.testing import channels_last

OP = OPS["all_finite"]


@pytest.mark.parametrize("contestant", ["eager", *BACKENDS])
@pytest.mark.parametrize("shape", MODIFIED, indirect=True)
def test_all_finite(race, shape, contestant):
    group = group_of("all_finite", torch.float32, shape)

    def contest():
        x = channels_last(shape)
        calls = {"eager": lambda x: lambda: bool(torch.isfinite(x).all())}
        calls |= {name: lambda x, name=name: lambda: OP.overload(name)(x) for name in BACKENDS}
        return Contest(group, x, calls, {name: lambda name=name: sees(name, x) for name in BACKENDS}, nbytes(x))

    race(group, contestant, contest)


def sees(backend, x):
    """Nothing in numbers, and a NaN."""
    assert OP.overload(backend)(x)
    spoiled = x.clone()
    spoiled[-1, -1, -1, -1] = float("nan")
    assert not OP.overload(backend)(spoiled)
