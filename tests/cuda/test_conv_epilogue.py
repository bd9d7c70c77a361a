"""CUTLASS's convolutions on an H100, every tile, against float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from fusedres import env
from fusedres.ops.conv_epilogue import CONV_EPILOGUE, conv_epilogue_refuses
from fusedres.testing import assert_within_budget, channels_last

SHAPES = [(2, 8, 9, 8), (4, 64, 56, 64), (2, 128, 28, 256), (1, 512, 7, 512)]  # images, channels, size, filters


@pytest.fixture(autouse=True)
def cutlass() -> None:
    if reason := env.cutlass_missing():
        pytest.skip(reason)


def operands(shape, dtype, stride, dilation, residual):
    n, channels, size, filters = shape
    x = channels_last((n, channels, size, size), dtype).cuda()
    weight = (channels_last((filters, channels, 3, 3), dtype, 1) / (3 * channels**0.5)).cuda()
    out = (size - 1) // stride + 1
    side = channels_last((n, filters, out, out), dtype, 2).cuda() if residual else None
    scale, bias = torch.randn(2, filters, generator=torch.Generator().manual_seed(3)).cuda().unbind(0)
    return x, weight, scale, bias, side, [stride] * 2, [dilation] * 2, [dilation] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tile", [-1, 0, 1, 2])
def test_against_float64(shape, dtype, tile):
    for stride, dilation, residual in itertools.product((1, 2), (1, 2), (True, False)):
        args = operands(shape, dtype, stride, dilation, residual)
        assert conv_epilogue_refuses(*args[:2]) is None
        ours = CONV_EPILOGUE.overload("cutlass")(*args, tile)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            plain = CONV_EPILOGUE.reference(*args)
        exact = CONV_EPILOGUE.reference(*(t.double() if isinstance(t, torch.Tensor) else t for t in args))
        assert_within_budget(ours, plain, exact, f"{shape} {dtype}, tile {tile}, stride {stride}, dilation {dilation}")
        assert ours.stride() == plain.stride()


def test_wrong_input():
    args = operands(SHAPES[0], torch.bfloat16, 1, 1, True)
    with pytest.raises(RuntimeError, match="multiples of 8"):
        CONV_EPILOGUE.overload("cutlass")(args[0], args[1][:3], *args[2:])
    with pytest.raises(RuntimeError, match="bias must be"):
        CONV_EPILOGUE.overload("cutlass")(*args[:3], args[3][:4], *args[4:])
    with pytest.raises(RuntimeError, match="channels_last"):
        CONV_EPILOGUE.overload("cutlass")(args[0].contiguous(), *args[1:])
    with pytest.raises(RuntimeError, match="tile must be"):
        CONV_EPILOGUE.overload("cutlass")(*args, 3)
