"""For hypothesis to draw: blocks of any shape, what happens to them between calls, and the judgement of all calls.

A :class:`Case` is a module, the dtype that it is in, and events in the order in which they happen: calls, and between
them changes of mode, parameters, buffers and settings. Everything that the calls of the fused module yield is held
against the same events in the life of its stock twin, by the budgets of :mod:`fusedres.testing`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from described import Depth, Described, Gate, norm
from hypothesis import assume, reject
from hypothesis import strategies as st
from torch import Tensor, nn

from fusedres.block import unsupported
from fusedres.ops.activations import IDENTITY, Activation
from fusedres.testing import DRAWS, INPUTS, Results, compare_results, run_and_collect

__all__ = ["Call", "Case", "Mode", "Written", "cases", "check", "decides_nothing", "described_blocks", "written_models"]

# ---------------------------------------------------------------------------------------------------------------------
# What happens to a module
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """The module is called, and in ``"grad"`` mode differentiated."""

    shape: tuple[int, int, int]
    layout: str
    mode: str
    input_gradients: bool
    autocast: torch.dtype | None


@dataclass(frozen=True)
class Mode:
    """The module is put into training or evaluation mode."""

    training: bool

    def __call__(self, module: nn.Module) -> None:
        module.train(self.training)


def frozen_norm(module: nn.Module, index: int) -> None:
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    if norms:
        norms[index % len(norms)].eval()


def _some(module: nn.Module, index: int, kind: str) -> tuple[nn.Module, str, Tensor]:
    """One of the module's parameters or buffers of floating point: its holder, its name there, itself."""
    found = [
        (holder, name, t)
        for holder in module.modules()
        for name, t in getattr(holder, kind).items()
        if t is not None and t.is_floating_point()
    ]
    return found[index % len(found)] if found else (nn.Module(), "", torch.zeros(1))


# Halving and doubling round nothing, so that the same edit leaves the same number in every dtype.
def parameter_written(module: nn.Module, index: int) -> None:
    with torch.no_grad():
        _some(module, index, "_parameters")[2].mul_(0.5)


def parameter_written_unseen(module: nn.Module, index: int) -> None:
    _some(module, index, "_parameters")[2].data.mul_(0.5)


def parameter_given_other_data(module: nn.Module, index: int) -> None:
    parameter = _some(module, index, "_parameters")[2]
    parameter.data = parameter.data * 0.5


def parameter_replaced(module: nn.Module, index: int) -> None:
    holder, name, t = _some(module, index, "_parameters")
    if name:
        setattr(holder, name, nn.Parameter(t.detach() * 0.5))


def parameter_frozen(module: nn.Module, index: int) -> None:
    parameter = _some(module, index, "_parameters")[2]
    if isinstance(parameter, nn.Parameter):
        parameter.requires_grad_(not parameter.requires_grad)


def buffer_written(module: nn.Module, index: int) -> None:
    _some(module, index, "_buffers")[2].mul_(2)


def buffer_replaced(module: nn.Module, index: int) -> None:
    holder, name, t = _some(module, index, "_buffers")
    if name:
        setattr(holder, name, t * 2)


def loaded(module: nn.Module, index: int) -> None:
    halved = {key: t * 0.5 if t.is_floating_point() else t for key, t in module.state_dict().items()}
    module.load_state_dict(halved, assign=bool(index % 2))


def relaid(module: nn.Module, index: int) -> None:
    module.to(memory_format=(torch.channels_last, torch.contiguous_format)[index % 2])


def norm_set(module: nn.Module, index: int) -> None:
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    if norms:
        chosen, (name, value) = norms[index % len(norms)], (("eps", 0.25), ("momentum", 0.5))[index % 2]
        setattr(chosen, name, value)


def hooked(module: nn.Module, index: int) -> None:
    for dropout in module.modules():  # one that is called draws another mask than a fused one
        if isinstance(dropout, nn.Dropout):
            dropout.p = 0.0
    leaves = [m for m in module.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d, nn.Linear))]
    leaves[index % len(leaves)].register_forward_hook(lambda *arguments: arguments[2] * 0.5)


def copied(module: nn.Module, index: int) -> None:
    """A copy made and called leaves the original as it is."""
    copy.deepcopy(module)


