"""The join's backward passes on a GPU, against float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from cuda_ops import DTYPES, LAYOUTS, RESIDUALS, JoinCase

from fusedres.ops.activations import ACTIVATIONS, Activation
from fusedres.ops.join_backward import JOIN_BACKWARD, JOIN_BACKWARD_REDUCE

SHAPES = [(2, 37, 6, 5), (2, 64, 3, 3), (16, 256, 28, 28), (8, 2048, 7, 7)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, layout, dtype):
    for residual, (gained, dropout) in itertools.product(RESIDUALS, [(False, 0.0), (True, 0.3)]):
        case = JoinCase(shape, layout, dtype, residual, Activation("silu"), True, gained, dropout, "cuda")
        case.check_reduce()
        case.check_apply(True, addend=True)
        case.check_apply(False, offset=True)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    for layout in LAYOUTS:
        case = JoinCase((2, 64, 5, 5), layout, torch.float32, "affine", Activation(name, 0.125), device="cuda")
        case.check_reduce()
        case.check_apply(True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [*SHAPES, (64, 64, 56, 56)], ids=str)
def test_both_against_float64(shape, layout, dtype):
    """The last shape is beyond half of an H100's L2 cache."""
    for residual, dropout in itertools.product(RESIDUALS, (0.0, 0.3)):
        case = JoinCase(shape, layout, dtype, residual, Activation("silu"), dropout=dropout, device="cuda")
        case.check_both(True, addend=True)
        case.check_both(False, emit=False)


def test_both_in_a_graph():
    case = JoinCase((8, 64, 28, 28), residual="affine", device="cuda")
    args = (case.grad, *case.operands, True, case.count, True, True, True)
    JOIN_BACKWARD.overload("cuda")(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = JOIN_BACKWARD.overload("cuda")(*args)
    case.grad.mul_(-1.5)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, JOIN_BACKWARD.overload("cuda")(*args)))


def test_bitwise_the_same_from_run_to_run():
    case = JoinCase((32, 64, 56, 56), dtype=torch.bfloat16, residual="plain", device="cuda")
    args = (case.grad, *case.operands, False)
    first, _ = JOIN_BACKWARD_REDUCE.overload("cuda")(*args)
    assert all(torch.equal(JOIN_BACKWARD_REDUCE.overload("cuda")(*args)[0], first) for _ in range(5))
