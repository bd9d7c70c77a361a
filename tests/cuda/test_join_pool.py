"""Max pooling of a join and its gradient on a GPU."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cuda_ops import DTYPES, LAYOUTS, POOLINGS, PoolCase

from fusedres.ops.activations import ACTIVATIONS, Activation
from fusedres.ops.join_pool import JOIN_POOL, JOIN_POOL_BACKWARD
from fusedres.testing import channels_last, contiguous

SHAPES = [(2, 64, 14, 14), (3, 37, 9, 7), (1, 8, 5, 5), (2, 1, 6, 6), (0, 16, 8, 8), (8, 64, 56, 56)]
STEM = POOLINGS["3, stride 2, padded"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(shape, layout, dtype):
    for window, normed in itertools.product(POOLINGS.values(), (True, False)):
        case = PoolCase(shape, window, layout, dtype, normed=normed, device="cuda")
        case.check_forward()
        case.check_against_float64()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward(shape, layout, dtype):
    for window in POOLINGS.values():
        PoolCase(shape, window, layout, dtype, device="cuda").check_backward()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    for layout, dtype in itertools.product(LAYOUTS, DTYPES):
        PoolCase((2, 64, 14, 14), STEM, layout, dtype, Activation(name, 0.125), device="cuda").check_forward()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ties_not_a_number_and_infinities(layout, dtype):
    for window, normed in itertools.product(POOLINGS.values(), (True, False)):
        case = PoolCase((4, 16, 14, 14), window, layout, dtype, normed=normed, device="cuda")
        case.y.copy_((case.y * 2).round() / 256 + 1)
        case.check_forward()
        draw = torch.rand(case.shape, generator=torch.Generator().manual_seed(1)).cuda()
        for value, where in ((math.nan, draw < 0.3), (-math.inf, draw > 0.5), (math.inf, draw > 0.95)):
            case.y[where] = value
            case.check_forward()
        case.y[1].fill_(-math.inf)
        case.check_forward()


def test_the_gradient_is_bitwise_the_same_from_run_to_run():
    case = PoolCase((16, 64, 56, 56), POOLINGS["3, stride 1, padded"], dtype=torch.bfloat16, device="cuda")
    first = case.check_backward()
    assert all(torch.equal(case.check_backward(), first) for _ in range(5))


def test_on_the_current_stream():
    case = PoolCase((8, 64, 56, 56), STEM, device="cuda")
    expected = case.pooled()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        case.y.mul_(2.0).mul_(0.5)
        found = case.pooled()
    stream.synchronize()
    assert all(torch.equal(*pair) for pair in zip(found, expected))


def test_in_a_graph():
    case = PoolCase((8, 64, 56, 56), STEM, device="cuda")

    def both() -> tuple[torch.Tensor, ...]:
        out, taken = case.pooled()
        return out, taken, JOIN_POOL_BACKWARD.overload("cuda")(out, taken, case.y, *STEM[:3])

    both()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = both()
    case.y.mul_(-1.5)
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip(found, both()))


def test_another_layout_is_refused():
    y, grad = channels_last((2, 8, 4, 4)).cuda(), contiguous((2, 8, 2, 2)).cuda()
    _, taken = JOIN_POOL.overload("cuda")(y, None, 1, 0.0, *STEM, True)
    with pytest.raises(RuntimeError, match="join_pool_backward_cuda: grad must have the layout"):
        JOIN_POOL_BACKWARD.overload("cuda")(grad, taken, y, *STEM[:3])
