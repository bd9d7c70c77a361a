"""What ops that treat every element alike do with their operands before a kernel may walk them as flat memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..select import FEWEST_ELEMENTS, too_small
from .checks import Checked, check_floating

__all__ = ["check_alike", "kernels_pay", "kernels_run", "needs_gradient"]

# Below this, what the passes save is less than what one more call from Python costs.
FEWEST_ELEMENTS["elementwise"] = 2**14


def check_alike(op: str, **tensors: Any) -> None:
    """Checks that the tensors agree in shape, device and, unless autocast is on, in dtype; the first is the measure.

    Raises:
        TypeError, ValueError: naming the argument, and both shapes.
    """
    (name, first), *others = tensors.items()
    check_floating(op, first, name)
    checked = Checked(op, name, first, tuple(first.shape))
    for other, value in others:
        checked.alike(other, value)


def kernels_run(*tensors: Tensor) -> bool:
    """Whether kernels may be called on these tensors, now.

    Not inside ``torch.compile``, which generates its own, nor inside transforms of ``torch.func``, nor on subclasses of
    Tensor, which may mean something else by an op.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors)


def kernels_pay(*tensors: Tensor) -> bool:
    """Whether kernels may be called on these tensors, and are worth the call; otherwise stock PyTorch runs them."""
    return kernels_run(*tensors) and not too_small(tensors[0].numel(), "elementwise")


def needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
