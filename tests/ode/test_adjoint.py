"""The adjoint method: gradients as torchdiffeq's adjoint and as backpropagation have them, in constant memory."""

from __future__ import annotations

import pytest
import torch
from odefuncs import Counting, SmoothFused, TimeConv, fused_function
from torch import Tensor, nn

import fusedres
from fusedres.benchmarking.memory import saved_bytes
from fusedres.nn import ODEBlock
from fusedres.ode import METHODS
from fusedres.testing import channels_last, compare

OPTIONS = {
    "euler": {"t": (0.0, 0.2, 0.5, 1.0)},
    "midpoint": {"step_size": 0.25},
    "rk4": {"step_size": 0.15},
    "dopri5": {"rtol": 1e-4, "atol": 1e-5},
}


def gradients(block: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, then the gradients of the input and of every parameter."""
    block.zero_grad()
    leaf = x.detach().requires_grad_()
    out = block(leaf)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(out.dtype))
    return [out.detach(), leaf.grad, *(p.grad.clone() for p in block.parameters())]


class Theirs(nn.Module):
    """torchdiffeq's adjoint as a block."""

    def __init__(self, odefunc: nn.Module, method: str, t=(0.0, 1.0), step_size=None, **options) -> None:
        super().__init__()
        self.odefunc, self.method = odefunc, method
        self.t, self.options = t, options | ({"options": {"step_size": step_size}} if step_size else {})

    def forward(self, x: Tensor) -> Tensor:
        odeint_adjoint = pytest.importorskip("torchdiffeq").odeint_adjoint
        t = torch.tensor(self.t, dtype=torch.float64)
        return odeint_adjoint(self.odefunc, x, t, method=self.method, **self.options)[-1]


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "backward in time"])
@pytest.mark.parametrize("method", ["midpoint", "rk4", "dopri5"])
def test_agrees_with_torchdiffeq_to_rounding(method, reverse):
    options = OPTIONS[method] | {"t": (1.0, -0.5) if reverse else (0.0, 1.0)}
    functions = [Counting(TimeConv().double()) for _ in range(2)]
    functions[1].load_state_dict(functions[0].state_dict())
    x = channels_last((2, 6, 5, 4), torch.float64)
    ours = ODEBlock(functions[0], method, adjoint=True, **options)
    for a, b in zip(gradients(ours, x), gradients(Theirs(functions[1], method, **options), x)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert sum(ours.nfe) == len(functions[0].times) == len(functions[1].times)
    assert functions[0].times == pytest.approx(functions[1].times, abs=1e-9)  # through the controller


@pytest.mark.parametrize("make", [TimeConv, SmoothFused], ids=["plain", "fused"])
@pytest.mark.parametrize("method", METHODS)
def test_approaches_backpropagation_as_steps_shrink(method, make):
    function, x = make().double(), channels_last((2, 6, 4, 4), torch.float64)
    refinements = [{"rtol": r, "atol": r} for r in (1e-4, 1e-8)]
    if method != "dopri5":
        refinements = [{"step_size": h} for h in (0.05, 0.05 / 8)]
    errors = []
    for options in refinements:
        pair = (gradients(ODEBlock(function, method, adjoint=adjoint, **options), x) for adjoint in (True, False))
        (out, *ours), (expected_out, *expected) = pair
        torch.testing.assert_close(out, expected_out)
        errors.append(max(float((a - b).norm() / b.norm()) for a, b in zip(ours, expected)))
    assert errors[0] < 0.5 and errors[1] < errors[0] / 6


@pytest.mark.parametrize("method", METHODS)
def test_what_is_kept_does_not_depend_on_the_number_of_steps(method):
    function, x = TimeConv(), channels_last((2, 6, 8, 8)).requires_grad_()
    steps = [{"step_size": h} for h in (0.5, 0.05)]
    if method == "dopri5":
        steps = [{"rtol": r, "atol": r} for r in (1e-1, 1e-6)]
    kept, evaluations = {}, {}
    for adjoint in (True, False):
        blocks = [ODEBlock(function, method, adjoint=adjoint, **options) for options in steps]
        kept[adjoint] = [saved_bytes(block, lambda block=block: block(x)) for block in blocks]
        evaluations[adjoint] = [block.nfe.forward for block in blocks]
    assert evaluations[True] == evaluations[False] and evaluations[True][1] >= 2 * evaluations[True][0]
    assert kept[True] == [x.nbytes, x.nbytes]  # the output, and nothing else
    assert kept[False][1] > 1.5 * kept[False][0] > 3 * x.nbytes


class Through(nn.Module):
    """A function run on one backend, in forward and wherever the adjoint evaluates it."""

    def __init__(self, function: nn.Module, backend: str) -> None:
        super().__init__()
        self.function, self.backend = function, backend

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        with fusedres.use_backend(self.backend):
            return self.function(t, x)


@pytest.mark.parametrize("adjoint", [False, True])
def test_fused_blocks_in_training_give_what_stock_ones_give(adjoint):
    plain = ODEBlock(Through(fused_function(8), "stock"), "rk4", adjoint=adjoint).train()

    def fuse(block: nn.Module) -> None:
        block.odefunc.backend = "auto"

    compare(plain, fuse, lambda seed: [channels_last((4, 8, 6, 6), seed=seed)]).check()


def test_gradients_are_summed_in_float32():
    """A parameter's gradient grows by less than bfloat16 resolves, step after step."""

    class Drift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rate = nn.Parameter(torch.tensor(0.0, dtype=torch.bfloat16))

        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return self.rate.expand_as(x)

    function = Drift()
    x = torch.zeros(4, dtype=torch.bfloat16)
    ODEBlock(function, "euler", step_size=1 / 1024, adjoint=True)(x).sum().backward()
    assert float(function.rate.grad) == 4.0


def test_autocast_holds_in_backward():
    seen = []

    class Watching(TimeConv):
        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
            return super().forward(t, x)

    block = ODEBlock(Watching(), "midpoint", adjoint=True)
    x = channels_last((2, 6, 4, 4)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = block(x)
    assert out.dtype == torch.float32
    out.sum().backward()
    assert seen == [(True, torch.bfloat16)] * 4 and x.grad.dtype == torch.float32


def test_parameters_that_are_frozen_or_unused():
    function = TimeConv()
    function.conv1.weight.requires_grad_(False)
    function.spare = nn.Parameter(torch.ones(3))
    block = ODEBlock(function, "rk4", adjoint=True)
    block(channels_last((2, 6, 4, 4))).sum().backward()
    assert function.conv1.weight.grad is None
    assert torch.equal(function.spare.grad, torch.zeros(3))
    assert function.conv2.weight.grad.abs().sum() > 0


def test_a_function_that_reads_nothing():
    class Constant(nn.Module):
        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return torch.ones_like(x) * t

    x = torch.zeros(2, 3, requires_grad=True)
    out = ODEBlock(Constant(), adjoint=True)(x)
    torch.testing.assert_close(out.detach(), torch.full((2, 3), 0.5))
    out.backward(torch.full_like(out, 2.0))
    assert torch.equal(x.grad, torch.full((2, 3), 2.0))


@pytest.mark.parametrize("method", METHODS)
def test_an_empty_batch(method):
    block = ODEBlock(TimeConv(), method, adjoint=True)
    x = torch.zeros(0, 6, 4, 4, requires_grad=True)
    block(x).sum().backward()
    assert x.grad.shape == x.shape
    assert all(not p.grad.any() for p in block.parameters())


def test_once_differentiable_and_says_so():
    x = channels_last((2, 6, 4, 4)).requires_grad_()
    out = ODEBlock(TimeConv(), "rk4", adjoint=True)(x)
    with pytest.raises(RuntimeError, match="differentiable once; second derivatives need adjoint=False"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


def test_nothing_is_kept_where_no_gradient_is_wanted():
    block = ODEBlock(TimeConv(), "rk4", adjoint=True)
    with torch.no_grad():
        out = block(channels_last((2, 6, 4, 4)))
    assert not out.requires_grad and block.nfe == (4, 0)
