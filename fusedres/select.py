"""Which backend runs an op: predicates that answer yes, or no with the reason in words, and the one choice.

A forced backend comes first (:func:`use_backend`, or the ``backend=`` of a call), then the fastest backend whose
predicate says yes. Layout is no part of the question: the engine brings every tensor to a dense layout before it asks.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from types import SimpleNamespace

import torch
from torch import Tensor

from . import env, triton
from .ops.conv import ConvGeometry
from .ops.conv_fused import conv_fused_refuses
from .ops.registry import OPS, Op

__all__ = [
    "BACKENDS",
    "FEWEST_ELEMENTS",
    "MEASURED",
    "backend_for",
    "by_measurement",
    "forced_backend",
    "fused_references",
    "kernels",
    "too_small",
    "use_backend",
    "why_not",
]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_forced = threading.local()


def _cpu_refuses(device_type: str, dtype: torch.dtype) -> str | None:
    if device_type != "cpu":
        return f"the tensor is on {device_type}"
    if dtype not in _DTYPES:
        return f"the CPU kernels take float32, bfloat16 and float16, not {dtype}"
    return env.library_missing()


def _cuda_refuses(device_type: str, dtype: torch.dtype) -> str | None:
    if device_type != "cuda":
        return f"the tensor is on {device_type}"
    if dtype not in _DTYPES:
        return f"the CUDA kernels take float32, bfloat16 and float16, not {dtype}"
    return env.cuda_missing()


def _triton_refuses(device_type: str, dtype: torch.dtype) -> str | None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device_type != ("cpu" if interpreted else "cuda"):
        return f"the tensor is on {device_type}"
    if dtype not in _DTYPES:
        return f"the Triton kernels take float32, bfloat16 and float16, not {dtype}"
    return env.triton_missing()


def _stock_refuses(device_type: str, dtype: torch.dtype) -> str | None:
    return None


def _reference_refuses(device_type: str, dtype: torch.dtype) -> str | None:
    return None


# Each predicate answers None for yes, or why it cannot. ``stock`` is the block in PyTorch's own ops, ``reference`` the
# fused formulas in plain PyTorch: less memory, more passes.
BACKENDS = {
    "cpu": _cpu_refuses,
    "cuda": _cuda_refuses,
    "triton": _triton_refuses,
    "stock": _stock_refuses,
    "reference": _reference_refuses,
}

# What "auto" goes through, fastest first. Elsewhere a block is stock until :func:`fusedres.tune` has measured it there:
# what is faster depends on device and shape.
_AUTOMATIC = {"cpu": ("cpu", "reference")}
_AUTOMATIC_ELSEWHERE = ("stock",)
MEASURED = ("triton", "cuda")
"""The backends that a measurement may choose."""


# Elements of the input below which a block runs as stock: what its passes save there is less than what one more call
# from Python costs. Measured on two cores; see ``python -m fusedres bench``.
FEWEST_ELEMENTS = {"training": 5 * 2**17, "inference": 3 * 2**13}


def too_small(elements: int, mode: str, forced: str = "auto") -> bool:
    """Whether a block with an input of so many elements is faster as stock; ``mode`` is a key of the table above.

    A forced backend is never second-guessed.
    """
    return elements < FEWEST_ELEMENTS[mode] and forced == "auto" and forced_backend() == "auto"


def by_measurement(device_type: str, forced: str = "auto") -> bool:
    """Whether what a device's measurements say decides which backend runs a block."""
    return device_type not in _AUTOMATIC and forced == "auto" and forced_backend() == "auto"


def why_not(backend: str, device_type: str, dtype: torch.dtype) -> str | None:
    """``None`` where ``backend`` runs tensors of this device type and dtype, else the reason in words.

    Raises:
        ValueError: for a backend that does not exist.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    return BACKENDS[backend](device_type, dtype)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces a backend for the calls made by this thread inside the ``with`` block; ``"auto"`` lifts it.

    A call that the forced backend cannot run raises, with the reason: a measurement must never silently be of another
    backend.

    Raises:
        ValueError: for a backend that does not exist.
    """
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    before = forced_backend()
    _forced.name = name
    try:
        yield
    finally:
        _forced.name = before


