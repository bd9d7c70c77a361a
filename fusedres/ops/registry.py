"""How an op is declared: its schema and reference in Python, each backend's kernel under a name of its own.

Schemas live in Python so that an installation without the compiled library keeps every op. ``fusedres::<op>`` is the
reference in plain PyTorch, on any device and dtype; ``fusedres::<op>_cpu`` and the like are the kernels of a backend,
with the same schema. :mod:`fusedres.select` decides which of them runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["OPS", "Op", "declare", "implement"]

_LIBRARY = torch.library.Library("fusedres", "DEF")


class Op:
    """One op of the library.

    Attributes:
        name: its stem, the same in every folder.
        schema: arguments and results in PyTorch's schema language.
        reference: the plain-PyTorch definition of correct.
        kernels: the backends that have a kernel for it.
    """

    def __init__(self, name: str, schema: str, reference: Callable[..., Any], kernels: tuple[str, ...]) -> None:
        self.name = name
        self.schema = schema
        self.reference = reference
        self.kernels = kernels

    def overload(self, backend: str) -> Any:
        """The registered operator that computes this op on ``backend``."""
        name = self.name if backend == "reference" else f"{self.name}_{backend}"
        return getattr(torch.ops.fusedres, name).default


OPS: dict[str, Op] = {}


def declare(
    name: str,
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    kernels: tuple[str, ...] = (),
) -> Op:
    """Registers ``fusedres::<name>`` with its reference and fake, and the schema of each backend's kernel."""
    op = OPS[name] = Op(name, schema, reference, kernels)
    _LIBRARY.define(f"{name}{schema}")
    # Autograd would record what the reference is made of, but no kernel has a gradient: the engine's nodes have it.
    _LIBRARY.impl(name, torch.no_grad()(reference), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fusedres::{name}", fake, lib=_LIBRARY)
    for backend in kernels:
        _LIBRARY.define(f"{name}_{backend}{schema}")
        torch.library.register_fake(f"fusedres::{name}_{backend}", fake, lib=_LIBRARY)
    return op


def implement(op: Op, backend: str, function: Callable[..., Any], dispatch_key: str) -> None:
    """Makes a Python function the kernel of ``op`` on ``backend``, for tensors of this dispatch key."""
    _LIBRARY.impl(f"{op.name}_{backend}", function, dispatch_key)
