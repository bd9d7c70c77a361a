"""The convolution with its epilogue: the reference against stock PyTorch's layers, and why the kernel may not run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from fusedres import env
from fusedres.ops.conv_epilogue import CONV_EPILOGUE, conv_epilogue_refuses
from fusedres.testing import channels_last


def operands(dtype=torch.float32, stride=1, dilation=1, residual=True, channels=(8, 16), size=9):
    """Arguments up to the dilation, with "same" padding at stride 1."""
    inputs, outputs = channels
    x, weight = channels_last((2, inputs, size, size), dtype), channels_last((outputs, inputs, 3, 3), dtype, 1) / 9
    out = (size - 1) // stride + 1
    side = channels_last((2, outputs, out, out), dtype, 2) if residual else None
    scale, bias = (torch.randn(2, outputs, generator=torch.Generator().manual_seed(3)) + 0.5).unbind(0)
    return x, weight, scale, bias, side, [stride] * 2, [dilation] * 2, [dilation] * 2


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("residual", [True, False])
def test_is_convolution_norm_sum_and_relu(stride, dilation, residual):
    x, weight, scale, bias, side, *geometry = operands(torch.float64, stride, dilation, residual)
    scale, bias = scale.double(), bias.double()
    mean, var = torch.zeros(16).double(), torch.ones(16).double()
    y = F.batch_norm(F.conv2d(x, weight, None, *geometry), mean, var, scale, bias, False, 0.0, 0.0)
    expected = torch.relu(y if side is None else y + side)
    out = CONV_EPILOGUE.reference(x, weight, scale, bias, side, *geometry)
    torch.testing.assert_close(out, expected)
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", [True, False])
def test_opcheck_of_a_strided_conv_epilogue(dtype, residual):
    torch.library.opcheck(torch.ops.fusedres.conv_epilogue.default, operands(dtype, 2, residual=residual))


def test_reasons(monkeypatch):
    x, weight, *_ = operands(torch.bfloat16)
    assert conv_epilogue_refuses(x, weight) == (env.cutlass_missing() or "the tensor is on cpu")
    monkeypatch.setattr(env, "cutlass_missing", lambda: None)
    assert conv_epilogue_refuses(x, weight) == "the tensor is on cpu"

    def reason(dtype=torch.bfloat16, inputs=8, channels=8, filters=16):
        x = SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=(2, inputs, 9, 9))
        return conv_epilogue_refuses(x, SimpleNamespace(shape=(filters, channels, 3, 3)))

    assert reason() is None and reason(torch.float16) is None
    assert "not torch.float32" in reason(torch.float32)
    assert "multiples of 8, not 8 and 3" in reason(filters=3)
    assert "groups" in reason(inputs=16)
