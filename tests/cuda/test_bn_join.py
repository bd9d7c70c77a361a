"""A batch norm and the join behind it on a GPU, against float64: in one launch, and beyond the L2 cache."""

from __future__ import annotations

import itertools

import pytest
import torch
from cuda_ops import DTYPES, LAYOUTS, RESIDUALS, JoinCase, check_bn_join

from fusedres.ops.activations import Activation


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 37, 6, 5), (8, 2048, 7, 7), (16, 256, 28, 28), (64, 64, 56, 56)], ids=str)
def test_against_float64(shape, layout, dtype):
    for residual, dropout in itertools.product(RESIDUALS, (0.0, 0.3)):
        case = JoinCase(shape, layout, dtype, residual, Activation("silu"), dropout=dropout, device="cuda")
        check_bn_join(case)


def test_bitwise_the_same_from_run_to_run():
    case = JoinCase((16, 256, 14, 14), dtype=torch.bfloat16, residual="plain", device="cuda")
    first = check_bn_join(case)
    assert all(torch.equal(a, b) for _ in range(5) for a, b in zip(check_bn_join(case), first))
