"""The layouts that kernels walk."""

from __future__ import annotations

import pytest
import torch

from fusedres.ops.layout import dense, like
from fusedres.testing import INPUTS, channels_last, contiguous

LAST = torch.channels_last


@pytest.mark.parametrize("make", INPUTS)
def test_dense_keeps_what_is_dense_and_copies_the_rest(make):
    x = INPUTS[make]((2, 6, 5, 4))
    y = dense(x)
    assert torch.equal(x, y) and (y.is_contiguous() or y.is_contiguous(memory_format=LAST))
    assert (y is x) == (make in ("contiguous", "channels_last"))


def test_dense_of_other_dimensions():
    assert dense(torch.ones(3, 4).t()).is_contiguous()


@pytest.mark.parametrize("make", INPUTS)
def test_like_a_slice_of_channels(make):
    y = channels_last((2, 9, 5, 4))[:, :6]
    x = like(INPUTS[make]((2, 6, 5, 4)), y)
    assert x.is_contiguous(memory_format=LAST)


def test_like_takes_dtype_and_layout():
    x = like(contiguous((2, 6, 5, 4)), channels_last((2, 6, 5, 4), torch.bfloat16))
    assert x.dtype == torch.bfloat16 and x.is_contiguous(memory_format=LAST)
    assert like(channels_last((2, 6, 5, 4)), contiguous((2, 6, 5, 4))).is_contiguous()
    y = contiguous((2, 6, 5, 4))
    assert like(y, y) is y
