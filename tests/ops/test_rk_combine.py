"""The Runge-Kutta updates and the error norm: kernels and the public function against stock PyTorch and float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fusedres import select
from fusedres.benchmarking.memory import saved_bytes
from fusedres.ops import rk_combine
from fusedres.ops.rk_combine import error_norm
from fusedres.testing import INPUTS, assert_within_budget, channels_last, compare, contiguous

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = {"channels_last": channels_last, "contiguous": contiguous}
WEIGHTS = [0.125, -0.3, 1.0, 0.7, -1.4, 0.02, 2.0]
TOLERANCES = (1e-3, 1e-4)
relaxed = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


def operands(make, shape: tuple[int, ...], count: int, dtype: torch.dtype = torch.float32):
    """A state, and stages with their weights."""
    y, *stages = (make(shape, dtype, seed) for seed in range(count + 1))
    return y, stages, WEIGHTS[:count]


def stock(y: Tensor, stages: list[Tensor], weights: list[float]) -> Tensor:
    for stage, weight in zip(stages, weights):
        y = y + weight * stage
    return y


def stock_error(y0: Tensor, y1: Tensor, stages: list[Tensor], weights: list[float], rtol: float, atol: float) -> Tensor:
    """As torchdiffeq has it."""
    error = sum(weight * stage for stage, weight in zip(stages, weights))
    ratio = error / (atol + rtol * torch.max(y0.abs(), y1.abs()))
    return ratio.pow(2).mean().sqrt()


def doubled(stages: list[Tensor]) -> list[Tensor]:
    return [stage.double() for stage in stages]


# ---------------------------------------------------------------------------------------------------------------------
# The kernels
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_against_float64(isa, layout, dtype):
    for count in range(len(WEIGHTS) + 1):
        y, stages, weights = operands(LAYOUTS[layout], (2, 37, 7, 5), count, dtype)
        ours = torch.ops.fusedres.rk_combine_cpu(y, stages, weights)
        assert ours.stride() == y.stride()
        assert_within_budget(ours, stock(y, stages, weights), stock(y.double(), doubled(stages), weights))
        grads = torch.ops.fusedres.rk_combine_backward_cpu(y, weights)
        assert len(grads) == count
        for grad, weight in zip(grads, weights):
            assert grad.stride() == y.stride()
            assert_within_budget(grad, y * weight, y.double() * weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_error_against_float64(isa, layout, dtype):
    for count in range(1, len(WEIGHTS) + 1):
        y0, stages, weights = operands(LAYOUTS[layout], (3, 37, 31, 7), count, dtype)  # several pieces, the last short
        y1 = LAYOUTS[layout](y0.shape, dtype, 20)
        ours = torch.ops.fusedres.rk_error_cpu(y0, y1, stages, weights, *TOLERANCES)
        exact = stock_error(y0.double(), y1.double(), doubled(stages), weights, *TOLERANCES)
        wide = [t.float() for t in stages]  # the norm is a float32 number, whatever the state
        assert_within_budget(ours, stock_error(y0.float(), y1.float(), wide, weights, *TOLERANCES), exact)


@pytest.mark.parametrize("name", ["rk_combine", "rk_combine_backward", "rk_error"])
def test_every_remainder(isa, name):
    for length in range(1, 68):
        y, stages, weights = operands(contiguous, (length,), 3)
        arguments = {
            "rk_combine": (y, stages, weights),
            "rk_combine_backward": (y, weights),
            "rk_error": (y, stages[0], stages, weights, *TOLERANCES),
        }[name]
        ours, expected = (getattr(torch.ops.fusedres, name + suffix)(*arguments) for suffix in ("_cpu", ""))
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@relaxed
@given(
    shape=st.one_of(
        st.tuples(st.integers(0, 3), st.integers(1, 70), st.integers(0, 17), st.integers(1, 17)),
        st.tuples(st.integers(0, 9), st.integers(1, 300)),
        st.just(()),
    ),
    layout=st.sampled_from(sorted(LAYOUTS)),
    count=st.integers(0, 7),
)
def test_any_shape(shape, layout, count):
    y, stages, weights = operands(LAYOUTS[layout] if len(shape) == 4 else contiguous, shape, count)
    for name, arguments in (("rk_combine", (y, stages, weights)), ("rk_error", (y, y, stages, weights, *TOLERANCES))):
        ours, expected = (getattr(torch.ops.fusedres, name + suffix)(*arguments) for suffix in ("_cpu", ""))
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_no_tolerance_for_what_is_not_there(isa):
    """Beyond a tensor's end there are no elements whose tolerance could be zero."""
    y, stage = torch.full((5,), 2.0), torch.full((5,), 0.5)
    error = torch.ops.fusedres.rk_error_cpu(y, y, [stage], [1.0], 0.5, 0.0)
    assert float(error) == pytest.approx(0.5)


