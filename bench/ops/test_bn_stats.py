"""Batch statistics: one pass over a raw tensor."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.ops.contestants import BACKENDS, COMPILED, Contest, group_of, nbytes
from bench.shapes import MODIFIED, activations
from fusedres.ops.registry import OPS
from fusedres.testing import assert_within_budget, channels_last, contiguous, rms, sliced

OP = OPS["bn_stats"]


@pytest.mark.parametrize("contestant", ["eager", COMPILED, *BACKENDS])
@pytest.mark.parametrize("shape", activations(), indirect=True)
def test_bn_stats(race, shape, dtype, contestant):
    group = group_of("bn_stats", dtype, shape)

    def contest():
        x = channels_last(shape, dtype)
        calls = {"eager": lambda x: lambda: torch.var_mean(x, (0, 2, 3))}
        calls |= {name: lambda x, name=name: lambda: OP.overload(name)(x) for name in BACKENDS}
        checks = {name: lambda name=name: check(name, x) for name in BACKENDS}
        return Contest(group, x, calls, checks, nbytes(x)).with_compiled()

    race(group, contestant, contest)


FORMS = {"slice": sliced, "contiguous": contiguous, "per sample": channels_last, "copied": channels_last}


@pytest.mark.parametrize("contestant", ["eager", *BACKENDS])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", MODIFIED, indirect=True)
def test_modified_bn_stats(race, shape, dtype, form, contestant):
    """Of a slice of the channels, of the other layout, of every sample, with a copy into a slice in the same pass."""
    layout = "contiguous" if form == "contiguous" else "channels_last"
    group = group_of("bn_stats", dtype, shape, form, layout)

    def contest():
        x = FORMS[form](shape, dtype)
        into = sliced(shape, dtype, 1) if form == "copied" else None

        def eager(operands):
            x, into = operands
            dims = (2, 3) if form == "per sample" else (0, 2, 3)
            return lambda: (None if into is None else into.copy_(x), torch.var_mean(x, dims))

        def ours(name):
            return lambda operands: lambda: OP.overload(name)(operands[0], form == "per sample", operands[1])

        calls = {"eager": eager} | {name: ours(name) for name in BACKENDS}
        checks = {name: lambda name=name: check_form(name, x, form, into) for name in BACKENDS}
        return Contest(group, (x, into), calls, checks, nbytes(x, into))

    race(group, contestant, contest)


def check_form(backend: str, x: Tensor, form: str, into: Tensor | None) -> None:
    """As :func:`check`; per sample, each of them, and with a copy, the copy."""
    if form == "per sample":
        together = OP.overload(backend)(x, True, None)
        for i in range(len(x)):
            check(backend, x[i : i + 1])
            assert torch.equal(together[:, i], OP.overload(backend)(x[i : i + 1]))
        return
    check(backend, x)
    if into is not None:
        OP.overload(backend)(x, False, into)
        assert torch.equal(into, x)


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
