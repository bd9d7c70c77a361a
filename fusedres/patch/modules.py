"""What may be assumed about a module: whether PyTorch wrote it, and whether it is exactly what its class says."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedTensorMixin
from torch.nn.utils.parametrize import is_parametrized

from ..binding import is_norm_act
from ..frozen import frozen_norm, has_frozen_name

__all__ = [
    "bare_conv_problem",
    "class_name",
    "class_problem",
    "conv_problem",
    "drop_path_problem",
    "has_own_conv_forward",
    "hook_problem",
    "is_builtin",
    "is_drop_path",
    "is_norm",
    "is_unknown_norm",
    "layer_kind",
    "linear_problem",
    "norm_problem",
    "opaque_problem",
    "overrides_call",
    "shared_parameters",
]

_OWN_MODULES = ("torch.nn.modules.", "torch.ao.")
_CONTAINERS = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)
_METHODS = ("forward", "_conv_forward")


def _methods(cls: type) -> tuple:
    return cls.forward, getattr(cls, "_conv_forward", None)


# As they were when this was imported: someone may replace them for all layers.
_ORIGINAL = {cls: _methods(cls) for cls in vars(nn).values() if isinstance(cls, type) and issubclass(cls, nn.Module)}
_HOOKS = {
    "_forward_hooks": "a forward hook",
    "_forward_pre_hooks": "a forward pre-hook",
    "_backward_hooks": "a backward hook",
    "_backward_pre_hooks": "a backward pre-hook",
}


def is_builtin(module: nn.Module) -> bool:
    """Whether the module is one of PyTorch's own layers or derives from one, so that it is a step, not a structure."""
    return _is_builtin_class(type(module))


@cache
def _is_builtin_class(cls: type) -> bool:
    return any(c.__module__.startswith(_OWN_MODULES) and c not in _CONTAINERS for c in cls.__mro__)


def hook_problem(module: nn.Module) -> str | None:
    """Which hook or replaced method stands between calling the module and its class's ``forward``."""
    for attribute, name in _HOOKS.items():
        if getattr(module, attribute, None):
            return f"has {name}"
    for name in _METHODS:
        if name in module.__dict__:
            return f"has a {name} that was replaced on the instance"
    if overrides_call(type(module)):
        return f"is a {type(module).__name__}, which overrides __call__"
    for cls in type(module).__mro__:
        if cls in _ORIGINAL and _ORIGINAL[cls] != _methods(cls):
            return f"is a {type(module).__name__}, and {cls.__name__}'s forward was replaced on the class"
    return opaque_problem(module)


def overrides_call(cls: type[nn.Module]) -> bool:
    """Whether calling a module of this class does more than its hooks and its forward."""
    return cls.__call__ is not nn.Module.__call__


def opaque_problem(module: nn.Module) -> str | None:
    """Why nothing at or below the module may be touched."""
    if isinstance(module, torch.jit.ScriptModule):
        return "is a TorchScript module"
    # By name: importing torch._dynamo to ask would take seconds.
    if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
        return "is compiled by torch.compile; patch the model before it is compiled"
    return None


_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm, nn.RMSNorm)


def layer_kind(module: nn.Module) -> str | None:
    """What a report counts the module as: a convolution (``nn.Conv2d``), another convolution, a norm, or nothing."""
    if isinstance(module, _ConvNd):
        return "convolution" if isinstance(module, nn.Conv2d) else "other convolution"
    return "norm" if isinstance(module, _NORMS) or _is_named_norm(module) else None


def _is_named_norm(module: nn.Module) -> bool:
    """Whether a class that is none of PyTorch's is a norm by its name, as every library's frozen batch norm is."""
    if not _named_norm(type(module)) or not (module._parameters or module._buffers):
        return False
    return not any(m is not module and layer_kind(m) for m in module.modules())


@cache
def _named_norm(cls: type) -> bool:
    return re.search("Norm(?!al)", cls.__name__) is not None and not cls.__module__.startswith("torch.")


def class_problem(path: str, module: nn.Module) -> str | None:
    """What in the class of the convolution or norm at ``path`` keeps it from being a step, whatever is around it."""
    if isinstance(module, nn.Conv2d):
        problem = _subclass_problem(module) if _has_own_class(module) else None
    elif has_frozen_name(module):
        problem = _frozen_problem(module)
    elif is_norm(module):
        problem = None if _is_batch_norm(type(module)) else _subclass_problem(module)
    else:
        problem = f"is a {class_name(module)}, which no block has"
    return problem and f"{path.rpartition('.')[2] or 'it'} {problem}"


def class_name(module: nn.Module) -> str:
    """The name of the module's class, with its place where PyTorch has another of that name."""
    cls = type(module)
    return cls.__name__ if getattr(nn, cls.__name__, cls) is cls else f"{cls.__module__}.{cls.__qualname__}"


def _has_own_class(conv: nn.Conv2d) -> bool:
    cls = type(conv)
    return cls.forward is not nn.Conv2d.forward or cls._conv_forward is not nn.Conv2d._conv_forward


def _is_batch_norm(cls: type) -> bool:
    kinds = (nn.BatchNorm2d, nn.SyncBatchNorm)
    return issubclass(cls, kinds) and (is_norm_act(cls) or cls.forward in [kind.forward for kind in kinds])


def conv_problem(module: nn.Conv2d, shared: dict[int, str]) -> str | None:
    """Why a convolution cannot be part of a fused site; ``None`` where it can."""
    if _has_own_class(module):
        return _subclass_problem(module)
    if module.padding_mode != "zeros":
        return f"has padding_mode={module.padding_mode!r}"
    return _layer_problem(module, shared)


