"""A join and the max pooling behind it in one pass, and the pooling's backward; eager takes three passes forward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bench.ops.contestants import BACKENDS, COMPILED, Contest, affine_rows, backward_of, check, group_of, nbytes
from bench.shapes import STEMS
from fusedres.ops.activations import RELU
from fusedres.ops.join_pool import pool_window
from fusedres.ops.registry import OPS
from fusedres.testing import assert_within_budget, channels_last, contiguous

FORWARD, BACKWARD = OPS["join_pool"], OPS["join_pool_backward"]
WINDOW = pool_window(3, 2, 1)
LAYOUTS = {"channels_last": channels_last, "contiguous": contiguous}


@pytest.mark.parametrize("contestant", ["eager", COMPILED, *BACKENDS])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", STEMS, indirect=True)
def test_join_pool(race, shape, dtype, layout, contestant):
    group = group_of("join_pool", dtype, shape, layout=layout)

    def contest():
        y = LAYOUTS[layout](shape, dtype)
        arguments = [y, affine_rows(shape[1]), RELU.code, RELU.param, *WINDOW, True]
        out, taken = FORWARD.reference(*arguments)
        calls = {"eager": eager}
        calls |= {name: lambda given, name=name: lambda: FORWARD.overload(name)(*given) for name in BACKENDS}
        checks = {name: lambda name=name: holds(name, arguments) for name in BACKENDS}
        return Contest(group, arguments, calls, checks, nbytes(y, out, taken)).with_compiled()

    race(group, contestant, contest)


def eager(arguments):
    """Stock PyTorch; in training its pooling writes an index of eight bytes beside each result."""
    y, (mean, rstd, scale, shift) = arguments[:2]
    statistics = mean, rstd.reciprocal().square(), scale / rstd, shift + mean * scale
    return lambda: F.max_pool2d(torch.relu(F.batch_norm(y, *statistics, False, 0.0, 0.0)), *WINDOW[:3])


def holds(name, arguments):
    """The pooled values; which of two that rounding makes equal was taken is for the op's tests to judge."""
    wide = [a.double() if isinstance(a, torch.Tensor) else a for a in arguments]
    found = (FORWARD.overload(name)(*arguments), FORWARD.reference(*arguments), FORWARD.reference(*wide))
    return assert_within_budget(*(out for out, _ in found), name=name)


@pytest.mark.parametrize("contestant", ["eager", *BACKENDS])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", STEMS, indirect=True)
def test_join_pool_backward(race, shape, dtype, layout, contestant):
    group = group_of("join_pool_backward", dtype, shape, layout=layout)

    def contest():
        y = LAYOUTS[layout](shape, dtype)
        out, taken = FORWARD.reference(y, None, 0, 0.0, *WINDOW, True)
        grad = torch.empty_like(out).normal_()
        arguments = [grad, taken, y, *WINDOW[:3]]
        calls = {"eager": lambda given: backward_of(lambda x: F.max_pool2d(x, *WINDOW[:3]), given[0], given[2])}
        calls |= {name: lambda given, name=name: lambda: BACKWARD.overload(name)(*given) for name in BACKENDS}
        checks = {name: lambda name=name: check(BACKWARD, name, arguments) for name in BACKENDS}
        return Contest(group, arguments, calls, checks, nbytes(grad, taken, y))

    race(group, contestant, contest)