def test_tolerances_that_float32_rounds(isa):
    """By half a unit: the norm is that of those that were given."""
    ones = torch.ones(70)
    tolerance = 2.0**-10 * (1 + 0.99 * 2.0**-24)
    for rtol, atol in ((0.0, tolerance), (tolerance, 0.0), (tolerance, tolerance)):
        error = torch.ops.fusedres.rk_error_cpu(ones, ones, [ones], [1.0], rtol, atol)
        assert torch.equal(error, torch.tensor(1 / (rtol + atol))), (rtol, atol)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_values_travel_as_in_stock(isa, value):
    for where in range(3):
        y, stages, weights = operands(contiguous, (70,), 2)
        (y, *stages)[where][40] = value
        assert torch.equal(
            torch.ops.fusedres.rk_combine_cpu(y, stages, weights).isfinite(), stock(y, stages, weights).isfinite()
        )
        arguments = (y, y.clone(), stages, weights, *TOLERANCES)
        ours, expected = torch.ops.fusedres.rk_error_cpu(*arguments), stock_error(*arguments)
        assert bool(ours.isnan()) == bool(expected.isnan()) and bool(ours.isinf()) == bool(expected.isinf())


def test_bitwise_the_same_for_any_number_of_threads(threads):
    y, stages, weights = operands(channels_last, (3, 48, 33, 33), 6)
    for op, arguments in (
        (torch.ops.fusedres.rk_combine_cpu, (y, stages, weights)),
        (torch.ops.fusedres.rk_error_cpu, (y, stages[0], stages, weights, *TOLERANCES)),
    ):
        assert torch.equal(threads(1, op, *arguments), threads(2, op, *arguments))


