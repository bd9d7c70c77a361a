"""Grouped convolutions and their gradients on a GPU, against float64."""

from __future__ import annotations

import pytest
import torch
from cuda_convs import ACTS, DTYPES, GEOMETRIES, GROUPS, GroupedCase

from fusedres.ops.conv_fused import CONV_FUSED_FPROP


def check(case: GroupedCase) -> None:
    case.check_fprop()
    case.check_join()
    case.check_dgrad(addend=True)
    case.check_wgrad()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", GROUPS, ids=str)
@pytest.mark.parametrize("stride", [(1, 1), (2, 2)], ids=str)
def test_against_float64(stride, channels, dtype):
    c, filters, groups = channels
    for shape, prologue in (((2, c, 7, 6), True), ((3, c, 28, 27), True), ((2, c, 14, 14), False)):
        check(GroupedCase(shape, filters, groups, dtype, stride=stride, prologue=prologue, device="cuda"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_geometries(geometry, dtype):
    for c, groups in ((16, 4), (16, 2), (24, 24)):
        check(GroupedCase((2, c, 9, 11), c, groups, dtype, device="cuda", **geometry))


@pytest.mark.parametrize("act", ACTS, ids=str)
def test_activations(act):
    check(GroupedCase((4, 64, 14, 14), 64, 16, act=act, device="cuda"))


@pytest.mark.parametrize("size", [56, 28, 14, 7])
def test_resnext(size):
    """The 3x3 convolutions of ResNeXt-50 32x4d, several tiles and blocks of channels each."""
    c = 128 * 56 // size
    check(GroupedCase((8, c, size, size), c, 32, device="cuda"))


def test_the_same_from_run_to_run():
    case = GroupedCase((8, 128, 56, 56), 128, 32, device="cuda")
    args = (*case.pending, case.weight, case.bias, *case.geometry, True)
    expected = CONV_FUSED_FPROP.overload("cuda")(*args)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(CONV_FUSED_FPROP.overload("cuda")(*args), expected))


def test_in_a_graph():
    case = GroupedCase((8, 64, 14, 14), 64, 16, device="cuda")
    args = (*case.pending, case.weight, case.bias, *case.geometry, True)
    CONV_FUSED_FPROP.overload("cuda")(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = CONV_FUSED_FPROP.overload("cuda")(*args)
    case.x.mul_(-1.5)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(out, CONV_FUSED_FPROP.overload("cuda")(*args)))