_EDITS = {
    edit.__name__: edit
    for edit in (
        *(frozen_norm, parameter_written, parameter_written_unseen, parameter_given_other_data, parameter_replaced),
        *(parameter_frozen, buffer_written, buffer_replaced, loaded, relaid, norm_set, hooked, copied),
    )
}


@dataclass(frozen=True)
class Edit:
    """A key of ``_EDITS``, and which of the module's parameters, buffers or layers it is about."""

    what: str
    index: int

    def __call__(self, module: nn.Module) -> None:
        _EDITS[self.what](module, self.index)


Event = Call | Mode | Edit


@dataclass(frozen=True)
class Case:
    """A module with ``channels`` input channels, whose ``fuse`` is what makes it fused, and what happens to it.

    Attributes:
        arguments: how many tensors it is called with.
    """

    module: nn.Module
    fuse: Callable[[nn.Module], Any]
    channels: int
    arguments: int
    dtype: torch.dtype
    events: tuple[Event, ...]


# ---------------------------------------------------------------------------------------------------------------------
# Judging a case
# ---------------------------------------------------------------------------------------------------------------------


_DRAWS = (*DRAWS, 255)
"""Of a tensor of one or two numbers the median of 31 errors is off by a fifth: among the tensors of thousands of cases
one is over twice stock's by chance. What is over after 255 is not."""


def check(case: Case) -> None:
    """Raises AssertionError where the fused module differs from its stock twin by more than the budgets.

    Where a stock call raises, the fused one has to raise an error of the same type, or may succeed where stock misses
    a value that was overwritten; the case ends there. Rejects cases that decide nothing.
    """
    try:
        _judge(case)
    except AssertionError:
        if decides_nothing(case):
            reject()
        raise


def _judge(case: Case) -> None:
    stock = copy.deepcopy(case.module).to(case.dtype)
    fused = copy.deepcopy(stock)
    case.fuse(fused)
    if case.dtype == torch.float64:
        torch.testing.assert_close(*_lives(case, fused, stock, 0), rtol=1e-9, atol=1e-9)
        return

    def draw(seed: int) -> tuple[Results, Results, Results]:
        found, expected = _lives(case, fused, stock, seed)
        exact = copy.deepcopy(stock).double()
        return found, expected, _life(exact, case, seed, expected)[0]

    compare_results(draw, _DRAWS).check()


def decides_nothing(case: Case) -> bool:
    """Whether rounding alone, or stock PyTorch alone, decides what the case yields.

    A norm multiplies the rounding of a channel that is constant by ``1 / sqrt(eps)``, and makes of two values 1 and -1,
    whatever they were, so that no gradient passes but what its terms lack of cancelling. A gate that squeezes what a
    norm has centred, a single sample say, takes the ReLU of rounding. And PyTorch's weight gradient of a convolution
    whose step is longer than its image reads memory that nothing has been written to.
    """
    found = []

    def look_at_gate(gate: Gate, inputs: tuple[Tensor, ...]) -> None:
        squeezed, terms = inputs[0].detach().mean((2, 3)), inputs[0].detach().abs().mean((2, 3))
        weight, bias = gate.fc1.weight.flatten(1), gate.fc1.bias
        hidden, size = nn.functional.linear(squeezed, weight, bias), nn.functional.linear(terms, weight.abs())
        found.append(bool((hidden.abs() < 1e-9 * size).any()))

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        (x,) = inputs
        if isinstance(module, nn.BatchNorm2d):
            var, mean = torch.var_mean(x.detach(), (0, 2, 3), correction=0)
            pair = x.numel() == 2 * x.shape[1] and (module.training or module.running_mean is None)
            found.append(pair or bool((var <= 1e-6 * mean.square() + 1e-12).any()))
        elif torch.is_grad_enabled() and module.weight.requires_grad:
            found.append(any(size < stride for size, stride in zip(x.shape[2:], module.stride)))

    exact = copy.deepcopy(case.module).to(case.dtype).double()
    for module in exact.modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
            module.register_forward_pre_hook(look)
        elif isinstance(module, Gate):
            module.register_forward_pre_hook(look_at_gate)
    _life(exact, replace(case, dtype=torch.float64), 0)
    return any(found)


