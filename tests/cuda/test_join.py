"""The join on a GPU, against float64. ``pytest tests/cuda`` is the command for a machine that has one."""

from __future__ import annotations

import itertools

import pytest
import torch

from fusedres import env
from fusedres.ops.activations import ACTIVATIONS, Activation
from fusedres.ops.join import JOIN
from fusedres.testing import assert_within_budget, channels_last, contiguous

pytestmark = pytest.mark.skipif(env.cuda_missing() is not None, reason=f"needs a GPU: {env.cuda_missing()}")

SHAPES = [(2, 64, 14, 14), (3, 37, 7, 5), (1, 8, 1, 1), (2, 1, 3, 3), (0, 16, 4, 4)]
RESIDUALS = ("none", "plain", "affine")


def operands(make, shape, dtype, residual):
    rows = torch.randn(2, 4, shape[1], generator=torch.Generator().manual_seed(5)).cuda()
    y, side = make(shape, dtype, 1).cuda(), make(shape, dtype, 2).cuda()
    return y, rows[0], None if residual == "none" else side, rows[1] if residual == "affine" else None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [channels_last, contiguous])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, make, dtype):
    for residual, name in itertools.product(RESIDUALS, ACTIVATIONS):
        act = Activation(name, 0.125)
        args = operands(make, shape, dtype, residual)
        wide = [None if t is None else t.double() for t in args]
        ours, plain = (JOIN.overload(backend)(*args, act.code, act.param) for backend in ("cuda", "reference"))
        exact = JOIN.overload("reference")(*wide, act.code, act.param)
        assert ours.stride() == args[0].stride()
        assert_within_budget(ours, plain, exact, f"join, residual {residual}, {act}")


def test_on_the_current_stream():
    args = operands(channels_last, (8, 64, 28, 28), torch.float32, "plain")
    expected = JOIN.overload("reference")(*args, 1, 0.0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        args[0].mul_(2.0).mul_(0.5)
        out = JOIN.overload("cuda")(*args, 1, 0.0)
    stream.synchronize()
    torch.testing.assert_close(out, expected)


def test_another_layout_is_refused():
    y = channels_last((2, 8, 4, 4)).cuda()
    with pytest.raises(RuntimeError, match="join_cuda"):
        JOIN.overload("cuda")(y, None, contiguous((2, 8, 4, 4)).cuda(), None, 1, 0.0)
