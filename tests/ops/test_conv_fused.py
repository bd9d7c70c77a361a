"""References of the fused convolutions, conv_fused_fprop and conv_fused_join, against stock PyTorch's functions. The
kernels' tests are under tests/triton/cases."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fusedres.ops.conv import ConvGeometry
from fusedres.ops.conv_fused import CONV_FUSED_FPROP, CONV_FUSED_JOIN, conv_fused_unsuited
from fusedres.testing import channels_last

GEOMETRY = ([2, 1], [1, 1], [1, 2])


def operands(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = channels_last((2, 6, 9, 8), dtype, 2)
    weight = torch.randn(5, 6, 3, 3, generator=generator).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    norm, out_norm, bias = (torch.randn(*s, generator=generator).to(wide) for s in ((4, 6), (4, 5), (5,)))
    return x, norm, weight, bias, out_norm


def stock(x, norm, weight, bias):
    value = F.silu(norm[2, :, None, None] * x + norm[3, :, None, None])
    return F.conv2d(value, weight, bias, *GEOMETRY)


@pytest.mark.parametrize("into", [False, True])
def test_fprop(into):
    x, norm, weight, bias, _ = operands()
    expected = stock(x, norm, weight, bias)
    buffer = channels_last((2, 9, *expected.shape[2:]), torch.float64, 3)
    y, stats = CONV_FUSED_FPROP.reference(
        x, norm, 4, 0.0, weight, bias, *GEOMETRY, True, buffer[:, 2:7] if into else None
    )
    torch.testing.assert_close(buffer[:, 2:7] if into else y, expected, rtol=1e-12, atol=1e-12)
    assert y.numel() == (0 if into else expected.numel())
    torch.testing.assert_close(stats[0], expected.mean((0, 2, 3)))
    torch.testing.assert_close(stats[1], expected.var((0, 2, 3), correction=0) * (expected.numel() / 5))


@pytest.mark.parametrize("into", [False, True])
def test_join(into):
    x, norm, weight, bias, out_norm = operands()
    y = stock(x, norm, weight, bias)
    side = channels_last(tuple(y.shape), torch.float64, 4)
    expected = F.relu(out_norm[2, :, None, None] * y + out_norm[3, :, None, None] + side)
    buffer = channels_last((2, 9, *y.shape[2:]), torch.float64, 3)
    args = (x, norm, 4, 0.0, weight, bias, *GEOMETRY, out_norm, side, None, 1, 0.0, buffer[:, 2:7] if into else None)
    out = CONV_FUSED_JOIN.reference(*args)
    torch.testing.assert_close(buffer[:, 2:7] if into else out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_of_strided_convolutions(dtype):
    x, norm, weight, bias, out_norm = operands(dtype)
    args = (x, norm, 4, 0.0, weight, bias, *GEOMETRY)
    torch.library.opcheck(torch.ops.fusedres.conv_fused_fprop.default, (*args, True))
    torch.library.opcheck(torch.ops.fusedres.conv_fused_fprop.default, (*args, False))
    torch.library.opcheck(torch.ops.fusedres.conv_fused_join.default, (*args, out_norm, None, None, 1, 0.0))


@pytest.mark.parametrize("kind", ["fprop", "dgrad", "wgrad"])
@pytest.mark.parametrize("channels,slice_of,filters", [(64, 64, 64), (8, 64, 8), (8, 8, 64)], ids=str)
def test_an_image_too_large_for_offsets_of_32_bits_is_refused(kind, channels, slice_of, filters):
    """Where pixels are counted from its beginning: with a stride or with taps."""
    weight = torch.empty(filters, channels, 1, 1, dtype=torch.bfloat16, device="meta")
    taps = torch.empty(filters, channels, 3, 3, dtype=torch.bfloat16, device="meta")
    dense, half, three = (ConvGeometry((s, s), (p, p), (1, 1), 1) for s, p in ((1, 0), (2, 0), (1, 1)))

    def reasons(size):
        x = torch.empty(1, slice_of, size, size, dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last)
        x = x[:, :channels]
        found = ((weight, dense), (weight, half), (taps, three))
        return [conv_fused_unsuited(kind, x, w, g) for w, g in found]

    assert reasons(4096) == [None] * 3
    plain, strided, padded = reasons(8192)
    assert plain is None and "too large for offsets of 32 bits" in padded
    assert (strided is None) == (slice_of == 8)  # the result's pixels are a quarter as many
