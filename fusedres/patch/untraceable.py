"""Why a forward cannot be traced, in words, and whose code it was."""

from __future__ import annotations

import os
import sysconfig
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import fx

__all__ = ["Lookup", "Untraceable", "in_words", "is_user_code"]

_TORCH = str(Path(torch.__file__).parent) + os.sep
_HERE = str(Path(__file__).parent) + os.sep
_PYTHON = sysconfig.get_paths()["stdlib"] + os.sep


Lookup = tuple[dict[str, Any], str]
"""Where a function is looked up: the globals of its caller, and the name in them."""


class Untraceable(Exception):
    """A forward that no graph can stand for.

    Attributes:
        reason: why.
        culprit: the path of the submodule that it is about.
        function: the function that it is about, which might be called instead of traced.
    """

    def __init__(self, reason: str, culprit: str = "", function: Lookup | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.culprit = culprit
        self.function = function


def is_user_code(filename: str) -> bool:
    """Whether a file is neither PyTorch nor Python nor ours."""
    if filename.startswith((_TORCH, _HERE, "<frozen")):
        return False
    # What is installed lies below the standard library.
    installed = f"{os.sep}site-packages{os.sep}" in filename or f"{os.sep}dist-packages{os.sep}" in filename
    return installed or not filename.startswith(_PYTHON)


def in_words(error: Exception) -> str:
    """What went wrong while a forward was traced, with the line of the user's at which it did."""
    if isinstance(error, Untraceable):
        return error.reason + _where(error)
    message = str(error)
    if isinstance(error, fx.proxy.TraceError) and "iterated" not in message:
        return "its forward branches on data" + _where(error)
    if isinstance(error, fx.proxy.TraceError):
        return "its forward loops over or unpacks a value known only at run time" + _where(error)
    if isinstance(error, TypeError) and "cannot assign" in message:
        return "its forward stores a value on the module" + _where(error)
    return f"its forward could not be traced ({type(error).__name__}: {message.splitlines()[0][:100]})" + _where(error)


def _where(error: Exception) -> str:
    """`` (file.py:12: `if x.mean() > 0:`)``: the last line of the user's own code that the error passed through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if is_user_code(f.filename)]
    if not frames:
        return ""
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno}: `{frames[-1].line}`)"
