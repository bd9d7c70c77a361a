"""The look at what enters oneDNN's fused convolutions: one read."""

from __future__ import annotations

import pytest
import torch

from bench.ops.contestants import BACKENDS, nbytes, require
from fusedres.ops.registry import OPS
from fusedres.testing import channels_last

OP = OPS["all_finite"]


@pytest.mark.parametrize("contestant", BACKENDS)
def test_all_finite(race, contestant):
    require(contestant, torch.float32)
    x = channels_last((8, 256, 56, 56))
    assert OP.overload(contestant)(x)
    race("all_finite 8x256x56x56", lambda: OP.overload(contestant)(x), dtype=torch.float32, touched=nbytes(x))
