"""What tuning tries first does not spill: compiled for sm_90, of a pass of each kind that used to."""

from __future__ import annotations

import pytest
import torch

from fusedres import triton as backend
from fusedres.ops.conv import ConvGeometry
from fusedres.triton.tuning import Problem, fixed, heuristic, space
from fusedres.tune import first_tried

pytestmark = pytest.mark.skipif(backend.missing() is not None, reason=str(backend.missing()))

ONE, THREE = ConvGeometry((1, 1), (0, 0), (1, 1), 1), ConvGeometry((1, 1), (1, 1), (1, 1), 1)
RELU = 1
PROBLEMS = (
    Problem("fprop", torch.bfloat16, (256, 128, 28, 28), 128, (3, 3), THREE, True),
    Problem("dgrad", torch.bfloat16, (256, 256, 56, 56), 64, (1, 1), ONE, True),
    Problem("dgrad", torch.bfloat16, (256, 128, 28, 28), 128, (3, 3), THREE, True),
)


def launched(problem, tiles):
    """The pass that a block launches, on tensors without memory."""
    from fusedres.triton.conv_fused import conv_fused_fprop
    from fusedres.triton.conv_fused_backward import conv_fused_dgrad
    from fusedres.triton.launch import recorded

    def empty(*shape):
        return torch.empty(shape, dtype=problem.dtype, device="meta", memory_format=torch.channels_last)

    def rows(channels):
        return torch.empty(4, channels, device="meta")

    n, c, *_ = problem.shape
    x, weight, norm = empty(*problem.shape), empty(problem.filters, c, *problem.kernel_size), rows(c)
    geometry = map(list, problem.geometry[:3])
    with fixed(tiles), recorded() as launches:
        if problem.kind == "fprop":
            conv_fused_fprop(x, norm, RELU, 0.0, weight, None, *geometry, True)
        else:
            grad = empty(n, problem.filters, *problem.size)
            conv_fused_dgrad(grad, grad, rows(problem.filters), weight, x, norm, RELU, 0.0, *geometry)
    return launches[0]


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.key)
def test_what_is_tried_first_does_not_spill(problem):
    from fusedres.triton.offline import compiled

    found = first_tried([heuristic(problem), *space(problem, 9)])
    assert len(found) > 1
    spilled = {tiles: compiled(launched(problem, tiles), 90).local for tiles in found}
    assert not any(spilled.values()), spilled


@pytest.mark.parametrize("kind", ["fprop", "dgrad"])
def test_few_channels_take_a_shallow_tile_that_does_not_spill(kind):
    """However many the taps: a step multiplies the channels of one."""
    from fusedres.triton.offline import compiled

    narrow = Problem(kind, torch.bfloat16, (256, 8, 28, 28), 8, (3, 3), THREE, True)
    assert heuristic(narrow).depth == 32 and {tiles.depth for tiles in space(narrow)} == {32}
    assert compiled(launched(narrow, heuristic(narrow)), 90).local == 0


def test_shared_memory_of_an_excitation():
    """Of its widest hidden layers in float32: no more than a device of compute capability 8.6 has."""
    from fusedres.triton.excite import excite
    from fusedres.triton.launch import recorded
    from fusedres.triton.offline import compiled

    def empty(*shape):
        return torch.empty(shape, device="meta")

    with recorded() as launches:
        excite(empty(64, 2048), empty(4, 2048), empty(512, 2048), None, empty(2048, 512), None, 1, 0.0, "sigmoid", None)
    for capability in (80, 90):
        needed = compiled(launches[0], capability)
        assert needed.shared <= 99 * 1024 and needed.local == 0
