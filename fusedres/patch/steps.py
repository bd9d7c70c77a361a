"""Reading one graph node as one step of a block: a convolution, a norm, an activation, nothing at all, or a stop.

Two tables say which modules and which functions are which activation; a new activation is a new row.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..binding import is_norm_act
from ..block import Act, Conv, Dropout, DropPath, Mask, Norm, Pool, SqueezeExcite, Step
from ..mask import mask_of
from ..ops.activations import IDENTITY, Activation
from ..ops.join_pool import POOL_SETTINGS, PoolWindow, pool_window
from .modules import (
    bare_conv_problem,
    conv_problem,
    drop_path_problem,
    hook_problem,
    is_builtin,
    is_drop_path,
    is_norm,
    is_unknown_norm,
    linear_problem,
    norm_problem,
)
from .trace import IN_PLACE_OPERATORS, is_users_function

__all__ = [
    "PASS",
    "Addition",
    "Pass",
    "Reading",
    "Stop",
    "addition",
    "calls_as_module_says",
    "changes_in_place",
    "conv_path",
    "is_sum",
    "makes_its_result",
    "paths",
    "read",
    "step_problem",
    "tensor_input",
]


@dataclass(frozen=True)
class Stop:
    """A node that no step stands for, with the ``reason`` where it is a layer that might have been one."""

    reason: str = ""


class Pass:
    """A node that hands its input on: an identity, a clone, a dropout of nothing."""


PASS = Pass()
Reading = Step | Pass | Stop


def paths(step: Step) -> tuple[str, ...]:
    """The modules whose parameters and settings a step reads."""
    if isinstance(step, Act) or (isinstance(step, (Dropout, Mask)) and step.p is not None):
        return ()
    if isinstance(step, Pool) and step.window is not None:
        return ()
    return (step.fc1, step.fc2) if isinstance(step, SqueezeExcite) else (step.path,)


def step_problem(step: Step, module: nn.Module, shared: dict[int, str]) -> str | None:
    """Why ``module``, whose parameters and settings ``step`` reads, is no longer such a step; ``None`` where it is."""
    if isinstance(step, Conv):
        return (bare_conv_problem if step.bare else conv_problem)(module, shared)
    if isinstance(step, Norm):
        return norm_problem(module, shared)
    if isinstance(step, SqueezeExcite):
        return (conv_problem if isinstance(module, nn.Conv2d) else linear_problem)(module, shared)
    return drop_path_problem(module) if isinstance(step, DropPath) else hook_problem(module)


# ---------------------------------------------------------------------------------------------------------------------
# Activations
# ---------------------------------------------------------------------------------------------------------------------


def _gelu(approximate: str) -> Activation | None:
    return Activation("gelu") if approximate == "none" else None


_MODULE_ACTIVATIONS: dict[type, Callable[[Any], Activation | None]] = {
    nn.ReLU: lambda _: Activation("relu"),
    nn.ReLU6: lambda _: Activation("relu6"),
    nn.Hardtanh: lambda m: _hardtanh(m.min_val, m.max_val),
    nn.LeakyReLU: lambda m: Activation("leaky_relu", float(m.negative_slope)),
    nn.SiLU: lambda _: Activation("silu"),
    nn.Hardswish: lambda _: Activation("hardswish"),
    nn.GELU: lambda m: _gelu(m.approximate),
}


def _hardtanh(min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Activation | None:
    """ReLU6, which is nothing else; ``clamp(min=0)`` is no ReLU, whose gradient at zero is another."""
    return Activation("relu6") if (min_val, max_val) == (0, 6) else None


# Each function takes the arguments that follow the tensor, as the stock function names them.
def _relu(inplace: bool = False) -> Activation:
    return Activation("relu")


def _relu6(inplace: bool = False) -> Activation:
    return Activation("relu6")


def _leaky_relu(negative_slope: float = 0.01, inplace: bool = False) -> Activation:
    return Activation("leaky_relu", float(negative_slope))


def _silu(inplace: bool = False) -> Activation:
    return Activation("silu")


def _hardswish(inplace: bool = False) -> Activation:
    return Activation("hardswish")


def _gelu_function(*, approximate: str = "none") -> Activation | None:
    return _gelu(approximate)


_FUNCTION_ACTIVATIONS: dict[Any, Callable[..., Activation | None]] = {
    F.relu: _relu,
    F.relu_: _relu,
    torch.relu: _relu,
    torch.relu_: _relu,
    F.relu6: _relu6,
    F.hardtanh: _hardtanh,
    F.hardtanh_: _hardtanh,
    F.leaky_relu: _leaky_relu,
    F.leaky_relu_: _leaky_relu,
    F.silu: _silu,
    F.hardswish: _hardswish,
    F.gelu: _gelu_function,
    "relu": _relu,
    "relu_": _relu,
}


# ---------------------------------------------------------------------------------------------------------------------
# Nodes
# ---------------------------------------------------------------------------------------------------------------------


def tensor_input(node: fx.Node) -> fx.Node | None:
    """The tensor that a one-input node reads."""
    value = node.args[0] if node.args else node.kwargs.get("input")
    return value if isinstance(value, fx.Node) else None


def read(node: fx.Node, module: nn.Module | None, excluded: Callable[[nn.Module], str | None]) -> Reading:
    """What ``node`` is to a block.

    Args:
        module: the module that a ``call_module`` node calls.
        excluded: says why a convolution or norm may not be touched, or ``None``.
    """
    if node.op == "call_module":
        # Every module that can be a step takes the tensor alone; extra arguments make it another thing.
        if tensor_input(node) is None or len(node.args) + len(node.kwargs) != 1:
            return Stop(f"{node.target} is called with other arguments than one tensor")
        return _read_module(node.target, module, excluded)
    if node.op in ("call_function", "call_method"):
        return Stop(_function_problem(node)) if tensor_input(node) is None else _read_function(node)
    return Stop()


def _read_module(path: str, module: nn.Module, excluded: Callable[[nn.Module], str | None]) -> Reading:
    if isinstance(module, nn.Conv2d):
        problem = excluded(module)
        return Stop(f"{path} {problem}") if problem else Conv(path)
    if is_norm(module):
        problem = excluded(module)
        return Stop(f"{path} {problem}") if problem else _read_norm(path, module, excluded)
    if hooked := excluded(module):
        return Stop(f"{path} {hooked}")
    if _does_nothing(module):
        return PASS
    if is_drop_path(module):
        problem = drop_path_problem(module)
        return Stop(f"{path} {problem}") if problem else DropPath(path)
    if type(module).forward in (nn.Dropout.forward, nn.Dropout2d.forward):
        drops = Dropout(path) if type(module).forward is nn.Dropout.forward else Mask(path, channels=True)
        return PASS if module.p == 0 else drops
    if type(module).forward is nn.MaxPool2d.forward:
        window = _window(*(getattr(module, name) for name in POOL_SETTINGS))
        return Pool(path) if window else Stop(f"{path} is a MaxPool2d({module.extra_repr()}), which no block has")
    if not is_builtin(module) and (mask := mask_of(module)) is not None:
        return Mask(path, mask.channels)
    activation = _module_activation(module)
    if activation is None and type(module) in _MODULE_ACTIVATIONS:
        return Stop(f"{path} is a {type(module).__name__}({module.extra_repr()}), which no block has")
    return Act(activation) if activation else Stop(f"{path} is a {type(module).__name__}, which no block has")


def _read_norm(path: str, norm: nn.Module, excluded: Callable[[nn.Module], str | None]) -> Reading:
    if not is_norm_act(type(norm)):
        return Norm(path)
    for name, inner in (("drop", norm.drop), ("act", norm.act)):
        if hooked := excluded(inner):
            return Stop(f"{path}.{name} {hooked}")
    if not _does_nothing(norm.drop):
        return Stop(f"{path} has a {type(norm.drop).__name__} inside")
    activation = IDENTITY if _does_nothing(norm.act) else _activation_inside(norm.act)
    return Norm(path, activation) if activation else Stop(f"{path} has a {type(norm.act).__name__}, which no block has")


def _module_activation(module: nn.Module) -> Activation | None:
    known = _MODULE_ACTIVATIONS.get(type(module))
    return known and known(module)


def _activation_inside(module: nn.Module) -> Activation | None:
    """The activation inside a norm, which is not part of any graph and may be written out."""
    from .products import written_activation  # which reads nodes, as this file does

    return _module_activation(module) if is_builtin(module) else written_activation(module)


def _does_nothing(module: nn.Module) -> bool:
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        return all(map(_does_nothing, module))
    return type(module) is nn.Identity


def _read_function(node: fx.Node) -> Reading:
    if node.target in ("clone", torch.clone):
        return PASS
    if node.target in (F.dropout, F.dropout2d):
        return _read_dropout(node)
    if node.target in (F.max_pool2d, torch.max_pool2d):
        arguments = {k: v for k, v in node.kwargs.items() if k != "input"}
        window = _window(*node.args[1:], **arguments)
        return Pool(window=window) if window else Stop("max_pool2d with these arguments is no step of a block")
    known = _FUNCTION_ACTIVATIONS.get(node.target)
    if known is None:
        return Stop(_function_problem(node))
    arguments = {k: v for k, v in node.kwargs.items() if k != "input"}
    try:
        activation = known(*node.args[1:], **arguments)
    except TypeError:
        activation = None
    if activation is None:
        return Stop(f"{_function_name(node)} with these arguments is no step of a block")
    return Act(activation)


def _window(*arguments: Any, **more: Any) -> PoolWindow | None:
    """The window of a max pooling with these arguments, if a block can have it."""
    try:
        return pool_window(*(tuple(a) if isinstance(a, list) else a for a in arguments), **more)
    except (TypeError, ValueError):
        return None


def _function_problem(node: fx.Node) -> str:
    """Why a function is no step; nothing of the sum of two tensors, which is for the patterns to tell."""
    name = _function_name(node)
    if addition(node) is not None:
        return ""
    if node.target in _ADDITIONS:
        if node.kwargs.get("alpha", 1) != 1:
            return f"{name} has alpha={node.kwargs['alpha']}, which no block has"
        if len(node.all_input_nodes) == 1:
            return f"{name} adds no second tensor (sum() begins with the number 0)"
        return f"{name} is of what may be no tensor"
    return f"{name} is no step of a block"


def _function_name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.name)


def conv_path(node: fx.Node) -> str | None:
    """The path of the module whose own weight a call of ``F.conv2d`` convolves with."""
    arguments = _conv_arguments(node)
    weight = arguments.get("weight")
    if not isinstance(weight, fx.Node) or weight.op != "get_attr" or not weight.target.endswith(".weight"):
        return None
    return weight.target.removesuffix(".weight")


def _conv_arguments(node: fx.Node) -> dict[str, Any]:
    if node.op != "call_function" or node.target is not F.conv2d:
        return {}
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    return {
        "bias": None,
        "stride": 1,
        "padding": 0,
        "dilation": 1,
        "groups": 1,
        **dict(zip(names, node.args)),
        **node.kwargs,
    }


def calls_as_module_says(node: fx.Node, module: nn.Conv2d) -> bool:
    """Whether a call of ``F.conv2d`` convolves with the bias, stride, padding, dilation and groups of ``module``."""
    arguments = _conv_arguments(node)
    bias = arguments["bias"]
    own = isinstance(bias, fx.Node) and bias.op == "get_attr" and bias.target == f"{conv_path(node)}.bias"
    return (own if module.bias is not None else bias is None) and all(
        _pair(arguments[name]) == _pair(getattr(module, name)) for name in ("stride", "padding", "dilation", "groups")
    )


def _pair(value: Any) -> Any:
    return (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, list) else value


def _read_dropout(node: fx.Node) -> Reading:
    """``F.dropout(x, p, self.training)``, or of channels, whose keyword arguments tracing has filled in."""
    p, training = node.kwargs.get("p"), node.kwargs.get("training")
    if p == 0 or training is False:
        return PASS
    if isinstance(training, fx.Node) and training.op == "get_attr" and isinstance(p, (int, float)):
        path, p = training.target.rpartition(".")[0], float(p)
        return Dropout(path, p) if node.target is F.dropout else Mask(path, True, p)
    return Stop(f"{node.name} is a dropout that is not switched by its module's mode")


@dataclass(frozen=True)
class Addition:
    """A residual join as written: ``left + right``, where ``in_place`` writes into ``left``."""

    left: fx.Node
    right: fx.Node
    in_place: bool


_ADDITIONS = {operator.add: False, operator.iadd: True, torch.add: False, "add": False, "add_": True}
_SCALAR_METHODS = ("size", "dim", "numel", "item")


def addition(node: fx.Node) -> Addition | None:
    """``node`` as the sum of two tensors, or ``None``."""
    if node.op not in ("call_function", "call_method") or node.target not in _ADDITIONS:
        return None
    operands = [*node.args, *(node.kwargs[k] for k in ("input", "other") if k in node.kwargs)]
    if node.kwargs.keys() - {"input", "other", "alpha"} or node.kwargs.get("alpha", 1) != 1 or len(operands) != 2:
        return None
    if operands[0] is operands[1] or not all(isinstance(o, fx.Node) and _is_tensor(o) for o in operands):
        return None
    return Addition(*operands, in_place=_ADDITIONS[node.target])


def _is_tensor(node: fx.Node) -> bool:
    """False for what is plainly a number or a shape."""
    if node.op == "call_method":
        return node.target not in _SCALAR_METHODS
    return not (node.op == "call_function" and node.target in (getattr, operator.getitem, len))


def is_sum(node: fx.Node) -> bool:
    """Whether ``node`` adds two tensors in any way, also one that no block does."""
    return node.op in ("call_function", "call_method") and node.target in _ADDITIONS and len(node.all_input_nodes) > 1


_MAKERS = {
    *(
        F.conv2d,
        operator.mul,
        torch.mul,
        torch.cat,
        torch.mean,
        torch.sigmoid,
        F.sigmoid,
        F.hardsigmoid,
        F.adaptive_avg_pool2d,
    ),
    *("mul", "mean", "sigmoid"),
}


def makes_its_result(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether ``node``, which writes to nothing, surely makes a tensor of its own; a view and the unknown do not."""
    if node.op == "call_module":
        # Dropout and stochastic depth hand their input on in evaluation.
        made = isinstance(module, (nn.Conv2d, nn.Linear, nn.AdaptiveAvgPool2d, nn.Sigmoid, nn.Hardsigmoid))
        return made or is_norm(module)
    return node.target in _MAKERS or addition(node) is not None


def changes_in_place(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether ``node`` writes into the tensor that it reads first; a function of the user's may write into any."""
    if node.op == "call_module":
        return bool(getattr(module, "inplace", False)) or is_unknown_norm(module)
    if node.op == "call_method":
        return node.target.endswith("_") and not node.target.endswith("__")
    if node.op == "call_function":
        # A positional True is counted too, for F.relu(x, True): to see a write too many costs a fusion, no more.
        if is_users_function(node.target):
            return True
        flagged = node.kwargs.get("inplace") or "out" in node.kwargs or any(a is True for a in node.args)
        return node.target in IN_PLACE_OPERATORS or getattr(node.target, "__name__", "").endswith("_") or bool(flagged)
    return False
