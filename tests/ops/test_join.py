"""The join forward: every instruction set, layout, dtype, residual and activation against float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusedres.ops.activations import ACTIVATIONS, Activation
from fusedres.ops.dropout import keep_scale
from fusedres.testing import assert_within_budget, channels_last, contiguous, sliced

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = {"channels_last": channels_last, "contiguous": contiguous, "sliced": sliced}
RESIDUALS = ("none", "plain", "affine")
ACTS = [Activation(name, 0.125) for name in ACTIVATIONS]
relaxed = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


def norm_of(channels: int, seed: int) -> tuple[Tensor, ...]:
    """gamma, beta, mean, var of a batch norm with constant statistics."""
    gamma, beta, mean, var = torch.randn(4, channels, generator=torch.Generator().manual_seed(seed))
    return gamma + 1.5, beta, mean, var.abs() + 0.1


def rows_of(norm: tuple[Tensor, ...] | None) -> Tensor | None:
    return None if norm is None else torch.ops.fusedres.bn_norm(None, 1.0, *norm, 0.0, 1e-5)


def stock(
    y: Tensor,
    norm: tuple[Tensor, ...] | None,
    residual: Tensor | None,
    side: tuple[Tensor, ...] | None,
    act: Activation,
    gain: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """The join from stock PyTorch's ops, in the dtype of ``y``; the mask is ours."""

    def normalised(x: Tensor, norm: tuple[Tensor, ...] | None) -> Tensor:
        if norm is None:
            return x
        gamma, beta, mean, var = (t.to(torch.promote_types(x.dtype, t.dtype)) for t in norm)
        return F.batch_norm(x, mean, var, gamma, beta, False, 0.0, 1e-5)

    z = normalised(y, norm)
    if gain is not None:
        z = z * gain[:, :, None, None].to(z.dtype)
    out = act(z if residual is None else z + normalised(residual, side))
    return out if seed is None else out * keep_scale(out.shape, dropout, seed, out.dtype, out.device)


def operands(make, shape: tuple[int, ...], dtype: torch.dtype, residual: str, normed: bool = True) -> tuple:
    norm = norm_of(shape[1], 1) if normed else None
    side = norm_of(shape[1], 2) if residual == "affine" else None
    return make(shape, dtype, 3), norm, None if residual == "none" else make(shape, dtype, 4), side


def kernel(
    y: Tensor, norm, residual: Tensor | None, side, act: Activation, *modifiers, name: str = "join_cpu"
) -> Tensor:
    op = getattr(torch.ops.fusedres, name)
    return op(y, rows_of(norm), residual, rows_of(side), act.code, act.param, *modifiers)


