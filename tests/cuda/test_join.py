"""The join on a GPU, against float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from cuda_ops import DTYPES, LAYOUTS, RESIDUALS, JoinCase

from fusedres.ops.activations import ACTIVATIONS, Activation
from fusedres.ops.join import JOIN
from fusedres.testing import channels_last, contiguous

SHAPES = [(2, 64, 14, 14), (3, 37, 7, 5), (1, 8, 1, 1), (2, 1, 3, 3), (0, 16, 4, 4), (16, 256, 28, 28)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, layout, dtype):
    for residual, name in itertools.product(RESIDUALS, ACTIVATIONS):
        JoinCase(shape, layout, dtype, residual, Activation(name, 0.125), device="cuda").check_forward()
    for residual, dropout in itertools.product(RESIDUALS, (0.0, 0.3)):
        JoinCase(shape, layout, dtype, residual, gained=True, dropout=dropout, device="cuda").check_forward()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 64, 14, 14), (3, 37, 7, 5), (1, 8, 1, 1), (16, 256, 28, 28)], ids=str)
def test_statistics_against_float64(shape, layout, dtype):
    for residual, gained in itertools.product(RESIDUALS, (False, True)):
        JoinCase(shape, layout, dtype, residual, Activation("silu"), gained=gained, device="cuda").check_stats()


def test_seed_on_the_device():
    case = JoinCase((2, 16, 5, 5), dropout=0.5, device="cuda")
    out = JOIN.overload("cuda")(*case.operands, None, 0.5, case.seed.cuda())
    assert torch.equal(out, JOIN.overload("cuda")(*case.operands, None, 0.5, case.seed))


def test_on_the_current_stream():
    args = JoinCase((8, 64, 28, 28), residual="plain", device="cuda").operands
    expected = JOIN.overload("reference")(*args)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        args[0].mul_(2.0).mul_(0.5)
        out = JOIN.overload("cuda")(*args)
    stream.synchronize()
    torch.testing.assert_close(out, expected)


def test_in_a_graph():
    args = JoinCase((8, 64, 28, 28), residual="affine", device="cuda").operands
    JOIN.overload("cuda")(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = JOIN.overload("cuda")(*args)
    args[0].mul_(-1.5)
    graph.replay()
    assert torch.equal(out, JOIN.overload("cuda")(*args))


def test_another_layout_is_refused():
    y = channels_last((2, 8, 4, 4)).cuda()
    with pytest.raises(RuntimeError, match="join_cuda"):
        JOIN.overload("cuda")(y, None, contiguous((2, 8, 4, 4)).cuda(), None, 1, 0.0)
