"""Convolutions with prologue and epilogue, against float64."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from triton_operands import GEOMETRIES, WAYS, rows, walked

from fusedres.ops.conv_fused import CONV_FUSED_FPROP, CONV_FUSED_JOIN
from fusedres.testing import assert_within_budget, channels_last, rms, sliced

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
relaxed = settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Case:
    def __init__(
        self, device, shape, filters, geometry, dtype, act=1, normed=True, bias=True, make=channels_last, seed=1
    ):
        self.kernel, *self.geometry = GEOMETRIES[geometry]
        c = shape[1]
        self.x = make(shape, dtype, seed).to(device)
        self.norm = rows(c, 2, device) if normed else None
        self.act = act
        weight = torch.randn(filters, c, *self.kernel, generator=torch.Generator().manual_seed(3))
        self.weight = (weight / weight[0].numel() ** 0.5).to(dtype).to(device)
        self.bias = torch.randn(filters, generator=torch.Generator().manual_seed(4)).to(device) if bias else None

    def run(self, op, *rest, cast=lambda t: t, into=None):
        def of(t):
            return cast(t) if isinstance(t, torch.Tensor) else t

        geometry = (list(pair) for pair in self.geometry)
        operands = (self.x, self.norm, self.act, 0.125, self.weight, self.bias)
        return op(*map(of, operands), *geometry, *map(of, rest), into)

    def every(self, op, *rest):
        """Ours, the reference in the same dtype, and the reference in float64."""
        exact = self.run(op.reference, *rest, cast=lambda t: t.double())
        return self.run(op.overload("triton"), *rest), self.run(op.reference, *rest), exact


def check_statistics(ours, y, name="statistics"):
    """Those of the tensor that was stored, as a pass over it would find them."""
    mean, m2 = y.double().mean((0, 2, 3)), None
    m2 = (y.double() - mean[:, None, None]).square().sum((0, 2, 3))
    count = y.numel() / y.shape[1]
    plain = torch.stack((mean.float(), y.float().var((0, 2, 3), correction=0) * count))
    assert_within_budget(ours[0], plain[0], mean, f"{name}: mean", scale=rms(y))
    assert_within_budget(ours[1], plain[1], m2, f"{name}: M2", scale=2 * rms(m2))


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fprop(device, geometry, dtype):
    case = Case(device, (2, 37, 9, 7), 45, geometry, dtype)
    ours, plain, exact = case.every(CONV_FUSED_FPROP, True)
    assert ours[0].is_contiguous(memory_format=torch.channels_last)
    assert_within_budget(ours[0], plain[0], exact[0])
    check_statistics(ours[1], ours[0])


@pytest.mark.parametrize("act", range(7))
def test_every_activation_in_the_prologue(device, act):
    case = Case(device, (1, 16, 5, 5), 16, "3x3", torch.float32, act, normed=act != 2, bias=False)
    ours, plain, exact = case.every(CONV_FUSED_FPROP, False)
    assert ours[1].numel() == 0
    assert_within_budget(ours[0], plain[0], exact[0])


@pytest.mark.parametrize("act", range(7))
def test_every_activation_in_the_epilogue(device, act):
    case = Case(device, (1, 16, 5, 5), 24, "1x1", torch.float32, 0, normed=False)
    residual = channels_last((1, 24, 5, 5), torch.float32, 5).to(device)
    rest = rows(24, 6, device), residual, rows(24, 7, device), act, 0.125
    assert_within_budget(*case.every(CONV_FUSED_JOIN, *rest))


@pytest.mark.parametrize("residual", ["none", "plain", "affine"])
@pytest.mark.parametrize("geometry", ["1x1", "3x3 stride 2"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_join(device, dtype, geometry, residual):
    case = Case(device, (2, 24, 8, 6), 40, geometry, dtype, bias=residual == "plain")
    size = (8, 6) if geometry == "1x1" else (4, 3)
    side = None if residual == "none" else channels_last((2, 40, *size), dtype, 5).to(device)
    rest = rows(40, 6, device), side, rows(40, 7, device) if residual == "affine" else None, 1, 0.0
    assert_within_budget(*case.every(CONV_FUSED_JOIN, *rest))


def launched(case, *rest):
    """The first launch of a forward pass, which does not run."""
    from fusedres.triton.launch import recorded

    with recorded() as launches:
        case.run(CONV_FUSED_FPROP.overload("triton"), True, *rest)
    return launches[0]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_way_over_the_tiles(device, geometry, dtype, way):
    case = Case(device, (2, 40, 9, 7), 45, geometry, dtype)
    with walked(way):
        ours, plain, exact = case.every(CONV_FUSED_FPROP, True)
        launch = launched(case)
    assert_within_budget(ours[0], plain[0], exact[0])
    check_statistics(ours[1], ours[0])
    assert launch.meta["DESCRIPTORS"] == WAYS[way].descriptors
    if WAYS[way].persistent:
        tiles = -(-ours[0].numel() // 45 // 32) * 2
        assert launch.grid == (2,) and tiles > 2


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_the_join(device, way):
    case = Case(device, (2, 24, 8, 6), 40, "1x1", torch.bfloat16)
    side = channels_last((2, 40, 8, 6), torch.bfloat16, 5).to(device)
    with walked(way):
        assert_within_budget(*case.every(CONV_FUSED_JOIN, rows(40, 6, device), side, rows(40, 7, device), 1, 0.0))


@pytest.mark.parametrize("channels,geometry", [(37, "1x1"), (37, "3x3"), (44, "1x1")])
def test_what_descriptors_cannot_describe_comes_by_address(device, channels, geometry):
    case = Case(device, (2, channels, 6, 5), 16, geometry, torch.bfloat16)
    with walked("persistent"):
        ours, plain, exact = case.every(CONV_FUSED_FPROP, True)
        assert not launched(case).meta["DESCRIPTORS"]
    assert_within_budget(ours[0], plain[0], exact[0])


@pytest.mark.parametrize("offset,described", [(8, True), (4, False)])
def test_slices_by_descriptor(device, offset, described):
    """What lies beside a slice, NaN here, is never multiplied; nor is one described that begins between 16 bytes."""
    case = Case(device, (2, 40, 6, 5), 16, "1x1", torch.bfloat16)
    buffer = channels_last((2, 64, 6, 5), torch.bfloat16, 8).to(device).fill_(float("nan"))
    case.x = buffer[:, offset : offset + 40].copy_(case.x)
    with walked("by descriptor"):
        ours, plain, exact = case.every(CONV_FUSED_FPROP, True)
        assert launched(case).meta["DESCRIPTORS"] == described
    assert_within_budget(ours[0], plain[0], exact[0])


@relaxed
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 80), st.integers(3, 9), st.integers(3, 9)),
    filters=st.integers(1, 140),
    geometry=st.sampled_from(sorted(GEOMETRIES)),
    normed=st.booleans(),
    way=st.sampled_from([None, *WAYS]),
)
def test_any_shape(device, shape, filters, geometry, normed, way):
    draws = []
    for seed in range(1, 2 + 8 // filters):  # statistics of a filter or two are too few numbers to judge by
        case = Case(device, shape, filters, geometry, torch.bfloat16, 4, normed, seed=seed)
        with walked(way) if way else nullcontext():
            ours, plain, exact = case.every(CONV_FUSED_FPROP, True)
        assert_within_budget(ours[0], plain[0], exact[0])
        draws.append(ours)
    check_statistics(torch.cat([stats for _, stats in draws], 1), torch.cat([y for y, _ in draws], 1))


def test_the_same_from_run_to_run(device):
    from fusedres.triton.conv_fused import conv_fused_fprop
    from fusedres.triton.tuning import Tiles

    case = Case(device, (1, 16, 12, 9), 16, "1x1", torch.float32)

    def small(*args):
        return conv_fused_fprop(*args, tiles=Tiles(16, 16, 16, 4, 2))

    y, stats = case.run(small, True)
    check_statistics(stats, y)
    assert torch.equal(stats, case.run(small, True)[1])


def test_slices_of_a_buffer(device):
    case = Case(device, (2, 24, 6, 5), 16, "3x3", torch.bfloat16, make=sliced, bias=False)
    buffer = channels_last((2, 40, 6, 5), torch.bfloat16, 8).to(device)
    before = buffer.clone()
    y, stats = case.run(CONV_FUSED_FPROP.overload("triton"), True, into=buffer[:, 12:28])
    expected, _ = case.run(CONV_FUSED_FPROP.overload("triton"), True)
    assert y.numel() == 0 and torch.equal(buffer[:, 12:28], expected)
    assert torch.equal(buffer[:, :12], before[:, :12]) and torch.equal(buffer[:, 28:], before[:, 28:])
    check_statistics(stats, expected)


def test_nothing(device):
    y, stats = Case(device, (0, 8, 4, 4), 16, "3x3", torch.float32).run(CONV_FUSED_FPROP.overload("triton"), True)
    assert y.shape == (0, 16, 4, 4)
    assert stats[0].isnan().all() and not stats[1].any()


def test_wrong_operands_are_named(device):
    case = Case(device, (2, 8, 4, 4), 16, "1x1", torch.float32)
    case.weight = case.weight[:, :7]
    with pytest.raises(ValueError, match=r"weight of shape \(16, 7, 1, 1\)"):
        case.run(CONV_FUSED_FPROP.overload("triton"), True)
    case = Case(device, (2, 8, 4, 4), 16, "1x1", torch.float32)
    case.x = case.x.contiguous()
    with pytest.raises(ValueError, match=r"x of shape .* must be channels_last"):
        case.run(CONV_FUSED_FPROP.overload("triton"), True)
    case = Case(device, (2, 8, 4, 4), 16, "1x1", torch.float32)
    side = channels_last((2, 15, 4, 4)).to(device)
    with pytest.raises(ValueError, match=r"residual of shape \(2, 15, 4, 4\)"):
        case.run(CONV_FUSED_JOIN.overload("triton"), None, side, None, 1, 0.0)
