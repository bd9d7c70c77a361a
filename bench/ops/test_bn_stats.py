"""Batch statistics: one pass over a raw tensor."""

from __future__ import annotations

import pytest
import torch

from bench.ops.contestants import BACKENDS, check, nbytes, require
from bench.shapes import ACTIVATIONS, name_of
from fusedres.ops.registry import OPS
from fusedres.testing import channels_last

OP = OPS["bn_stats"]


@pytest.mark.parametrize("contestant", ["eager", *BACKENDS])
@pytest.mark.parametrize("shape", ACTIVATIONS, ids=name_of, indirect=True)
def test_bn_stats(race, shape, dtype, contestant):
    x = channels_last(shape, dtype)
    if contestant == "eager":

        def call():
            return torch.var_mean(x, (0, 2, 3))
    else:
        require(contestant, dtype)
        check(OP, contestant, [x])

        def call():
            return OP.overload(contestant)(x)

    race(f"bn_stats {name_of(shape)} {dtype}", call, dtype=dtype, touched=nbytes(x))
