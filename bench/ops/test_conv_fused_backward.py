"""The gradients of a convolution between two norms, each with the norms' own gradients inside.

On a CPU there is the reference alone, whose convolutions are the vendor's; a GPU's kernels are timed by
``fusedres tune``.
"""

from __future__ import annotations

import pytest
import torch

from bench.ops.contestants import affine_rows, check, nbytes
from fusedres.benchmarking.shapes import WEIGHT_GRADIENTS, name_of
from fusedres.ops.activations import RELU
from fusedres.ops.registry import OPS
from fusedres.testing import channels_last

ROWS, DGRAD, WGRAD = OPS["bn_grad_rows"], OPS["conv_fused_dgrad"], OPS["conv_fused_wgrad"]
CONTESTANTS = ("eager", "reference")


def gradient(g, y, rows):
    """Stock PyTorch's gradient of a norm's input, from the rows (scale, slope, mean, offset)."""
    scale, slope, mean, offset = (row[:, None, None].to(g.dtype) for row in rows)
    return scale * g + slope * (y - mean) + offset


@pytest.mark.parametrize("channels", [64, 2048])
def test_bn_grad_rows(race, channels):
    arguments = [affine_rows(channels), torch.randn(3, channels), 25088.0]
    check(ROWS, "reference", arguments)
    race(
        f"bn_grad_rows {channels}",
        lambda: ROWS.overload("reference")(*arguments),
        dtype=torch.float32,
        touched=nbytes(*arguments),
    )


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("op", [DGRAD, WGRAD], ids=lambda op: op.name)
@pytest.mark.parametrize(("shape", "channels", "size"), WEIGHT_GRADIENTS, indirect=["shape"])
def test_conv_fused_gradients(race, shape, dtype, channels, size, op, contestant):
    x, weight = channels_last(shape, dtype), channels_last((channels, shape[1], size, size), dtype, 2)
    g, y = (channels_last((shape[0], channels, *shape[2:]), dtype, seed) for seed in (1, 3))
    norm, rows, padding = affine_rows(shape[1]), affine_rows(channels, 1), [size // 2, size // 2]
    geometry = ([1, 1], padding, [1, 1])
    act = (RELU.code, RELU.param)
    data = op is DGRAD
    last = [] if data else [torch.empty_like(weight)]
    arguments = [g, y, rows, *([weight] if data else []), x, norm, *act, *geometry, *last]

    def eager():
        dy, mask = gradient(g, y, rows), (data, not data, False)
        return torch.ops.aten.convolution_backward(dy, x, weight, None, *geometry, False, [0, 0], 1, mask)

    def reference():
        return op.overload("reference")(*arguments)

    check(op, "reference", arguments)
    group = f"{op.name} {name_of(shape)} to {channels}, {size}x{size}, {dtype}"
    call = eager if contestant == "eager" else reference
    race(group, call, dtype=dtype, touched=nbytes(g, y, x, weight))
