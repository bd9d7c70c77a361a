"""What a forward may ask of PyTorch's state: the answer would be a constant of the graph, and is not one of the model.

While a forward is traced, the functions that answer raise instead, where the user's code calls them: PyTorch's own may
ask on. They are replaced where they live, and under the names that the code of the traced modules has imported.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

from torch import nn

from .source import forward_of, named_in
from .untraceable import Untraceable, is_user_code

__all__ = ["state_unasked"]

_GRADIENTS, _AUTOCAST, _TRACED = "gradients are on", "autocast is on", "it is being traced, compiled or exported"
_DETERMINISTIC, _PROCESSES = "algorithms are deterministic", "there are other processes"
_QUESTIONS = {
    "torch": {
        "is_grad_enabled": _GRADIENTS,
        "is_inference_mode_enabled": _GRADIENTS,
        "is_anomaly_enabled": _GRADIENTS,
        "is_autocast_enabled": _AUTOCAST,
        "is_autocast_cpu_enabled": _AUTOCAST,
        "is_autocast_cache_enabled": _AUTOCAST,
        "get_autocast_dtype": _AUTOCAST,
        "get_autocast_cpu_dtype": _AUTOCAST,
        "get_autocast_gpu_dtype": _AUTOCAST,
        "are_deterministic_algorithms_enabled": _DETERMINISTIC,
        "is_deterministic_algorithms_warn_only_enabled": _DETERMINISTIC,
    },
    "torch.jit": {"is_tracing": _TRACED},
    "torch.onnx": {"is_in_onnx_export": _TRACED},
    "torch.compiler": {"is_compiling": _TRACED, "is_dynamo_compiling": _TRACED, "is_exporting": _TRACED},
    "torch._dynamo": {"is_compiling": _TRACED},
    "torch.distributed": {"is_initialized": _PROCESSES, "get_rank": _PROCESSES, "get_world_size": _PROCESSES},
}


@contextmanager
def state_unasked(classes: Collection[type[nn.Module]]) -> Iterator[None]:
    """Inside, the user's code raises :class:`Untraceable` where it asks for what no graph records.

    Args:
        classes: of the modules whose code may run.
    """
    if any("is_in_onnx_export" in named_in(cls) for cls in classes):
        importlib.import_module("torch.onnx")  # else only the call itself would
    homes = [(vars(sys.modules[home]), asked) for home, asked in _QUESTIONS.items() if home in sys.modules]
    before = [(home, name, home[name]) for home, asked in homes for name in asked if name in home]
    refusing = {
        id(function): _refusing(function, _QUESTIONS[home["__name__"]][name]) for home, name, function in before
    }
    for scope in _scopes(classes):
        before += [(scope, name, value) for name, value in scope.items() if id(value) in refusing]
    for scope, name, function in before:
        scope[name] = refusing[id(function)]
    try:
        yield
    finally:
        for scope, name, function in before:
            scope[name] = function


def _scopes(classes: Iterable[type]) -> Iterable[dict[str, Any]]:
    """The globals of the user's forwards."""
    scopes = (getattr(forward_of(cls), "__globals__", {}) for cls in classes)
    return {id(scope): scope for scope in scopes if is_user_code(scope.get("__file__") or "")}.values()


def _refusing(function: Callable, what: str) -> Callable:
    tracing = get_ident()

    def ask(*args: Any, **kwargs: Any) -> Any:
        if get_ident() == tracing and is_user_code(sys._getframe(1).f_code.co_filename):
            raise Untraceable(f"its forward asks whether {what}")
        return function(*args, **kwargs)

    return ask