def test_kernels_refuse_what_does_not_fit():
    y = torch.zeros(2, 3, 4, 5)
    with pytest.raises(RuntimeError, match="2 stages and 1 weights"):
        torch.ops.fusedres.rk_combine_cpu(y, [y, y], [1.0])
    with pytest.raises(RuntimeError, match="a stage differs"):
        torch.ops.fusedres.rk_combine_cpu(y, [y[:1]], [1.0])
    with pytest.raises(RuntimeError, match="contiguous"):
        torch.ops.fusedres.rk_error_cpu(y, y, [y.contiguous(memory_format=torch.channels_last)], [1.0], 1e-3, 1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# The public function, and the norm that the solvers take
# ---------------------------------------------------------------------------------------------------------------------


class Update(nn.Module):
    """An update as a module of a state and three stages."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, y: Tensor, *stages: Tensor) -> Tensor:
        return self.function(y, stages, WEIGHTS[: len(stages)])


@pytest.mark.parametrize("make", INPUTS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_function_against_stock(make, dtype):
    def inputs(seed: int) -> list[Tensor]:
        return [INPUTS[make]((3, 20, 9, 8), seed=4 * seed + i) for i in range(4)]

    compare(Update(stock), lambda plain: Update(rk_combine), inputs, dtype=dtype).check()


def test_stages_of_other_layouts_and_dtypes():
    y, stages, weights = operands(channels_last, (2, 12, 5, 5), 3)
    stages[0], stages[1] = stages[0].contiguous(), stages[1].bfloat16()
    leaves = [stage.clone().requires_grad_() for stage in stages]
    with torch.autocast("cpu", torch.bfloat16):
        out = rk_combine(y, leaves, weights)
    torch.testing.assert_close(out, stock(y, [stage.float() for stage in stages], weights))
    assert out.stride() == y.stride()
    out.backward(torch.ones(()).expand(out.shape))
    for leaf, weight in zip(leaves, weights):
        torch.testing.assert_close(leaf.grad, torch.full_like(leaf, weight))


def test_gradcheck():
    y, stages, weights = operands(contiguous, (2, 3, 2, 2), 3, torch.float64)
    leaves = [t.requires_grad_() for t in (y, *stages)]
    torch.autograd.gradcheck(lambda y, *stages: rk_combine(y, stages, weights), leaves)
    torch.autograd.gradgradcheck(lambda y, *stages: rk_combine(y, stages, weights).square(), leaves)


def test_only_wanted_gradients_are_made():
    y, stages, weights = operands(contiguous, (4, 5), 3)
    stages[1].requires_grad_()
    rk_combine(y, stages, weights).sum().backward()
    torch.testing.assert_close(stages[1].grad, torch.full((4, 5), weights[1]))
    assert y.grad is None and stages[0].grad is None


def test_autograd_keeps_nothing():
    y, stages, weights = operands(contiguous, (4, 5), 3)
    leaves = [t.requires_grad_() for t in (y, *stages)]
    assert saved_bytes(nn.Identity(), lambda: rk_combine(leaves[0], leaves[1:], weights)) == 0


def test_compiled_and_transformed_it_is_stock():
    y, stages, weights = operands(contiguous, (4, 5), 3)

    def update(y: Tensor, *stages: Tensor) -> Tensor:
        return rk_combine(y, stages, weights)

    expected = stock(y, stages, weights)
    torch.testing.assert_close(torch.compile(update, backend="eager", fullgraph=True)(y, *stages), expected)
    torch.testing.assert_close(torch.vmap(update)(y, *stages), expected)
    low = [t.bfloat16() for t in (y, *stages)]
    assert torch.compile(update, backend="eager", fullgraph=True)(*low).dtype == torch.bfloat16


def test_small_states_run_as_stock_in_float32(monkeypatch):
    monkeypatch.setitem(select.FEWEST_ELEMENTS, "elementwise", 100)
    y, stages, weights = operands(contiguous, (99,), 3, torch.bfloat16)
    out = rk_combine(y.requires_grad_(), stages, weights)
    assert "RkCombine" not in out.grad_fn.name()
    wide = stock(y.float(), [stage.float() for stage in stages], weights)
    assert torch.equal(out, wide.bfloat16())
    y, stages, weights = operands(contiguous, (100,), 3)
    assert "RkCombine" in rk_combine(y.requires_grad_(), stages, weights).grad_fn.name()


def test_the_norm_takes_operands_as_they_come():
    y, stages, weights = operands(channels_last, (2, 12, 5, 5), 3)
    y1, stages[1] = stages[2].contiguous(), stages[1].contiguous()
    norm = error_norm(y.requires_grad_(), y1, stages, weights, *TOLERANCES)
    torch.testing.assert_close(norm, stock_error(y, y1, stages, weights, *TOLERANCES).detach())
    assert not norm.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_norm_of_nothing_is_zero(dtype):
    empty = torch.zeros(0, 3, dtype=dtype)
    assert float(error_norm(empty, empty, [empty], [1.0], 1e-3, 0.0)) == 0


def test_wrong_arguments_are_named():
    y = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"stages\[1\] of shape \(3, 2\) does not fit y of shape \(2, 3\)"):
        rk_combine(y, [y, y.T], [1.0, 1.0])
    with pytest.raises(ValueError, match="got 1 for 2"):
        rk_combine(y, [y, y], [1.0])
    with pytest.raises(TypeError, match=r"stages\[0\] must be a tensor, got float"):
        rk_combine(y, [1.0], [1.0])
    with pytest.raises(TypeError, match=r"stages\[0\] of shape .* is torch.float64"):
        rk_combine(y, [y.double()], [1.0])
    with pytest.raises(TypeError, match=r"weights\[0\] must be a number, got Tensor"):
        rk_combine(y, [y], [torch.ones(())])
