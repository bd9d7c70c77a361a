"""The weight gradient with a pending input, against stock PyTorch's autograd through the same chain."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusedres.ops.activations import ACTIVATIONS, Activation
from fusedres.ops.conv import ConvGeometry, conv_fprop, output_size
from fusedres.testing import assert_within_budget, channels_last

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GEOMETRIES = {
    "1x1": ((1, 1), ConvGeometry((1, 1), (0, 0), (1, 1), 1)),
    "1x1 stride": ((1, 1), ConvGeometry((2, 2), (0, 0), (1, 1), 1)),
    "3x3": ((3, 3), ConvGeometry((1, 1), (1, 1), (1, 1), 1)),
    "3x3 stride": ((3, 3), ConvGeometry((2, 2), (1, 1), (1, 1), 1)),
    "3x2 dilated": ((3, 2), ConvGeometry((1, 2), (2, 0), (2, 1), 1)),
    "7x7": ((7, 7), ConvGeometry((2, 2), (3, 3), (1, 1), 1)),
}
relaxed = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Case:
    def __init__(self, shape, filters: int, kernel, g: ConvGeometry, dtype, act: str = "relu", normed: bool = True):
        self.x, self.g, self.act = channels_last(shape, dtype), g, Activation(act, 0.125)
        size = output_size(shape[2:], kernel, g)
        self.grad = channels_last((shape[0], filters, *size), dtype, 1)
        self.weight = channels_last((filters, shape[1], *kernel), dtype, 2)
        scale, shift = torch.randn(2, shape[1], generator=torch.Generator().manual_seed(3))
        zero = torch.zeros_like(scale)
        self.rows = torch.stack((zero, zero + 1, scale + 1.5, shift)) if normed else None

    def run(self, name: str, out_dtype: torch.dtype = torch.float32) -> Tensor:
        out = torch.empty_like(self.weight, dtype=out_dtype)
        g, op = self.g, getattr(torch.ops.fusedres, name)
        op(self.grad, self.x, self.rows, self.act.code, self.act.param, g.stride, g.padding, g.dilation, out)
        return out

    def autograd(self, dtype: torch.dtype) -> Tensor:
        """What the convolution read was rounded; everything behind it is in ``dtype``."""
        z = self.x.to(torch.float32)
        if self.rows is not None:
            z = self.rows[2, :, None, None] * z + self.rows[3, :, None, None]
        z = self.act(z).to(self.x.dtype).to(dtype)
        weight = self.weight.to(dtype).requires_grad_()
        return torch.autograd.grad(conv_fprop(z, weight, None, self.g), weight, self.grad.to(dtype))[0]

    def check(self, name: str = "conv_wgrad_cpu") -> None:
        stock = self.autograd(self.x.dtype).float()
        assert_within_budget(self.run(name), stock, self.autograd(torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", GEOMETRIES)
def test_against_float64(isa, shape, dtype):
    Case((2, 40, 13, 9), 35, *GEOMETRIES[shape], dtype).check()


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("normed", [True, False], ids=["norm", "no norm"])
def test_pending_values(isa, act, normed):
    Case((2, 19, 6, 5), 9, *GEOMETRIES["3x3"], torch.float32, act, normed).check()


def close_to_reference(case: Case) -> None:
    torch.testing.assert_close(case.run("conv_wgrad_cpu"), case.run("conv_wgrad"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", ["1x1", "3x3"])
def test_every_remainder_of_channels(isa, shape):
    for channels in range(1, 68):
        close_to_reference(Case((1, channels, 4, 3), 68 - channels, *GEOMETRIES[shape], torch.float32))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_every_remainder_of_channels_by_minimal_filtering(isa, layout):
    for channels in range(32, 100, 3):
        case = Case((2, channels, 9, 10), 131 - channels, *GEOMETRIES["3x3"], torch.float32)
        case.weight = case.weight.contiguous(memory_format=layout)
        close_to_reference(case)


@relaxed
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(32, 70), st.integers(1, 20), st.integers(1, 20)),
    filters=st.integers(32, 70),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    act=st.sampled_from(("identity", "relu", "silu")),
    normed=st.booleans(),
)
def test_any_shape_by_minimal_filtering(shape, filters, padding, act, normed):
    g = ConvGeometry((1, 1), padding, (1, 1), 1)
    assume(min(output_size(shape[2:], (3, 3), g)) > 0)
    close_to_reference(Case(shape, filters, (3, 3), g, torch.float32, act, normed))


@relaxed
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 14), st.integers(1, 14)),
    filters=st.integers(1, 40),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
)
def test_any_shape(shape, filters, kernel, stride, padding, dilation):
    g = ConvGeometry(stride, padding, dilation, 1)
    assume(min(output_size(shape[2:], kernel, g)) > 0)
    close_to_reference(Case(shape, filters, kernel, g, torch.float32))


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_result_of_any_dtype_and_layout(out_dtype, layout):
    case = Case((2, 19, 6, 5), 17, *GEOMETRIES["3x3"], torch.bfloat16)
    case.weight = case.weight.contiguous(memory_format=layout)
    exact = case.autograd(torch.float64)
    assert_within_budget(case.run("conv_wgrad_cpu", out_dtype), exact.to(out_dtype), exact)


@pytest.mark.parametrize("shape", ["1x1", "3x3"])
def test_non_finite_values_reach_the_weights_that_read_them(isa, shape):
    case = Case((4, 40, 5, 5), 40, *GEOMETRIES[shape], torch.float32)
    case.grad[0, 3, 2, 2], case.x[0, 5, 1, 1] = float("nan"), float("inf")
    ours, stock = case.run("conv_wgrad_cpu"), case.autograd(torch.float32)
    assert torch.equal(ours.isfinite(), stock.isfinite())


@pytest.mark.parametrize("dtype", DTYPES)
def test_bitwise_the_same_for_any_number_of_threads(dtype, threads):
    case = Case((3, 48, 33, 20), 64, *GEOMETRIES["3x3"], dtype)
    assert torch.equal(threads(1, case.run, "conv_wgrad_cpu"), threads(2, case.run, "conv_wgrad_cpu"))


def test_wrong_input_raises():
    case = Case((2, 8, 6, 5), 8, *GEOMETRIES["3x3"], torch.float32)
    case.grad = case.grad[:, :, 1:].contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="size of this convolution's output"):
        case.run("conv_wgrad_cpu")
    case.x = case.x.double()
    with pytest.raises(RuntimeError, match="one dtype"):
        case.run("conv_wgrad_cpu")
