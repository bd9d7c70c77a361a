"""The public function: agreement with torchdiffeq in states, gradients and evaluations; errors."""

from __future__ import annotations

import pytest
import torch
from odefuncs import Counting, TimeConv
from torch import Tensor, nn

from fusedres.ode import METHODS, odeint
from fusedres.testing import assert_within_budget, channels_last

torchdiffeq = pytest.importorskip("torchdiffeq")

TIMES = {"forward": (0.0, 1.0), "backward in time": (1.0, -0.5), "several": (0.0, 0.3, 0.4, 1.0)}
# The first step is given: to autograd it is a constant here, while torchdiffeq differentiates its own choice of it.
OPTIONS = {
    "euler": {},
    "midpoint": {"step_size": 0.25},
    "rk4": {"step_size": 0.15},
    "dopri5": {"rtol": 1e-4, "atol": 1e-5, "first_step": 0.05},
}


def solved(solve, function: nn.Module, x: Tensor, t, **options) -> list[Tensor]:
    """States, then the gradients of the input and of every parameter."""
    function.zero_grad()
    leaf = x.detach().requires_grad_()
    states = solve(function, leaf, t, **options)
    grad = torch.randn(states.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    states.backward(grad.to(states.dtype))
    return [states.detach(), leaf.grad, *(p.grad.clone() for p in function.parameters())]


def theirs(function, x, t, method, rtol=1e-7, atol=1e-9, **options):
    t = torch.tensor(t, dtype=torch.float64)
    return torchdiffeq.odeint(function, x, t, method=method, rtol=rtol, atol=atol, options=options)


@pytest.mark.parametrize("t", TIMES.values(), ids=TIMES)
@pytest.mark.parametrize("method", METHODS)
def test_agrees_with_torchdiffeq_to_rounding(method, t):
    x = channels_last((2, 6, 5, 4), torch.float64)
    functions = [Counting(TimeConv().double()) for _ in range(2)]
    functions[1].load_state_dict(functions[0].state_dict())
    ours = solved(odeint, functions[0], x, t, method=method, **OPTIONS[method])
    expected = solved(theirs, functions[1], x, t, method=method, **OPTIONS[method])
    for a, b in zip(ours, expected):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    assert functions[0].times == pytest.approx(functions[1].times, abs=1e-9)


@pytest.mark.parametrize("t", TIMES.values(), ids=TIMES)
def test_chooses_the_same_first_step(t):
    x = channels_last((2, 6, 5, 4), torch.float64)
    function = Counting(TimeConv().double())
    ours = odeint(function, x, t, rtol=1e-5, atol=1e-6)
    times, function.times = function.times, []
    torch.testing.assert_close(ours, theirs(function, x, t, "dopri5", 1e-5, 1e-6), rtol=1e-11, atol=1e-11)
    assert times == pytest.approx(function.times, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_rounds_no_worse_than_torchdiffeq(method, dtype):
    function, x = TimeConv().to(dtype), channels_last((2, 6, 9, 8), dtype)
    options = OPTIONS[method] | ({"rtol": 0.05, "atol": 0.05} if method == "dopri5" and dtype != torch.float32 else {})
    ours, expected = (solved(s, function, x, (0.0, 1.0), method=method, **options) for s in (odeint, theirs))
    exact = solved(theirs, function.double(), x.double(), (0.0, 1.0), method=method, **options)
    for i, tensors in enumerate(zip(ours, expected, exact)):
        assert_within_budget(*tensors, name=f"result {i}")


def test_gradients_twice():
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)

    def solve(x: Tensor, weight: Tensor) -> Tensor:
        return odeint(lambda t, y: torch.tanh(y @ weight) * t, x, method="rk4")[-1]

    torch.autograd.gradcheck(solve, (x, weight))
    torch.autograd.gradgradcheck(solve, (x, weight))


def test_wrong_arguments_are_named():
    x = torch.zeros(2, 3)
    with pytest.raises(TypeError, match="x must be a tensor, got tuple"):
        odeint(lambda t, x: x, (x, x))
    with pytest.raises(TypeError, match=r"x must be of a dtype among .*, got torch.int64"):
        odeint(lambda t, x: x, x.long())
    with pytest.raises(ValueError, match=r"derivative of the state's shape, got \(3,\) for a state of shape \(2, 3\)"):
        odeint(lambda t, x: x[0], x)
    with pytest.raises(TypeError, match="odefunc must return a tensor, got tuple"):
        odeint(lambda t, x: (x,), x)
    with pytest.raises(ValueError, match="method must be one of"):
        odeint(lambda t, x: x, x, method="heun")