def has_own_conv_forward(module: nn.Module) -> bool:
    """Whether the module is a convolution of the user's, whose forward may do more than convolve."""
    forward = type(module).forward
    own = isinstance(module, nn.Conv2d) and forward is not nn.Conv2d.forward
    return own and not forward.__module__.startswith("torch.")


def bare_conv_problem(module: nn.Conv2d, shared: dict[int, str]) -> str | None:
    """As :func:`conv_problem`, for the convolution in a forward of the user's, which has been read."""
    return _layer_problem(module, shared)


def norm_problem(module: nn.Module, shared: dict[int, str]) -> str | None:
    """Why a normalisation layer cannot be part of a fused site; ``None`` where it can."""
    if has_frozen_name(module):
        return _frozen_problem(module)
    cls = type(module)
    if not _is_batch_norm(cls):
        return _subclass_problem(module)
    if is_norm_act(cls) and not module._modules.keys() >= {"act", "drop"}:
        return f"is a {cls.__name__} without an activation"
    return _layer_problem(module, shared)


def is_norm(module: nn.Module) -> bool:
    """Whether the module is a normalisation layer, which is a step or nothing, and never inlined."""
    return isinstance(module, _NORMS) or has_frozen_name(module)


def is_unknown_norm(module: nn.Module) -> bool:
    """Whether the module has the name and the buffers of a frozen norm, and a forward that does something else."""
    return has_frozen_name(module) and frozen_norm(type(module)) is None


def _frozen_problem(module: nn.Module) -> str | None:
    """As :func:`norm_problem`, for a norm that has the name and the buffers of a frozen one."""
    name = type(module).__name__
    frozen = frozen_norm(type(module))
    if frozen is None:
        return f"is a {name}, whose forward is not that of a batch norm with constant statistics"
    # Instances of the class were run without settings of their own.
    read = type(module).forward.__code__.co_names
    if own := [k for k in module.__dict__ if k in read and k not in ("eps", "num_features", "training")]:
        return f"is a {name}, whose forward reads a setting of its own ({own[0]!r})"
    if frozen.eps is None and type(module.__dict__.get("eps")) is not float:
        return f"is a {name} without a number for eps"
    shapes = {(type(t), None if t is None else t.shape) for t in module._buffers.values()}
    if shapes != {(torch.Tensor, module.weight.shape)} or module.weight.dim() != 1:
        return f"is a {name} with buffers that are not a number for each channel"
    return hook_problem(module)


def linear_problem(module: nn.Linear, shared: dict[int, str]) -> str | None:
    """Why a linear layer cannot be part of a fused site; ``None`` where it can."""
    return (
        _subclass_problem(module) if type(module).forward is not nn.Linear.forward else _layer_problem(module, shared)
    )


# Modules that drop samples of a branch in training and scale the others, by the place of their class, so that none of
# the packages need be there. Their forwards do different things in train and in eval mode, so they are never inlined.
_DROP_PATHS = {
    ("torchvision.ops.stochastic_depth", "StochasticDepth"),
    ("timm.layers.drop", "DropPath"),
    ("fusedres.nn.stochastic_depth", "StochasticDepth"),
}


def is_drop_path(module: nn.Module) -> bool:
    """Whether the module is a stochastic depth that is known here."""
    return (type(module).__module__, type(module).__qualname__) in _DROP_PATHS


def drop_path_problem(module: nn.Module) -> str | None:
    """Why a module for which :func:`is_drop_path` holds cannot be part of a fused site; ``None`` where it can."""
    if getattr(module, "mode", "row") != "row":
        return f"drops whole batches (mode={module.mode!r}), which no block does"
    if not getattr(module, "scale_by_keep", True):
        return "does not scale the samples that it keeps (scale_by_keep=False), which blocks do"
    return hook_problem(module)


def _subclass_problem(module: nn.Module) -> str:
    name = class_name(module)
    if is_parametrized(module):
        return "has a parametrization"
    if type(module).__module__.startswith("torch.nn.modules."):
        return f"is a {name}, which is left as it is"
    return f"is a {name}, which has a forward of its own"


def _layer_problem(module: nn.Module, shared: dict[int, str]) -> str | None:
    if is_parametrized(module):
        return "has a parametrization"
    if any(isinstance(p, UninitializedTensorMixin) for p in module._parameters.values()):
        return "is lazy and has no parameters yet"
    problem = hook_problem(module)
    if problem is not None and module._parameters.keys() <= {"weight", "bias"}:
        return problem
    return _tensor_problem(module, shared)


def _tensor_problem(module: nn.Module, shared: dict[int, str]) -> str | None:
    if module._parameters.keys() != {"weight", "bias"} or not module._buffers.keys() <= _STATISTICS:
        return "has parameters or buffers beyond its class's (weight norm, spectral norm or pruning)"
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        if type(parameter) is not nn.Parameter and not _is_gathered(module, parameter):
            return f"has a {name} of type {type(parameter).__name__}"
        if parameter.is_complex():
            return f"has a complex {name}"
        if id(parameter) in shared:
            return f"shares its {name} with another module ({shared[id(parameter)]})"
    return None


def _is_gathered(module: nn.Module, parameter: nn.Parameter) -> bool:
    """Whether PyTorch's ``fully_shard`` puts an ordinary parameter in its place while the module runs."""
    return type(parameter).__name__ == "DTensor" and getattr(module, "_is_fsdp_managed_module", False)


_STATISTICS = {"running_mean", "running_var", "num_batches_tracked"}


def shared_parameters(model: nn.Module) -> dict[int, str]:
    """The ids of the parameters that more than one module holds, each with the paths of its holders."""
    holders = [(id(p), path) for path, m in model.named_modules() for p in m._parameters.values() if p is not None]
    count = Counter(key for key, _ in holders)
    return {key: ", ".join(path for k, path in holders if k == key) for key, n in count.items() if n > 1}
