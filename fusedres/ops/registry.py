"""How an op is declared: its schema and reference in Python, each backend's kernel under a name of its own.

Schemas live in Python so that an installation without the compiled library keeps every op. ``fusedres::<op>`` is the
reference in plain PyTorch, on any device and dtype; ``fusedres::<op>_cpu`` and the like are the kernels of a backend,
with the same schema. :mod:`fusedres.select` decides which of them runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["OPS", "Op", "declare", "define", "implement"]

# Operands that are written to, and counts, as schemas declare them.
_WRITTEN = re.compile(r",? ?Tensor\([a-z]!\)\? \w+(=None)?")
_COUNT = "float count"

_LIBRARY = torch.library.Library("fusedres", "DEF")


class Op:
    """One op of the library.

    Attributes:
        name: its stem, the same in every folder.
        schema: arguments and results in PyTorch's schema language.
        reference: the plain-PyTorch definition of correct.
        kernels: the backends that have a kernel for it.
        written: the positions of the arguments that it writes to.
    """

    def __init__(self, name: str, schema: str, reference: Callable[..., Any], kernels: tuple[str, ...]) -> None:
        self.name = name
        self.schema = schema
        self.reference = reference
        self.kernels = kernels
        arguments = torch._C.parse_schema(f"fusedres::{name}{schema}").arguments
        self.written = [i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]
        self._optional = all(isinstance(arguments[i].type, torch.OptionalType) for i in self.written)

    def overload(self, backend: str) -> Any:
        """The registered operator that computes this op on ``backend``."""
        name = self.name if backend == "reference" else f"{self.name}_{backend}"
        return getattr(torch.ops.fusedres, name).default

    def in_graph(self, backend: str) -> Callable[..., Any]:
        """The operator for calls that a compiler traces: of its overloads the one that has least to say.

        Without operands that are written to, where none is given: a compiler then need not find out what else shares
        their memory. With counts that may be symbols, where one is.
        """
        default = self.overload(backend)
        packet = default._overloadpacket

        def call(*args: Any) -> Any:
            if self.may_write_nothing and all(args[i] is None for i in self.written if i < len(args)):
                return packet.pure(*(arg for i, arg in enumerate(args) if i not in self.written))
            if self.counts and any(isinstance(arg, torch.SymInt) for arg in args):
                return packet.symbolic(*args)
            return default(*args)

        return call if self.may_write_nothing or self.counts else default

    @property
    def may_write_nothing(self) -> bool:
        """Whether there are operands that it writes to, all of them optional."""
        return bool(self.written) and self._optional

    @property
    def counts(self) -> bool:
        """Whether an argument is a count, which sizes of tensors decide."""
        return _COUNT in self.schema

    def with_nothing_written(self, args: Sequence[Any]) -> list[Any]:
        """The arguments of the default overload from those of the pure one, of which the last may be left out."""
        completed = list(args)
        for i in self.written:
            if i <= len(completed):
                completed.insert(i, None)
        return completed


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
    for backend in ("reference", *kernels):
        _declare_for_graphs(op, op.overload(backend), fake)
    return op


def _declare_for_graphs(op: Op, default: Any, fake: Callable[..., Any]) -> None:
    """Registers the overloads that :meth:`Op.in_graph` calls, each a way to call the default one."""
    symbolic = op.schema.replace(_COUNT, _COUNT.replace("float", "SymInt"))

    def overload(name: str, schema: str, complete: Callable[[Sequence[Any]], Sequence[Any]]) -> None:
        name = f"{default._overloadpacket.__name__}.{name}"
        define(name + schema, lambda *args: default(*complete(args)), lambda *args: fake(*complete(args)))

    if op.counts:
        overload("symbolic", symbolic, lambda args: args)
    if op.may_write_nothing:
        overload("pure", _WRITTEN.sub("", symbolic), op.with_nothing_written)


def define(schema: str, function: Callable[..., Any], fake: Callable[..., Any], tags: Sequence[Any] = ()) -> None:
    """Registers an operator that compilers' graphs alone call, and that is ``function`` on every device."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=tuple(tags))
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fusedres::{name}", fake, lib=_LIBRARY)


def implement(op: Op, backend: str, function: Callable[..., Any], dispatch_key: str) -> None:
    """Makes a Python function the kernel of ``op`` on ``backend``, for tensors of this dispatch key."""
    _LIBRARY.impl(f"{op.name}_{backend}", function, dispatch_key)
