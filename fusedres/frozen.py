"""Batch norms that always use their running statistics and hold all four tensors as buffers.

Detection models are full of them: torchvision's ``FrozenBatchNorm2d``, detectron2's, those in Hugging Face's DETR and
its descendants. They share a name and a formula but no base class, and each is written in its own way. So a class with
that name is run: :func:`frozen_norm` takes it for one where outputs and gradients are the formula's, in both modes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["BUFFERS", "FrozenNorm", "frozen_norm", "has_frozen_name"]

BUFFERS = ("weight", "bias", "running_mean", "running_var")


class FrozenNorm(NamedTuple):
    """What a class of frozen batch norms computes: ``(x - mean) / sqrt(var + eps) * weight + bias``.

    Attributes:
        eps: the number in its code, or ``None`` where it reads its attribute of that name.
        promotes: whether the result has the dtype that the input and the buffers have in common, rather than the
            input's, as a batch norm's has.
    """

    eps: float | None
    promotes: bool


def has_frozen_name(module: nn.Module) -> bool:
    """Whether the module calls itself a frozen batch norm, and has the buffers of one and nothing else."""
    named = type(module).__name__.endswith("FrozenBatchNorm2d")
    return named and {*BUFFERS} == module._buffers.keys() and not (module._parameters or module._modules)


@cache
def frozen_norm(cls: type[nn.Module]) -> FrozenNorm | None:
    """What running instances of ``cls`` shows, or ``None`` where they are no frozen batch norms."""
    if not cls.__name__.endswith("FrozenBatchNorm2d"):
        return None
    constants = getattr(getattr(cls.forward, "__code__", None), "co_consts", ())
    try:
        with _undisturbed():
            for eps in (None, *(c for c in constants if type(c) is float)):
                if all(_computes(cls, eps, *case) for case in _CASES):
                    promoted = {_promotes(cls, *case, dtype) for case in _CASES for dtype in _LOW}
                    return FrozenNorm(eps, *promoted) if len(promoted) == 1 else None
    except Exception:  # whatever a user's forward raises
        pass
    return None


# The attribute eps, training, and whether the input asks for its gradient.
_CASES = tuple(product((0.25, 1e-3), (False, True), (False, True)))
_LOW = (torch.bfloat16, torch.float16)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Without what the caller may have switched on around a forward."""
    grad = torch.inference_mode(False), torch.enable_grad()
    with _disable_current_modes(), grad[0], grad[1], torch.autocast("cpu", enabled=False), torch.device("cpu"):
        yield


def _instance(cls: type[nn.Module], eps: float, training: bool, dtype: torch.dtype) -> nn.Module:
    """One with numbers of no pattern, among them variances so small that ``eps`` counts."""
    norm = cls.__new__(cls)
    nn.Module.__init__(norm)
    values = ((0.75, -1.5, 2.0), (-0.5, 0.25, 3.0), (1.5, 0.5, -0.25), (0.0, 1e-5, 0.625))
    for name, numbers in zip(BUFFERS, values):
        norm.register_buffer(name, torch.tensor(numbers, dtype=dtype))
    norm.eps, norm.num_features, norm.training = eps, 3, training
    return norm


def _image(dtype: torch.dtype, needed: bool) -> Tensor:
    return torch.linspace(-2, 3, 60, dtype=torch.float64).view(2, 3, 2, 5).to(dtype).requires_grad_(needed)


def _run(norm: nn.Module, x: Tensor) -> Tensor | None:
    """What the forward makes of ``x``, or ``None`` where it changes the module or ``x``."""
    before = dict(norm.__dict__), dict(norm._buffers), [t.clone() for t in (x, *norm.buffers())]
    out = type(norm).forward(norm, x)
    same = _same(norm.__dict__, before[0]) and _same(norm._buffers, before[1])
    return out if same and all(map(torch.equal, (x, *norm.buffers()), before[2])) else None


def _same(now: dict[str, Any], before: dict[str, Any]) -> bool:
    return now.keys() == before.keys() and all(now[k] is v for k, v in before.items())


def _computes(cls: type[nn.Module], constant: float | None, eps: float, training: bool, needed: bool) -> bool:
    """Whether the output and the gradient are the formula's."""
    norm, x = _instance(cls, eps, training, torch.float64), _image(torch.float64, needed)
    weight, bias, mean, var = (t.view(1, 3, 1, 1) for t in norm.buffers())
    scale = weight / (var + (eps if constant is None else constant)).sqrt()
    out = _run(norm, x)
    if out is None or out.requires_grad != needed or not _close(out, (x - mean) * scale + bias):
        return False
    grad = torch.linspace(1, 2, 60, dtype=torch.float64).view_as(x)
    return not needed or _close(*torch.autograd.grad(out, x, grad), grad * scale)


def _close(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-9, atol=1e-9)


def _promotes(cls: type[nn.Module], eps: float, training: bool, needed: bool, dtype: torch.dtype) -> bool:
    """Whether the result of a low precision is of the buffers' float32; raises where it is of neither's."""
    out = _run(_instance(cls, eps, training, torch.float32), _image(dtype, needed))
    return {torch.float32: True, dtype: False}[out.dtype]