def gain_of(y: Tensor) -> Tensor:
    """A factor of every sample and channel that every dtype holds; zero for some, as stochastic depth has it."""
    gain = torch.rand(y.shape[:2], generator=torch.Generator().manual_seed(9)).bfloat16().float()
    return torch.where(gain < 0.2, 0.0, gain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("normed", [True, False], ids=["norm", "no norm"])
def test_against_float64(isa, layout, dtype, normed):
    for residual, act in itertools.product(RESIDUALS, ACTS):
        y, norm, r, side = operands(LAYOUTS[layout], (2, 37, 6, 5), dtype, residual, normed)
        ours = kernel(y, norm, r, side, act)
        expected = stock(y, norm, r, side, act)
        exact = stock(y.double(), norm, None if r is None else r.double(), side, act)
        assert ours.stride() == torch.empty_like(y).stride()
        assert_within_budget(ours, expected, exact, f"{residual} {act}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gain_and_dropout_against_float64(isa, layout, dtype, dropout):
    for residual, act in itertools.product(RESIDUALS, ACTS):
        y, norm, r, side = operands(LAYOUTS[layout], (3, 37, 6, 5), dtype, residual)
        modifiers = gain_of(y), dropout, torch.tensor([1 << 40]) if dropout else None
        ours = kernel(y, norm, r, side, act, *modifiers)
        expected = stock(y, norm, r, side, act, *modifiers)
        exact = stock(y.double(), norm, None if r is None else r.double(), side, act, *modifiers)
        assert_within_budget(ours, expected, exact, f"{residual} {act}")


def test_a_slice_is_as_good_as_a_copy_of_it(isa):
    """To the bit, whichever of the operands it is."""
    for residual, dtype in itertools.product(RESIDUALS, DTYPES):
        y, norm, r, side = operands(sliced, (3, 37, 6, 5), dtype, residual)
        copies = [None if t is None else t.contiguous(memory_format=torch.channels_last) for t in (y, r)]
        expected = kernel(copies[0], norm, copies[1], side, Activation("relu"), gain_of(y))
        for a, b in itertools.product((y, copies[0]), (r, copies[1])):
            assert torch.equal(kernel(a, norm, b, side, Activation("relu"), gain_of(y)), expected)


def close_to_reference(*args) -> None:
    torch.testing.assert_close(kernel(*args), kernel(*args, name="join"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_remainder_of_channels(isa, layout):
    for channels in range(1, 68):
        close_to_reference(*operands(LAYOUTS[layout], (2, channels, 3, 3), torch.float32, "affine"), Activation("relu"))


@relaxed
@given(
    n=st.integers(0, 3),
    c=st.integers(1, 70),
    h=st.integers(0, 17),
    w=st.integers(1, 17),
    layout=st.sampled_from(sorted(LAYOUTS)),
    residual=st.sampled_from(RESIDUALS),
    act=st.sampled_from(ACTS),
    gained=st.booleans(),
    dropout=st.sampled_from((0.0, 0.5)),
)
def test_any_shape(n, c, h, w, layout, residual, act, gained, dropout):
    args = operands(LAYOUTS[layout], (n, c, h, w), torch.float32, residual)
    close_to_reference(*args, act, gain_of(args[0]) if gained else None, dropout, torch.tensor([n]))


def test_gain_of_nothing_and_of_one(isa):
    """Zero leaves the residual alone, one leaves everything as it is, and zero times infinity is NaN."""
    y, norm, r, side = operands(channels_last, (2, 19, 3, 4), torch.float32, "affine")
    args = y, norm, r, side, Activation("identity")
    assert torch.equal(kernel(*args, torch.ones(2, 19)), kernel(*args))
    assert torch.equal(kernel(*args, torch.zeros(2, 19)), kernel(torch.zeros_like(y), None, *args[2:]))
    y[1, 3, 2, 2] = float("inf")
    assert kernel(*args, torch.zeros(2, 19))[1, 3, 2, 2].isnan()


@pytest.mark.parametrize("act", ACTS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_values_travel_as_in_stock(isa, layout, dtype, act):
    y, norm, r, side = operands(LAYOUTS[layout], (1, 19, 3, 4), dtype, "plain")
    values = [float("nan"), float("inf"), -float("inf")]
    if act.name == "gelu":
        values = values[:1]  # stock PyTorch itself has two answers to infinity, by layout
    for i, value in enumerate(values):
        y[0, i, 1, 1] = value
        r[0, i + 8, 2, 3] = value
    ours, expected = kernel(y, norm, r, side, act), stock(y, norm, r, side, act)
    assert torch.equal(ours.isnan(), expected.isnan())
    assert torch.equal(ours.isinf(), expected.isinf())
    assert torch.equal(ours[ours.isinf()], expected[expected.isinf()])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bitwise_the_same_for_any_number_of_threads(layout, threads):
    args = (*operands(LAYOUTS[layout], (3, 48, 33, 33), torch.bfloat16, "affine"), Activation("silu"))
    args += gain_of(args[0]), 0.3, torch.tensor([5])
    assert torch.equal(threads(1, kernel, *args), threads(2, kernel, *args))


def test_wrong_input_raises():
    y = torch.zeros(2, 3, 4, 5)
    with pytest.raises(RuntimeError, match="residual differs"):
        torch.ops.fusedres.join_cpu(y, None, y[:, :2].contiguous(), None, 0, 0.0)
    with pytest.raises(RuntimeError, match=r"\[4, 3\]"):
        torch.ops.fusedres.join_cpu(y, torch.zeros(4, 2), None, None, 0, 0.0)
    with pytest.raises(RuntimeError, match="residual must have the layout"):
        torch.ops.fusedres.join_cpu(y, None, y.contiguous(memory_format=torch.channels_last), None, 0, 0.0)
    with pytest.raises(RuntimeError, match="y must have the layout"):
        torch.ops.fusedres.join_cpu(y.transpose(2, 3), None, None, None, 0, 0.0)
    for gain in (torch.ones(2), torch.ones(3, 2), torch.ones(3, 2).t(), torch.ones(2, 3, dtype=torch.float64)):
        with pytest.raises(RuntimeError, match=r"gain must be a contiguous float32 tensor of shape \[2, 3\]"):
            torch.ops.fusedres.join_cpu(y, None, None, None, 0, 0.0, gain)


@pytest.mark.parametrize("gained", [False, True])
def test_statistics_are_those_of_the_result(gained):
    y, norm, r, side = operands(channels_last, (2, 5, 4, 3), torch.bfloat16, "affine")
    args = (y, rows_of(norm), r, rows_of(side), 1, 0.0, gain_of(y) if gained else None)
    out, stats = torch.ops.fusedres.join_stats(*args)
    assert torch.equal(out, torch.ops.fusedres.join(*args))
    assert torch.equal(stats, torch.ops.fusedres.bn_stats(out))
