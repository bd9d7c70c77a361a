"""The convolution's geometry, and its gradients through the library."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fusedres.ops.conv import (
    ConvGeometry,
    conv_backward,
    conv_fprop,
    geometry,
    onednn_refuses,
    output_size,
    pointwise_dgrad_add_,
)
from fusedres.testing import channels_last

pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(deadline=None, max_examples=40)
@given(
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)), kernel=pairs, stride=pairs, padding=pairs, dilation=pairs
)
def test_output_size(size, kernel, stride, padding, dilation):
    g = ConvGeometry(stride, padding, dilation, 1)
    expected = output_size(size, kernel, g)
    assume(min(expected) > 0)
    assert conv_fprop(torch.zeros(1, 1, *size), torch.zeros(1, 1, *kernel), None, g).shape[2:] == expected


def test_string_padding():
    assert geometry(1, "same", (1, 2), 1, (3, 3)).padding == (1, 2)
    assert geometry(2, "valid", 1, 4, (3, 3)) == ConvGeometry((2, 2), (0, 0), (1, 1), 4)


@pytest.mark.parametrize("padding", ["same", "full"])
def test_padding_that_cannot_be_raises(padding):
    with pytest.raises(ValueError, match="padding"):
        geometry(1, padding, 1, 1, (2, 2))


@pytest.mark.parametrize("need_x", [True, False])
@pytest.mark.parametrize("need_weight", [True, False])
def test_only_the_gradients_that_are_needed(need_x, need_weight):
    x, w = torch.randn(2, 4, 5, 5, requires_grad=True), torch.randn(6, 2, 3, 3, requires_grad=True)
    g = ConvGeometry((2, 1), (1, 1), (1, 1), 2)
    out = F.conv2d(x, w, None, g.stride, g.padding, g.dilation, g.groups)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, (x, w), grad)
    found = conv_backward(grad, x.detach(), w.detach(), g, need_x, need_weight)
    for ours, stock, needed in zip(found, expected, (need_x, need_weight)):
        assert (ours is not None) == needed
        if needed:
            torch.testing.assert_close(ours, stock)


@pytest.mark.skipif(onednn_refuses("cpu", torch.float32) is not None, reason="needs oneDNN's fused convolutions")
def test_a_pointwise_dgrad_adds_to_what_is_there():
    onto, grad, weight = channels_last((2, 8, 5, 5)), channels_last((2, 6, 5, 5), seed=1), torch.randn(6, 8, 1, 1)
    expected = onto + F.conv_transpose2d(grad, weight)
    torch.library.opcheck(torch.ops.fusedres.pointwise_dgrad_add_.default, (onto.clone(), grad, weight))
    in_graph = onto.clone()
    torch.ops.fusedres.pointwise_dgrad_add_(in_graph, grad, weight)
    assert pointwise_dgrad_add_(onto, grad, weight) is onto
    torch.testing.assert_close(onto, expected)
    torch.testing.assert_close(in_graph, expected)