def forced_backend() -> str:
    """What :func:`use_backend` forces in this thread, or ``"auto"``."""
    return getattr(_forced, "name", "auto")


def backend_for(device: torch.device | str, dtype: torch.dtype, forced: str = "auto") -> str:
    """The backend that runs the fused passes of a block whose tensors are of this device and dtype."""
    device_type = torch.device(device).type
    name = forced if forced != "auto" else forced_backend()
    return _resolve(device_type, dtype, name)


@cache
def _resolve(device_type: str, dtype: torch.dtype, forced: str) -> str:
    if forced != "auto":
        reason = why_not(forced, device_type, dtype)
        if reason is not None:
            raise RuntimeError(f"backend {forced!r} was asked for, but {reason}")
        return forced
    names = _AUTOMATIC.get(device_type, _AUTOMATIC_ELSEWHERE)
    return next(name for name in names if why_not(name, device_type, dtype) is None)


def kernels(device_type: str, dtype: torch.dtype, forced: str = "auto") -> SimpleNamespace:
    """Every op of :data:`fusedres.ops.registry.OPS` by its stem, from the backend chosen for this device and dtype.

    The namespace also names its ``backend``. An op that the backend lacks comes from the reference. ``fuses`` is
    ``None`` where the backend has no fused convolutions; else ``fuses(kind, x, weight, geometry, prologue)`` says
    whether to call one, see :func:`fusedres.ops.conv_fused.conv_fused_refuses`. ``fuses_alone`` is whether
    that holds as well where nothing is around a convolution that could be fused. ``folds`` is whether inference folds
    norms into weights: only on a CPU, since to see that folded weights are still true takes a look at them.

    Raises:
        RuntimeError: where a forced backend cannot run, with the reason.
    """
    traced = torch.compiler.is_compiling()
    found = _kernels(device_type, dtype, forced if forced != "auto" else forced_backend(), traced)
    fuses = getattr(_forced, "fuses", None)
    if fuses is None:
        return found
    return SimpleNamespace(**(vars(found) | {"fuses": fuses, "fuses_alone": False, "folds": False}))


@contextmanager
def fused_references(fuses: Callable[[str, Tensor, Tensor, ConvGeometry, bool], bool]) -> Iterator[None]:
    """Forces the reference backend, with the fused convolutions for which ``fuses`` says so; see :func:`kernels`.

    What a GPU's backend would run, pass by pass, without its GPU: to count it, and to test the engine.
    """
    before = getattr(_forced, "fuses", None)
    with use_backend("reference"):
        _forced.fuses = fuses
        try:
            yield
        finally:
            _forced.fuses = before


@cache
def _kernels(device_type: str, dtype: torch.dtype, forced: str, traced: bool) -> SimpleNamespace:
    backend = _resolve(device_type, dtype, forced)
    if backend == "triton":
        triton.load()
    choose = Op.in_graph if traced else Op.overload
    chosen = {name: choose(op, backend if backend in op.kernels else "reference") for name, op in OPS.items()}
    # On a CPU they are for the arithmetic of float32: see fusedres.ops.conv_winograd.
    has_fused = backend in OPS["conv_fused_fprop"].kernels and (backend != "cpu" or dtype == torch.float32)
    fuses = partial(_fuses, backend) if has_fused else None
    folds = device_type == "cpu" and backend != "triton"
    return SimpleNamespace(backend=backend, fuses=fuses, fuses_alone=backend == "cpu", folds=folds, **chosen)


def _fuses(backend: str, kind: str, x: Tensor, weight: Tensor, g: ConvGeometry, prologue: bool) -> bool:
    return conv_fused_refuses(kind, backend, x, weight, g, prologue=prologue) is None
