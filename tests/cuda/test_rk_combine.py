"""The Runge-Kutta updates and the norm of their error on a GPU, against float64."""

from __future__ import annotations

import pytest
import torch
from cuda_ops import DENSE, DTYPES, TOLERANCES, check_rk, check_rounded_tolerances, rk_operands

from fusedres.ops.rk_combine import RK_ERROR
from fusedres.testing import channels_last


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("shape", [(2, 13, 7, 5), (0, 3, 2, 2), (16, 256, 28, 28)], ids=str)
def test_against_float64(shape, layout, dtype):
    for stages in (0, 1, 4, 7):
        check_rk(DENSE[layout], shape, stages, dtype, "cuda")


def test_tolerances_that_float32_rounds():
    check_rounded_tolerances("cuda")


def test_the_norm_is_bitwise_the_same_from_run_to_run():
    y0, y1, stages, weights = rk_operands(channels_last, (32, 64, 56, 56), 6, torch.bfloat16, "cuda")
    first = RK_ERROR.overload("cuda")(y0, y1, stages, weights, *TOLERANCES)
    assert all(torch.equal(RK_ERROR.overload("cuda")(y0, y1, stages, weights, *TOLERANCES), first) for _ in range(5))
