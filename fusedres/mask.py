"""Modules that multiply by a mask of their own drawing, one factor per sample or per sample and channel.

``nn.Dropout2d`` is one, and so are the stochastic depths that people write for themselves. Of those nothing is known
but what running them shows: :func:`mask_of` runs one on images of several sizes and follows every operation. Where the
result is the input times numbers and times one tensor of shape ``[N, 1, 1, 1]`` or ``[N, C, 1, 1]``, made without
a look at the input's values and by the same operations for every size, then the module called on ones makes the
factors, with stock PyTorch's draws.
"""

from __future__ import annotations

import operator
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Mask", "mask_of", "undone_draws"]


class Mask(NamedTuple):
    """What a module multiplies by in training; in evaluation it hands its input on.

    Attributes:
        channels: whether there is a factor per sample and channel, rather than one per sample.
        number: the product of the numbers among the factors, which the module applies to its input one by one.
    """

    channels: bool
    number: float = 1.0


_LITERALS = (bool, int, float, str, type(None))
_Settings = tuple[type, dict[str, Any]]
# What was found, with the settings that it was found for.
_found: WeakKeyDictionary[nn.Module, tuple[_Settings, Mask | None]] = WeakKeyDictionary()


def mask_of(module: nn.Module) -> Mask | None:
    """The mask that ``module`` multiplies by with the settings that it has now, ``None`` where it may do otherwise."""
    if type(module).forward is nn.Dropout2d.forward:
        return Mask(channels=True)
    settings = _settings(module)
    if settings is None:
        return None
    known = _found.get(module)
    if known is None or known[0] != settings:
        _found[module] = known = (settings, _observed(module))
    return known[1]


def _settings(module: nn.Module) -> _Settings | None:
    """All that a module's forward can read of it but its mode, where that is plain values."""
    if module._parameters or module._buffers or module._modules:
        return None
    forward = type(module).forward
    # A mask is drawn in training alone: a forward that never asks for the mode needs no running.
    if "training" not in getattr(getattr(forward, "__code__", None), "co_names", ()):
        return None
    values = {k: v for k, v in module.__dict__.items() if not k.startswith("_") and k != "training"}
    return (type(module), values) if all(type(v) in _LITERALS for v in values.values()) else None


# ---------------------------------------------------------------------------------------------------------------------
# Running it
# ---------------------------------------------------------------------------------------------------------------------

# No two sizes alike in a shape, and none of them a divisor of another; the last is what masks are made from.
_SHAPES = ((3, 5, 7, 11), (2, 13, 17, 19), (3, 5, 1, 1))


def _observed(module: nn.Module) -> Mask | None:
    state = module.__dict__
    before = dict(state)
    try:
        with torch.random.fork_rng(devices=()), undone_draws() as drawn, torch.no_grad():
            state["training"] = False
            x = torch.ones(_SHAPES[0])
            same = module(x) is x
            state["training"] = True
            seen = [_followed(module, shape) for shape in _SHAPES]
        same = same and not drawn and state.keys() == before.keys()
        same = same and all(state[k] is v for k, v in before.items() if k != "training")
    except Exception:  # whatever a user's forward raises on such images
        return None
    finally:
        state.clear()
        state.update(before)
    return seen[0] if same and None not in seen and all(s == seen[0] for s in seen) else None


def _followed(module: nn.Module, shape: tuple[int, ...]) -> Mask | None:
    """The mask on images of one shape."""
    x = torch.ones(shape)
    follow = _Follow(x)
    with follow:
        out = module(x)
    found = follow.multiples.get(id(out))
    if found is None or found.mask is None or out.shape != x.shape:
        return None
    n, c = shape[:2]
    kinds = {(n, 1, 1, 1): False, (n, c, 1, 1): True}
    return Mask(kinds[found.mask], found.number) if found.mask in kinds else None


class _Multiple(NamedTuple):
    """The input times a number and perhaps times a tensor of shape ``mask``."""

    number: float = 1.0
    mask: tuple[int, ...] | None = None


class _Refused(Exception):
    """An operation that a mask does without."""


_SHAPED_LIKE = {
    *("empty_like", "rand_like", "ones_like", "zeros_like", "full_like"),
    *("new_empty", "new_ones", "new_zeros", "new_full"),
}


class _Follow(TorchDispatchMode):
    """Notes which tensors are multiples of the input, and which depend on its values in other ways."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.multiples = {id(x): _Multiple()}
        self._others: set[int] = set()
        self._alive = [x]  # an id is a tensor's for as long as it lives

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise _Refused
        depends = any(id(a) in self._others or id(a) in self.multiples for a in (*args, *kwargs.values()))
        name = func.overloadpacket.__name__
        if depends and func._schema.is_mutable:
            raise _Refused
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and depends and name not in _SHAPED_LIKE:
            multiple = self._multiple(name, args) if not kwargs else None
            self._alive.append(result)
            if multiple is None:
                self._others.add(id(result))
            else:
                self.multiples[id(result)] = multiple
        elif depends and not isinstance(result, Tensor):
            raise _Refused
        return result

    def _multiple(self, name: str, args: tuple) -> _Multiple | None:
        """What a product or a quotient is, or ``None``."""
        if name not in ("mul", "div") or len(args) != 2:
            return None
        a, b = args if id(args[0]) in self.multiples or name == "div" else args[::-1]
        of = self.multiples.get(id(a))
        if of is None or id(b) in self.multiples or id(b) in self._others:
            return None
        if not isinstance(b, Tensor):
            return of._replace(number=(operator.mul if name == "mul" else operator.truediv)(of.number, b))
        return of._replace(mask=tuple(b.shape)) if name == "mul" and of.mask is None else None


@contextmanager
def undone_draws() -> Iterator[list[bool]]:
    """Gives draws from Python's and NumPy's generators back; the list that it yields is not empty if there were any."""
    numpy_random = getattr(sys.modules.get("numpy"), "random", None)
    before, numpy_before = random.getstate(), numpy_random and numpy_random.get_state(legacy=False)
    drawn: list[bool] = []
    yield drawn
    different = random.getstate() != before
    if numpy_random is not None:
        now = numpy_random.get_state(legacy=False)["state"]
        then = numpy_before["state"]
        different |= now["pos"] != then["pos"] or bool((now["key"] != then["key"]).any())
    if different:
        random.setstate(before)
        if numpy_random is not None:
            numpy_random.set_state(numpy_before)
        drawn.append(True)
