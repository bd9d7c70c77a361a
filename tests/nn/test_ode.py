"""ODEBlock as a module: what it returns, reports, keeps and refuses. Numbers are in tests/ode."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from odefuncs import Counting, TimeConv, fused_function, oscillator
from torch import nn

import fusedres
from fusedres.nn import ODEBlock
from fusedres.ode import METHODS, odeint
from fusedres.testing import channels_last

EASY = {"rtol": 1e-3, "atol": 1e-4}


def block_of(method: str = "dopri5", adjoint: bool = False, **options) -> ODEBlock:
    return ODEBlock(TimeConv(), method, adjoint=adjoint, **(EASY | options))


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("t", [(0, 1), (1.0, 0.0), (0.0, 0.25, 1.0), torch.tensor([0, 1])], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_it_is_the_last_state(method, t, adjoint):
    block, x = block_of(method, adjoint, t=t), channels_last((2, 6, 5, 4))
    only_ends = t if method != "dopri5" else (t[0], t[-1]) if isinstance(t, tuple) else t
    expected = odeint(block.odefunc, x, only_ends, method=method, **EASY)[-1]
    assert torch.equal(block(x), expected)
    assert torch.equal(block_like(block, (0.0, 2.0))(x, t), expected)


def block_like(block: ODEBlock, t) -> ODEBlock:
    """The block with other times of its own."""
    other = copy.deepcopy(block)
    other.times = t
    return other


def test_a_step_of_euler_is_a_residual_block():
    fn = nn.Conv2d(6, 6, 3, padding=1)
    x = channels_last((2, 6, 5, 4))
    torch.testing.assert_close(ODEBlock(lambda t, x: fn(x), "euler")(x), x + fn(x))


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_evaluations_are_counted(method, adjoint):
    function = Counting(TimeConv())
    block = ODEBlock(function, method, adjoint=adjoint, **EASY)
    assert block.nfe == (0, 0)
    out = block(channels_last((2, 6, 5, 4)))
    forward = len(function.times)
    assert forward and block.nfe == (forward, 0)
    out.sum().backward()
    assert block.nfe == (forward, len(function.times) - forward)
    assert (block.nfe.backward > 0) is adjoint


@pytest.mark.parametrize("adjoint", [False, True])
def test_functions_with_fused_blocks(adjoint):
    block = ODEBlock(fused_function(6), "rk4", adjoint=adjoint)
    x = channels_last((4, 6, 5, 4)).requires_grad_()
    block(x).square().sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("backend", ["stock", "reference"])
def test_every_backend_takes_the_same_steps(backend, adjoint):
    block, x = block_of("dopri5", adjoint), channels_last((2, 6, 5, 4)).requires_grad_()
    results = []
    for name in ("auto", backend):
        with fusedres.use_backend(name):
            out = block(x)
            results.append((out.detach(), torch.autograd.grad(out.sum(), x)[0], block.nfe))
    (out, grad, nfe), (expected_out, expected_grad, expected_nfe) = results
    assert nfe == expected_nfe
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(grad, expected_grad)


def test_gradients_reach_a_function_that_is_no_module():
    weight = torch.randn(3, 3, requires_grad=True)
    ODEBlock(lambda t, x: torch.tanh(x @ weight), **EASY)(torch.randn(5, 3)).sum().backward()
    assert weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_and_layouts_stay(dtype):
    block = block_of("rk4").to(dtype)
    for x in (channels_last((2, 6, 5, 4), dtype), channels_last((2, 6, 5, 4), dtype).contiguous()):
        out = block(x)
        assert out.dtype == dtype and out.stride() == x.stride()


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_empty_batches(method, adjoint):
    x = torch.zeros(0, 6, 4, 4, requires_grad=True)
    out = block_of(method, adjoint)(x)
    out.sum().backward()
    assert out.shape == x.grad.shape == (0, 6, 4, 4)


def test_keys_copies_and_files():
    block = block_of()
    assert set(block.state_dict()) == {f"odefunc.{key}" for key in block.odefunc.state_dict()}
    x = channels_last((2, 6, 5, 4))
    expected = block(x)
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    for other in (copy.deepcopy(block), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), expected)
    assert "method='dopri5'" in repr(block)


def test_fixed_steps_compile_to_one_graph():
    block, x = block_of("rk4", step_size=0.5), channels_last((2, 6, 5, 4)).requires_grad_()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), block(x))
    torch.testing.assert_close(*(torch.autograd.grad(b(x).sum(), x)[0] for b in (compiled, block)))


@pytest.mark.parametrize("method, adjoint", [("dopri5", False), ("dopri5", True), ("rk4", True)])
def test_what_cannot_be_traced_runs_as_it_is_in_a_compiled_model(method, adjoint):
    model = nn.Sequential(nn.Conv2d(6, 6, 1), block_of(method, adjoint), nn.Conv2d(6, 6, 1))
    compiled = torch.compile(model, backend="eager")
    for seed in range(3):
        x = channels_last((2, 6, 5, 4), seed=seed).requires_grad_()
        torch.testing.assert_close(compiled(x), model(x))
        torch.testing.assert_close(*(torch.autograd.grad(b(x).sum(), x)[0] for b in (compiled, model)))


def test_learns_a_rotation():
    """The field that turns points by an angle is found from where they end up."""
    torch.manual_seed(1)
    field = nn.Linear(2, 2, bias=False)
    block = ODEBlock(lambda t, x: field(x), t=(0.0, 0.7), **EASY)
    x = torch.randn(64, 2)
    target = odeint(oscillator, x, (0.0, 0.7), **EASY)[-1]
    optimizer = torch.optim.LBFGS(field.parameters(), max_iter=50)

    def loss():
        optimizer.zero_grad()
        value = (block(x) - target).square().mean()
        value.backward()
        return value

    optimizer.step(loss)
    torch.testing.assert_close(field.weight.detach(), torch.tensor([[0.0, 1.0], [-1.0, 0.0]]), atol=1e-2, rtol=0)


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match=r"odefunc must be a module or a function .*, got int"):
        ODEBlock(3)
    with pytest.raises(TypeError, match="odefunc must be a module where adjoint=True, got function"):
        ODEBlock(oscillator, adjoint=True)
    with pytest.raises(ValueError, match="method must be one of"):
        ODEBlock(oscillator, "rk45")
    with pytest.raises(TypeError, match="unknown option 'steps'"):
        ODEBlock(oscillator, steps=3)
    with pytest.raises(ValueError, match="adjoint_rtol must be positive, got -1"):
        ODEBlock(oscillator, adjoint_rtol=-1.0)
    with pytest.raises(ValueError, match="t must not require a gradient"):
        ODEBlock(oscillator, t=torch.tensor([0.0, 1.0], requires_grad=True))
    with pytest.raises(TypeError, match="ODEBlock: x must be a tensor, got list"):
        ODEBlock(oscillator)([1.0])
    with pytest.raises(ValueError, match=r"got \(2, 6, 3, 3\) for a state of shape \(2, 6, 5, 5\)"):
        ODEBlock(lambda t, x: x[..., 1:-1, 1:-1])(torch.zeros(2, 6, 5, 5))


@pytest.mark.parametrize("adjoint", [False, True])
def test_no_way_on_is_a_clear_error(adjoint):
    class Explodes(nn.Module):
        def forward(self, t, x):
            return x * x

    with pytest.raises(RuntimeError, match=r"dopri5: the step size .* at t = "):
        ODEBlock(Explodes(), t=(0.0, 2.0), adjoint=adjoint, **EASY)(torch.ones(2, 3))
