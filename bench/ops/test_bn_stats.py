"""Batch statistics: one pass over a raw tensor."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.ops.contestants import BACKENDS, nbytes, require
from fusedres.benchmarking.shapes import ACTIVATIONS, MODIFIED, name_of
from fusedres.ops.registry import OPS
from fusedres.testing import assert_within_budget, channels_last, rms, sliced

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
        check(contestant, x)

        def call():
            return OP.overload(contestant)(x)

    race(f"bn_stats {name_of(shape)} {dtype}", call, dtype=dtype, touched=nbytes(x))


@pytest.mark.parametrize("contestant", ["eager", *BACKENDS])
@pytest.mark.parametrize("form", ["slice", "per sample", "copied"])
@pytest.mark.parametrize("shape", MODIFIED, ids=name_of, indirect=True)
def test_modified_bn_stats(race, shape, dtype, form, contestant):
    """Of a slice of the channels, of every sample, with a copy into a slice in the same pass."""
    x = (sliced if form == "slice" else channels_last)(shape, dtype)
    into = sliced(shape, dtype, 1) if form == "copied" else None
    if contestant == "eager":

        def call():
            if into is not None:
                into.copy_(x)
            return torch.var_mean(x, (2, 3) if form == "per sample" else (0, 2, 3))

    else:
        require(contestant, dtype)
        for i in range(shape[0]) if form == "per sample" else ():
            check(contestant, x[i : i + 1])
        check(contestant, x)

        def call():
            return OP.overload(contestant)(x, form == "per sample", into)

    call()
    assert into is None or torch.equal(into, x)
    touched = nbytes(x) if into is None else nbytes(x, into)
    race(f"bn_stats, {form}, {name_of(shape)} {dtype}", call, dtype=dtype, touched=touched)


def check(backend: str, x: Tensor) -> None:
    """Mean and M2 each have a budget of their own; that of the mean is on the scale of the values."""
    ours, theirs, exact = OP.overload(backend)(x), stock(x), OP.overload("reference")(x.double())
    assert_within_budget(ours[0], theirs[0], exact[0], f"mean on {backend}", scale=rms(x))
    assert_within_budget(ours[1], theirs[1], exact[1], f"M2 on {backend}")


def stock(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and M2 as stock PyTorch's batch norm finds them: read from its running statistics."""
    mean, var = torch.zeros(x.shape[1]), torch.ones(x.shape[1])
    F.batch_norm(x, mean, var, training=True, momentum=1.0)
    return mean, var * (x.numel() // x.shape[1] - 1)