def _lives(case: Case, fused: nn.Module, stock: nn.Module, seed: int) -> tuple[Results, Results]:
    """What copies of the fused module and of its stock twin yield."""
    found, error = _life(copy.deepcopy(fused), case, seed)
    expected, expected_error = _life(copy.deepcopy(stock), case, seed)
    # A fused block does not need every value that stock saved and then found overwritten by a later block.
    spared = error is None and "modified by an inplace operation" in str(expected_error)
    assert spared or type(error) is type(expected_error), f"{error!r} against stock's {expected_error!r}"
    return {name: found[name] for name in (expected if spared else found)}, expected


def _life(module: nn.Module, case: Case, seed: int, like: Results | None = None) -> tuple[Results, Exception | None]:
    """What all calls yield, and the error that ended the life of the module early.

    Args:
        like: in the exact life, what the stock one has yielded.
    """
    seen: Results = {}
    for index, event in enumerate(case.events):
        if not isinstance(event, Call):
            event(module)
            continue
        if like is not None and f"{index}: output" not in like:
            break
        try:
            results = _called(module, case, event, seed + index, None if like is None else like[f"{index}: output"])
        except Exception as error:
            return seen, error
        seen |= {f"{index}: {name}": t for name, t in results.items()}
    return seen, None


def _called(module: nn.Module, case: Case, call: Call, seed: int, like: Tensor | None) -> Results:
    batch, height, width = call.shape
    shape, backward = (batch, case.channels, height, width), call.mode == "grad"
    inputs = [INPUTS[call.layout](shape, case.dtype, 100 * seed + i) for i in range(case.arguments)]
    inputs = [x if like is None else x.double() for x in inputs]
    for x in inputs:
        x.requires_grad_(call.input_gradients and backward)

    def cotangent(out: Tensor) -> Tensor:
        values = torch.randn(out.shape, generator=torch.Generator().manual_seed(100 * seed + 50))
        return torch.empty_like(out).copy_(values.to((out if like is None else like).dtype))

    autocast = torch.autocast("cpu", call.autocast) if call.autocast and like is None else nullcontext()
    with torch.inference_mode(call.mode == "inference"), autocast:
        return run_and_collect(module, inputs, cotangent, backward)


# ---------------------------------------------------------------------------------------------------------------------
# Drawing steps
# ---------------------------------------------------------------------------------------------------------------------

_WIDTHS = (1, 2, 3, 4, 6, 8, 16, 17, 24, 32)
_ACTIVATIONS = ("relu", "relu", "relu6", Activation("leaky_relu", 0.1), "silu", "hardswish", "gelu")


@dataclass
class _Chain:
    """Steps drawn so far, the channels behind them and the product of their strides."""

    steps: list[Any]
    channels: int
    strides: tuple[int, int] = (1, 1)


