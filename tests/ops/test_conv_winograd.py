"""3x3 convolutions by minimal filtering (conv_winograd and conv_winograd_pack, and the CPU kernels of conv_fused_fprop
and conv_fused_dgrad), alone and with what is fused around them, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fusedres
from fusedres.ops.activations import ACTIVATIONS, Activation
from fusedres.ops.conv import ConvGeometry
from fusedres.ops.conv_fused import CONV_FUSED_FPROP, conv_fused_refuses
from fusedres.ops.conv_fused_backward import CONV_FUSED_DGRAD
from fusedres.ops.conv_winograd import CONV_WINOGRAD, CONV_WINOGRAD_PACK, winograd_unsuited
from fusedres.testing import assert_within_budget, channels_last, compare, sliced

relaxed = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
ONE = ConvGeometry((1, 1), (1, 1), (1, 1), 1)


def randn(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def weights(filters: int, channels: int, layout=torch.channels_last) -> torch.Tensor:
    return (randn(filters, channels, 3, 3, seed=1) / (9 * channels) ** 0.5).contiguous(memory_format=layout)


def rows(channels: int, seed: int = 2) -> torch.Tensor:
    """Of a norm: mean, rstd, scale, shift."""
    mean, rstd, scale, shift = randn(4, channels, seed=seed)
    return torch.stack((mean, rstd.abs() + 0.5, scale + 1.5, shift))


def check(op, arguments) -> None:
    """The kernel against the reference in float64; stock is the reference in float32, which convolves with oneDNN."""
    wide = [a.double() if isinstance(a, torch.Tensor) else a for a in arguments]
    found = [op.overload(b)(*a) for b, a in (("cpu", arguments), ("reference", arguments), ("reference", wide))]
    tuples = [(t,) if isinstance(t, torch.Tensor) else t for t in found]
    for i, (ours, stock, exact) in enumerate(zip(*tuples)):
        assert ours.stride() == stock.stride()
        assert_within_budget(ours, stock, exact, f"{op.name}, result {i}")


# ---------------------------------------------------------------------------------------------------------------------
# Folded, in inference
# ---------------------------------------------------------------------------------------------------------------------


def folded(shape, filters, act="relu", residual=True, bias=True, padding=(1, 1)):
    packed = CONV_WINOGRAD_PACK.overload("cpu")(weights(filters, shape[1]))
    size = [side + 2 * pad - 2 for side, pad in zip(shape[2:], padding)]
    side = channels_last((shape[0], filters, *size), seed=4) if residual else None
    chosen = Activation(act, 0.125)
    b = randn(filters, seed=3) if bias else None
    return [channels_last(shape), packed, filters, b, side, chosen.code, chosen.param, list(padding)]


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("filters", [1, 31, 32, 33, 70])
def test_transformed_weights(isa, filters, layout):
    weight = weights(filters, 5, layout)
    expected = CONV_WINOGRAD_PACK.reference(weight)
    torch.testing.assert_close(CONV_WINOGRAD_PACK.overload("cpu")(weight), expected, rtol=1e-6, atol=1e-7)


def test_reference_is_a_convolution():
    x, weight, bias = channels_last((2, 6, 7, 5), torch.float64), weights(5, 6).double(), randn(5).double()
    packed = CONV_WINOGRAD_PACK.reference(weight)
    out = CONV_WINOGRAD.reference(x, packed, 5, bias, None, 1, 0.0, [1, 1])
    torch.testing.assert_close(out, F.relu(F.conv2d(x, weight, bias, padding=1)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize(("residual", "bias"), [(True, True), (False, True), (True, False), (False, False)])
def test_folded(isa, act, residual, bias):
    check(CONV_WINOGRAD, folded((2, 24, 9, 12), 35, act, residual, bias))


@relaxed
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(2, 12), st.integers(2, 12)),
    filters=st.integers(1, 70),
    padding=st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
def test_folded_in_any_shape(shape, filters, padding):
    arguments = folded(shape, filters, padding=padding)
    expected = CONV_WINOGRAD.reference(*arguments)
    torch.testing.assert_close(CONV_WINOGRAD.overload("cpu")(*arguments), expected, rtol=1e-4, atol=1e-4)


def test_a_slice_is_read_in_place():
    arguments = folded((2, 24, 9, 12), 35)
    expected = CONV_WINOGRAD.overload("cpu")(*arguments)
    arguments[0] = sliced((2, 24, 9, 12))
    assert torch.equal(CONV_WINOGRAD.overload("cpu")(*arguments), expected)


# ---------------------------------------------------------------------------------------------------------------------
# In training
# ---------------------------------------------------------------------------------------------------------------------


def fprop(shape, filters, act="relu", normed=True, bias=True, padding=1, want_stats=True):
    chosen = Activation(act, 0.125)
    norm, b = (rows(shape[1]) if normed else None), (randn(filters, seed=3) if bias else None)
    pad = [padding, padding]
    operands = [channels_last(shape), norm, chosen.code, chosen.param, weights(filters, shape[1]), b]
    return [*operands, [1, 1], pad, [1, 1], want_stats]


def dgrad(shape, filters, act="relu", normed=True, pending=True, addend=True, padding=1):
    chosen, pad = Activation(act, 0.125), [padding, padding]
    size = [side + 2 * padding - 2 for side in shape[2:]]
    g, y = (channels_last((shape[0], filters, *size), seed=seed) for seed in (3, 4))
    scale, slope, mean, offset = randn(4, filters, seed=5)
    gradient = (y, torch.stack((scale, 0.1 * slope, mean, 0.1 * offset))) if pending else (None, None)
    operands = [g, *gradient, weights(filters, shape[1]), channels_last(shape, seed=6)]
    operands += [rows(shape[1]) if normed else None, chosen.code, chosen.param, [1, 1], pad, [1, 1]]
    return [*operands, channels_last(shape, seed=7) if addend else None]


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_fprop(isa, act, padding):
    check(CONV_FUSED_FPROP, fprop((2, 40, 13, 9), 35, act, padding=padding))


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("want_stats", [True, False])
def test_fprop_of_an_applied_value(normed, want_stats):
    check(CONV_FUSED_FPROP, fprop((2, 40, 13, 9), 35, "identity", normed, bias=False, want_stats=want_stats))


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_dgrad(isa, act, padding):
    check(CONV_FUSED_DGRAD, dgrad((2, 40, 13, 9), 35, act, padding=padding))


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("pending", [True, False])
@pytest.mark.parametrize("addend", [True, False])
def test_dgrad_with_less_around_it(normed, pending, addend):
    check(CONV_FUSED_DGRAD, dgrad((2, 40, 13, 9), 35, "relu", normed, pending, addend))


@pytest.mark.parametrize("op,arguments", [(CONV_FUSED_FPROP, fprop), (CONV_FUSED_DGRAD, dgrad)])
def test_written_into_a_slice(op, arguments):
    arguments = arguments((2, 40, 13, 9), 40)
    expected, *others = op.overload("cpu")(*arguments)
    into = sliced((2, 40, 13, 9), seed=9)
    empty, *again = op.overload("cpu")(*arguments, into)
    assert empty.numel() == 0 and torch.equal(into, expected)
    assert all(torch.equal(a, b) for a, b in zip(again, others))


def test_dgrad_may_write_where_its_addend_is():
    arguments = dgrad((2, 40, 13, 9), 35)
    expected, sums = CONV_FUSED_DGRAD.overload("cpu")(*arguments)
    onto = arguments[-1]
    _, again = CONV_FUSED_DGRAD.overload("cpu")(*arguments, onto)
    assert torch.equal(onto, expected) and torch.equal(sums, again)


@pytest.mark.parametrize("op,arguments", [(CONV_FUSED_FPROP, fprop), (CONV_FUSED_DGRAD, dgrad)])
@pytest.mark.parametrize("shape,filters", [((4, 64, 30, 28), 64), ((2, 256, 7, 7), 288)])
def test_bitwise_the_same_for_any_number_of_threads(op, arguments, shape, filters, threads):
    arguments = arguments(shape, filters)
    one, two, three = (threads(count, op.overload("cpu"), *arguments) for count in (1, 2, 3))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(one, two, three))


# ---------------------------------------------------------------------------------------------------------------------
# What is not finite
# ---------------------------------------------------------------------------------------------------------------------


def same_where_not_finite(ours, stock) -> None:
    assert torch.equal(ours.isnan(), stock.isnan())
    assert torch.equal(ours == float("inf"), stock == float("inf"))
    assert torch.equal(ours == float("-inf"), stock == float("-inf"))
    torch.testing.assert_close(ours.nan_to_num(0, 0, 0), stock.nan_to_num(0, 0, 0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_only_results_that_see_a_value_have_it(isa, value):
    x, weight = channels_last((2, 20, 9, 9)), weights(40, 20)
    x[0, 3, 4, 4], x[1, 5, 0, 0], x[1, 6, 8, 3] = value, value, value
    stock = F.conv2d(x, weight, padding=1)
    ours, _ = CONV_FUSED_FPROP.overload("cpu")(x, None, 0, 0.0, weight, None, [1, 1], [1, 1], [1, 1], False)
    same_where_not_finite(ours, stock)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(isa, value):
    x, weight = channels_last((2, 20, 9, 9)), weights(40, 20)
    weight[3, 2, 1, 1] = value
    stock = F.conv2d(x, weight, padding=1)
    ours, _ = CONV_FUSED_FPROP.overload("cpu")(x, None, 0, 0.0, weight, None, [1, 1], [1, 1], [1, 1], False)
    same_where_not_finite(ours, stock)


def test_large_values_overflow_no_earlier_than_stock():
    x, weight = channels_last((1, 8, 6, 6)).abs().clamp(max=2) * 1.5e38, torch.zeros(8, 8, 3, 3)
    weight[:, :, 1, 1] = torch.eye(8)
    ours, _ = CONV_FUSED_FPROP.overload("cpu")(x, None, 0, 0.0, weight, None, [1, 1], [1, 1], [1, 1], False)
    assert torch.equal(ours, x)


# ---------------------------------------------------------------------------------------------------------------------
# Who runs it
# ---------------------------------------------------------------------------------------------------------------------


def test_what_is_unsuited_says_why():
    x, weight = channels_last((8, 32, 14, 14)), weights(32, 32)
    assert winograd_unsuited(x, weight, ONE) is None
    assert "float32" in winograd_unsuited(x.bfloat16(), weight.bfloat16(), ONE)
    assert "3x3" in winograd_unsuited(x, weight[..., :1, :1], ONE)
    for change in ({"stride": (2, 2)}, {"dilation": (2, 2)}, {"groups": 2}):
        assert "stride 1, dilation 1 and no groups" in winograd_unsuited(x, weight, ONE._replace(**change))
    assert "channels" in winograd_unsuited(x[:, :8], weight[:, :8], ONE)
    assert "tiles" in winograd_unsuited(x[:1, :, :6, :6], weight, ONE)
    assert "channels_last" in conv_fused_refuses("fprop", "cpu", x.contiguous(), weight, ONE, prologue=True)
    assert "padding" in conv_fused_refuses("dgrad", "cpu", x, weight, ONE._replace(padding=(3, 3)), prologue=True)
    assert "conv_wgrad" in conv_fused_refuses("wgrad", "cpu", x, weight, ONE, prologue=True)


def test_without_vector_instructions_the_vendor_runs(isa):
    reason = winograd_unsuited(channels_last((8, 32, 14, 14)), weights(32, 32), ONE)
    assert (reason is not None) == (isa == "scalar")


def test_wrong_operands_raise():
    arguments = fprop((2, 8, 6, 5), 8)
    for index, value, message in [
        (0, channels_last((2, 9, 6, 5)), "x must be"),
        (4, weights(8, 8)[..., :2, :2], "3x3 kernels"),
        (6, [2, 2], "stride 1"),
        (5, randn(7), "bias must be"),
    ]:
        wrong = [*arguments]
        wrong[index] = value
        with pytest.raises(RuntimeError, match=message):
            CONV_FUSED_FPROP.overload("cpu")(*wrong)
    arguments = dgrad((2, 8, 6, 5), 8)
    arguments[4] = channels_last((2, 8, 7, 5))
    with pytest.raises(RuntimeError, match="the input of a convolution with this result"):
        CONV_FUSED_DGRAD.overload("cpu")(*arguments)
    with pytest.raises(RuntimeError, match="packed must be"):
        CONV_WINOGRAD.overload("cpu")(channels_last((2, 8, 6, 5)), randn(2, 16, 8, 32), 8, None, None, 0, 0.0, [1, 1])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backward", [True, False])
def test_a_network_runs_by_it(training, backward):
    """Blocks whose 3x3 convolutions suit, in every way that they run; which ops, and how exactly."""
    net = nn.Sequential(
        nn.Conv2d(48, 48, 3, padding=1, bias=False),
        nn.BatchNorm2d(48),
        nn.ReLU(),
        nn.Conv2d(48, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 48, 1),
    )
    ran = set()

    class Recording(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "fusedres":
                ran.add(func._opname)
            return func(*args, **(kwargs or {}))

    def fuse(model):
        fusedres.patch(model)

    with Recording():
        found = compare(
            net.train(training), fuse, lambda s: [channels_last((4, 48, 20, 20), seed=s)], backward=backward
        )
    found.check()
    if backward:
        assert {"conv_fused_fprop_cpu", "conv_fused_dgrad_cpu"} <= ran
    elif not training:
        assert "conv_winograd_cpu" in ran
