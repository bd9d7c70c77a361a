"""Folding a norm into a convolution, and the epilogues that oneDNN runs."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fusedres.ops.activations import ACTIVATIONS, RELU, Activation
from fusedres.ops.conv import ConvGeometry, conv_fprop
from fusedres.ops.conv_affine_act import _rounded, fold
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(32, 256, 3, 3), (32, 64, 1, 1), (32, 1, 3, 3), (3, 2, 1, 1)])
@pytest.mark.parametrize("make", [channels_last, contiguous])
def test_rounding_keeps_the_sum_of_every_filter(make, shape, dtype):
    weight = make(shape) / 10
    rounded = _rounded(weight, dtype)
    assert rounded.stride() == weight.to(dtype).stride()
    error = rounded.double() - weight.double()
    numbers = torch.finfo(dtype)
    gap = numbers.eps * weight.double().abs().clamp_min(numbers.smallest_normal)
    assert (error.abs() <= 1.001 * gap).all()  # one of the two neighbours
    largest, nearest = gap.flatten(1).amax(1), (weight.to(dtype).double() - weight.double()).flatten(1)
    assert (error.flatten(1).sum(1).abs() <= torch.maximum(largest / 2, nearest.abs().amax(1))).all()
    assert error.square().sum() <= 1.5 * nearest.square().sum() or shape[1] < 16


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e38, 0.0])
def test_rounding_of_extremes(value):
    weight = torch.full((2, 4, 3, 3), 0.3)
    weight[0, 1, 2, 2] = value
    rounded, nearest = _rounded(weight, torch.float16), weight.half()
    assert rounded[0, 1, 2, 2].equal(nearest[0, 1, 2, 2]) or rounded[0, 1, 2, 2].isnan()
    assert torch.isfinite(rounded).sum() == torch.isfinite(nearest).sum()


def test_what_is_not_narrower_is_not_rounded():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        weight = contiguous((4, 4, 3, 3), dtype)
        assert _rounded(weight, dtype).equal(weight)


def test_a_pooled_channel_is_as_right_as_stock():
    """What a filter's weights err by in sum shifts its channel, and no pooling takes that out."""
    x, weight = channels_last((4, 64, 28, 28), torch.bfloat16).relu(), contiguous((24, 64, 3, 3), seed=2) / 24
    weight = weight.bfloat16()
    rows = norm()
    ours = fold(weight, None, rows, GEOMETRY, x)(x, None, RELU, join)
    stock, exact = (
        unfused(a, w, None, rows.to(r), None, RELU)
        for a, w, r in ((x, weight, torch.float32), (x.double(), weight.double(), torch.float64))
    )
    assert_within_budget(*(t.double().mean((2, 3)).float() for t in (ours, stock)), exact.mean((2, 3)))