def _draw_conv(draw: st.DrawFn, chain: _Chain, width: int, size: int | None = None) -> None:
    """Appends a convolution that makes ``ceil(size / stride)`` of a size, as any other of the same stride does."""
    kernel = tuple(size or draw(st.sampled_from((1, 3, 3, 5))) for _ in range(2))
    if draw(st.booleans()):
        kernel = (kernel[0], kernel[0])
    stride = draw(st.sampled_from(((1, 1), (1, 1), (1, 1), (2, 2), (1, 2), (3, 3))))
    dilation = draw(st.sampled_from(((1, 1), (1, 1), (2, 2), (1, 2))))
    common = [g for g in (1, 2, 3, 4, 8, chain.channels) if chain.channels % g == 0 and width % g == 0]
    padding: Any = tuple(d * (k // 2) for d, k in zip(dilation, kernel))
    if stride == (1, 1) and draw(st.booleans()):
        padding = "same"
    options = {"dilation": dilation, "groups": draw(st.sampled_from(common)), "bias": draw(st.booleans())}
    chain.steps.append(nn.Conv2d(chain.channels, width, kernel, stride, padding, **options))
    chain.channels, chain.strides = width, tuple(a * b for a, b in zip(chain.strides, stride))


def _draw_norm(draw: st.DrawFn, chain: _Chain) -> None:
    options = {
        "affine": draw(st.booleans() | st.just(True)),
        "track_running_stats": draw(st.booleans() | st.just(True)),
        "momentum": draw(st.sampled_from((0.1, 0.1, None, 0.0, 1.0))),
        "eps": draw(st.sampled_from((1e-5, 1e-3))),
    }
    chain.steps.append(norm(chain.channels, **options))


def _draw_value(draw: st.DrawFn, chain: _Chain, *, ends: bool, chance: bool) -> None:
    """Appends what is pending between two convolutions: a norm, gains, an activation, a dropout; each, or not."""
    if draw(st.integers(0, 4)):
        _draw_norm(draw, chain)
    extra = draw(st.sampled_from(("", "", "", "", "gate", "depth", "gate behind")))
    linear, hidden = draw(st.booleans()), draw(st.sampled_from((1, 2, 5)))
    if extra == "gate":
        chain.steps.append(Gate(chain.channels, hidden, linear, draw(st.booleans())))
    if extra == "depth" and chance:
        chain.steps.append(Depth(draw(st.sampled_from((0.0, 0.4)))))
    if ends:
        return
    if draw(st.integers(0, 4)):
        chain.steps.append(draw(st.sampled_from(_ACTIVATIONS)))
    if extra == "gate behind":
        chain.steps.append(Gate(chain.channels, hidden, linear))
    elif draw(st.integers(0, 5)) == 0:
        chain.steps.append(nn.Dropout(draw(st.sampled_from((0.0, 0.3))) if chance else 0.0))


def _draw_branch(draw: st.DrawFn, channels: int, joins: bool, chance: bool) -> tuple[_Chain, bool]:
    """The branch, and whether it begins with something else than a convolution."""
    chain, depth = _Chain([], channels), draw(st.integers(1, 3))
    if draw(st.integers(0, 2)) == 0:
        _draw_value(draw, chain, ends=False, chance=chance)
    preactivated = bool(chain.steps)
    for index in range(depth):
        _draw_conv(draw, chain, draw(st.sampled_from(_WIDTHS)))
        if index < depth - 1:
            _draw_value(draw, chain, ends=False, chance=chance)
    if draw(st.integers(0, 3)):
        _draw_value(draw, chain, ends=joins, chance=chance)
    if not joins and draw(st.integers(0, 2)) == 0:
        kernel = draw(st.sampled_from((1, 2, 3, (3, 2), 5)))
        padding = draw(st.integers(0, (min(kernel) if isinstance(kernel, tuple) else kernel) // 2))
        chain.steps.append(nn.MaxPool2d(kernel, draw(st.integers(1, 3)), padding, ceil_mode=draw(st.booleans())))
    return chain, preactivated


def _draw_shortcut(draw: st.DrawFn, branch: _Chain, channels: int) -> list[Any]:
    if branch.strides == (1, 1) and branch.channels == channels and draw(st.booleans()):
        return []
    chain = _Chain([], channels)
    if draw(st.integers(0, 3)) == 0:
        _draw_norm(draw, chain)
        chain.steps.append(draw(st.sampled_from(_ACTIVATIONS)))
    bias = draw(st.booleans())
    chain.steps.append(nn.Conv2d(channels, branch.channels, 1, branch.strides, bias=bias))
    chain.channels = branch.channels
    if draw(st.booleans()):
        _draw_norm(draw, chain)
    return chain.steps


# ---------------------------------------------------------------------------------------------------------------------
# Drawing modules
# ---------------------------------------------------------------------------------------------------------------------


@st.composite
def described_blocks(draw: st.DrawFn) -> tuple[Described, int, int]:
    """A block, its input channels and the number of its arguments."""
    torch.manual_seed(0)
    channels, joins = draw(st.sampled_from(_WIDTHS)), draw(st.integers(0, 3)) > 0
    branch, preactivated = _draw_branch(draw, channels, joins, chance=True)
    shortcut = _draw_shortcut(draw, branch, channels) if joins else None
    residual = "input"
    if joins:
        residual = draw(st.sampled_from(("input", "argument", "pending") if preactivated else ("input", "argument")))
    if residual == "argument" and not shortcut:
        residual = "input" if branch.strides != (1, 1) or branch.channels != channels else residual
    act = draw(st.sampled_from(("identity", *_ACTIVATIONS))) if joins else "identity"
    options = {
        "memory": draw(st.sampled_from(("auto", "low"))),
        "backend": draw(st.sampled_from(("auto", "reference"))),
    }
    in_place = joins and draw(st.booleans())
    block = Described(branch.steps, shortcut, act, residual=residual, in_place=in_place, **options)
    assume(unsupported(block.block) is None)
    return block, channels, 1 + (residual == "argument")


class Written(nn.Module):
    """A block as a user would write it, for the patcher to find."""

    def __init__(self, branch: list[nn.Module], shortcut: list[nn.Module] | None, act: nn.Module, in_place: bool):
        super().__init__()
        self.branch = nn.Sequential(*branch)
        self.shortcut = None if shortcut is None else nn.Sequential(*shortcut)
        self.act, self.in_place = act, in_place

    def forward(self, x: Tensor) -> Tensor:
        out = self.branch(x)
        if self.shortcut is None:
            return out
        if self.in_place:
            out += self.shortcut(x)
        else:
            out = out + self.shortcut(x)
        return self.act(out)


def _as_module(draw: st.DrawFn, step: Any) -> nn.Module:
    """A step as a module, an activation in place or not."""
    if isinstance(step, nn.Module):
        return step
    act = Activation(step) if isinstance(step, str) else step
    in_place = draw(st.booleans())
    kinds = {"relu": nn.ReLU, "relu6": nn.ReLU6, "silu": nn.SiLU, "hardswish": nn.Hardswish}
    if act.name == "leaky_relu":
        return nn.LeakyReLU(act.param, in_place)
    if act == IDENTITY:
        return nn.Identity()
    return nn.GELU() if act.name == "gelu" else kinds[act.name](inplace=in_place)


@st.composite
def written_models(draw: st.DrawFn) -> tuple[nn.Module, int, int]:
    """One block, or two in a row, their input channels, and 1, the number of arguments."""
    torch.manual_seed(0)
    first = channels = draw(st.sampled_from(_WIDTHS))
    blocks: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 2))):
        joins = draw(st.integers(0, 3)) > 0
        branch, _ = _draw_branch(draw, channels, joins, chance=False)
        shortcut = _draw_shortcut(draw, branch, channels) if joins else None
        steps = [_as_module(draw, step) for step in branch.steps]
        side = None if shortcut is None else [_as_module(draw, step) for step in shortcut]
        act = _as_module(draw, draw(st.sampled_from(("identity", *_ACTIVATIONS))))
        blocks.append(Written(steps, side, act, draw(st.booleans())))
        channels = branch.channels
    return nn.Sequential(*blocks), first, 1


# ---------------------------------------------------------------------------------------------------------------------
# Drawing cases
# ---------------------------------------------------------------------------------------------------------------------

_DTYPES = (torch.float32, torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _calls(dtype: torch.dtype) -> st.SearchStrategy[Call]:
    # Of two half precisions, stock PyTorch's batch norm takes none beside the other.
    lower = (None, dtype) if dtype.itemsize == 2 else (None, None, None, torch.bfloat16, torch.float16)
    return st.builds(
        Call,
        st.tuples(st.sampled_from((2, 2, 3, 1, 0)), st.integers(1, 7), st.integers(1, 7)),
        st.sampled_from(tuple(INPUTS)),
        st.sampled_from(("grad", "grad", "no_grad", "inference")),
        st.booleans() | st.just(True),
        st.sampled_from(lower),
    )


@st.composite
def cases(
    draw: st.DrawFn, modules: st.SearchStrategy[tuple[nn.Module, int, int]], fuse: Callable[[nn.Module], Any]
) -> Case:
    """A case with a module of ``modules``."""
    module, channels, arguments = draw(modules)
    edits = st.builds(Edit, st.sampled_from(tuple(_EDITS)), st.integers(0, 30))
    events, dtype = [Mode(draw(st.booleans()))], draw(st.sampled_from(_DTYPES))
    for _ in range(draw(st.integers(1, 3))):
        events += draw(st.lists(edits | st.builds(Mode, st.booleans()), max_size=3))
        events.append(draw(_calls(dtype)))
    return Case(module, fuse, channels, arguments, dtype, tuple(events))
