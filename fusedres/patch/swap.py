"""Giving one instance a generated subclass of its class, and taking it back.

Only ``__class__`` changes: parameters, keys, hooks and ``isinstance`` stay. A pickle holds the stock class, so it loads
where fusedres is not installed; a copy made in memory stays fused.
"""

from __future__ import annotations

import copy
import copyreg
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

from torch import nn

from ..block import Block, Dense
from .codegen import compile_forward
from .gated_join import GatedJoin
from .watch import Watched

__all__ = ["Site", "Template", "fused_class", "stock_class", "swap", "template_of", "unswap"]


@dataclass(frozen=True)
class Template:
    """What is the same for every instance that is fused in the same way; it sits on the generated class.

    Args:
        stock: the class that the module had.
        source: of the generated forward.
        blocks: each call's pattern name and block.
        remarks: for each of them, why it is not more, or nothing.
        inlined: the paths of the submodules that the forward no longer calls, since it holds their code.
        watched: what must still be as it was for the forward to hold.
        declined: the convolutions and norms that the forward calls as they are, each with the reason.
        options: the ``backend`` and ``memory`` that the calls name.
    """

    stock: type
    source: str
    blocks: tuple[tuple[str, Block | Dense | GatedJoin], ...]
    remarks: tuple[str, ...]
    inlined: tuple[str, ...]
    watched: tuple[Watched, ...]
    declined: tuple[tuple[str, str], ...]
    options: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Site:
    """One module to fuse, and the class that it is to have."""

    path: str
    module: nn.Module
    fused: type

    @property
    def template(self) -> Template:
        return self.fused._fusedres_template


_classes: WeakValueDictionary[Template, type] = WeakValueDictionary()


def template_of(module: nn.Module) -> Template | None:
    """The template of a fused module, ``None`` for any other."""
    return getattr(type(module), "_fusedres_template", None)


# Of classes that were derived from fused ones.
_unfused: WeakKeyDictionary[type, type] = WeakKeyDictionary()


def stock_class(cls: type) -> type:
    """The class that a fused class stands for; any other is itself.

    PyTorch's ``fully_shard`` derives a class of its own from a module's: that one is derived anew from the stock class.
    """
    if not hasattr(cls, "_fusedres_template"):
        return cls
    if "_fusedres_template" in cls.__dict__:
        return cls._fusedres_template.stock
    if cls not in _unfused:
        stock = cls._fusedres_template.stock.__name__
        members = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")}
        name = cls.__name__.replace(f"Fused{stock}", stock)
        _unfused[cls] = type(cls)(name, tuple(map(stock_class, cls.__bases__)), members)
    return _unfused[cls]


def swap(site: Site) -> None:
    """Fuses one module, in place."""
    site.module.__class__ = site.fused


def unswap(module: nn.Module) -> bool:
    """Gives a fused module its class back; says whether it was fused."""
    if template_of(module) is None:
        return False
    module.__class__ = stock_class(type(module))
    return True


def fused_class(template: Template, names: dict[str, Any]) -> type:
    """The subclass of ``template.stock`` that runs the generated forward; one for equal templates.

    Args:
        names: the globals of the forward.
    """
    if (known := _classes.get(template)) is not None:
        return known
    stock = template.stock
    name = f"Fused{stock.__name__}"
    members = {
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__.removesuffix(stock.__name__) + name,
        "__doc__": stock.__doc__,
        "_fusedres_template": template,
        "forward": compile_forward(template.source, names, name),
        **_LIFE,
    }
    _classes[template] = cls = type(stock)(name, (stock,), members)
    return cls


# ---------------------------------------------------------------------------------------------------------------------
# Life of a fused instance: construction, pickling, copying
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def _as_stock(module: nn.Module) -> Iterator[None]:
    """Inside, ``module`` is of its stock class, so that whatever the class defines works on it.

    A forward that another thread runs meanwhile is the stock one: the same numbers.
    """
    fused = type(module)
    module.__class__ = stock_class(fused)
    try:
        yield
    finally:
        module.__class__ = fused


def _like(module: nn.Module, duplicate: Callable[[], Any]) -> Any:
    with _as_stock(module):
        twin = duplicate()
    if twin is not module and type(twin) is stock_class(type(module)):
        twin.__class__ = type(module)
    return twin


def _init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
    """``type(module)(...)``, as slices of a ``Sequential`` write, builds a stock module: it has other submodules.

    Not ``__new__``, by which compilers make an empty instance that is to share a fused one's ``__dict__``.
    """
    self.__class__ = stock_class(type(self))
    self.__init__(*args, **kwargs)


def _reduce_ex(self: nn.Module, protocol: Any) -> Any:
    with _as_stock(self):
        reduced = self.__reduce_ex__(protocol)
    if not isinstance(reduced, tuple):
        return reduced
    function, arguments, *rest = reduced
    if function is copyreg.__newobj__:
        # Pickle refuses this one where the class that it is given is not the object's.
        function, arguments = _make(*arguments)
    return (function, arguments, *rest)


def _make(cls: type, *args: Any) -> tuple[Any, tuple]:
    """A call that any Python can unpickle and that makes what ``cls.__new__(cls, *args)`` makes."""
    if not args and cls.__new__ is object.__new__:
        return copyreg._reconstructor, (cls, object, None)
    return partial(cls.__new__, cls, *args), ()


def _deepcopy(self: nn.Module, memo: dict) -> Any:
    return _like(self, lambda: copy.deepcopy(self, memo))


def _extra_repr(self: nn.Module) -> str:
    stock = stock_class(type(self))
    origin = f"{stock.__module__}.{stock.__qualname__}, fused by fusedres"
    said = stock.extra_repr(self)
    return f"{origin}\n{said}" if said else origin


def _copy(self: nn.Module) -> Any:
    return _like(self, lambda: copy.copy(self))


def _replicate(self: nn.Module) -> Any:
    return _like(self, lambda: self._replicate_for_data_parallel())


def _prepare_scriptable(self: nn.Module) -> Any:
    raise RuntimeError(
        "torch.jit.script reads a module's source, which is generated here: call fusedres.unpatch(model) first, or use "
        "torch.jit.trace, torch.export or ONNX export, which see the stock layers"
    )


_LIFE = {
    "__init__": _init,
    "__reduce_ex__": _reduce_ex,
    "__deepcopy__": _deepcopy,
    "__copy__": _copy,
    "_replicate_for_data_parallel": _replicate,
    "__prepare_scriptable__": _prepare_scriptable,
    "extra_repr": _extra_repr,
}
