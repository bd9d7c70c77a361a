"""The gated join and its backward on a GPU, against float64."""

from __future__ import annotations

import pytest
from cuda_ops import DENSE, DTYPES, check_gated_join


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("shape", [(2, 13, 7, 5), (0, 3, 2, 2), (16, 256, 28, 28)], ids=str)
def test_against_float64(shape, layout, dtype):
    check_gated_join(DENSE[layout], shape, dtype, "cuda")
