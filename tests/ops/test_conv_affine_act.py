"""Folding a norm into a convolution, and the epilogues that oneDNN runs."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fusedres.ops.activations import ACTIVATIONS, Activation
from fusedres.ops.conv import ConvGeometry, conv_fprop
from fusedres.ops.conv_affine_act import fold
from fusedres.testing import assert_within_budget, channels_last, contiguous

GEOMETRY = ConvGeometry((1, 1), (1, 1), (1, 1), 1)
ACTS = [Activation(name, 0.125) for name in ACTIVATIONS]


def norm() -> Tensor:
    mean, scale, shift = torch.randn(3, 24, generator=torch.Generator().manual_seed(2))
    return torch.stack((mean, torch.ones(24), scale + 1.5, shift))


def join(*args) -> Tensor:
    return torch.ops.fusedres.join(*args)


def unfused(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None, residual: Tensor | None, act
) -> Tensor:
    y = conv_fprop(x, weight, bias, GEOMETRY)
    if rows is not None:
        y = (rows[2, :, None, None].double() * y.double() + rows[3, :, None, None].double()).to(y.dtype)
    return act(y if residual is None else y + residual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [channels_last, contiguous])
@pytest.mark.parametrize("act", ACTS, ids=str)
def test_against_float64(make, dtype, act):
    x, residual, weight = (
        make((2, 16, 6, 6), dtype),
        make((2, 24, 6, 6), dtype, 1),
        contiguous((24, 16, 3, 3), dtype, 2),
    )
    weight, bias = weight / 12, weight[:, 0, 0, 0].clone()
    for normed, biased, added in itertools.product((True, False), repeat=3):
        rows, b, r = norm() if normed else None, bias if biased else None, residual if added else None
        ours = fold(weight, b, rows, GEOMETRY, x)(x, r, act, join)
        stock = unfused(x, weight, b, rows, r, act)
        args = [None if t is None else t.double() for t in (x, weight, b, rows, r)]
        assert_within_budget(ours, stock, unfused(*args, act), f"norm {normed}, bias {biased}, residual {added}")


def test_other_sizes_than_it_was_packed_for():
    x, weight = channels_last((2, 16, 6, 6)), contiguous((24, 16, 3, 3), seed=2)
    folded = fold(weight, None, None, GEOMETRY, x)
    for shape in ((1, 16, 6, 6), (3, 16, 11, 4)):
        x = channels_last(shape)
        torch.testing.assert_close(folded(x, None, ACTS[0], join), conv_fprop(x, weight, None, GEOMETRY))


def test_residual_is_not_written_to():
    x, residual = channels_last((2, 16, 6, 6)), channels_last((2, 24, 6, 6), seed=1)
    before = residual.clone()
    fold(contiguous((24, 16, 3, 3), seed=2), None, norm(), GEOMETRY, x)(x, residual, Activation("relu"), join)
    assert torch.equal(residual, before)
