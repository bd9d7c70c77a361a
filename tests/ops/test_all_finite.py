"""Every NaN and every infinity is found, wherever it is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedres import env
from fusedres.ops.all_finite import ALL_FINITE
from fusedres.testing import channels_last, contiguous

pytestmark = pytest.mark.skipif(env.library_missing() is not None, reason="needs the compiled library")

OVERLOADS = {name: ALL_FINITE.overload(name) for name in ("reference", "cpu")}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("op", OVERLOADS.values(), ids=OVERLOADS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [channels_last, contiguous])
def test_extremes_are_finite(op, dtype, layout):
    x = layout((2, 5, 7, 3)).to(dtype)
    info = torch.finfo(dtype)
    x[0, 0, 0, :3] = torch.tensor([info.max, info.min, info.tiny]).to(dtype)
    assert op(x)
    assert op(x[:0])


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_one_bad_value_is_found_anywhere(dtype, data):
    shape = data.draw(st.tuples(*[st.integers(1, n) for n in (3, 70, 40, 40)]))
    x = torch.zeros(shape, dtype=dtype)
    where = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    x[where] = data.draw(st.sampled_from([float("nan"), float("inf"), -float("inf")]))
    assert not OVERLOADS["cpu"](x)
    x[where] = 1.0
    assert OVERLOADS["cpu"](x)
