"""Triton's interpreter, mended: kernels run on the CPU with ``TRITON_INTERPRET=1``, one program after another.

Call :func:`enable` before any kernel is defined. NumPy has no bfloat16, and the interpreter of Triton 3.6 and 3.7
multiplies the raw bits of such operands in ``tl.dot`` and cuts digits off where it converts float32: here operands are
widened first, as tensor cores do, and conversions round to nearest. And it adds the rows of a tile one after another,
where a GPU adds in a tree: here in pairs too, so that errors are of that size. Triton 3.6 makes an integer of an array
of one element, which NumPy refuses from 2.4 on: here of that element.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

__all__ = ["enable"]


def enable() -> None:
    """Switches the interpreter on for this process.

    Raises:
        RuntimeError: where kernels were defined for a GPU already; each is one or the other from then on.
    """
    import sys

    if "fusedres.triton.launch" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("the kernels are defined already: enable the interpreter before any of them is imported")
    os.environ["TRITON_INTERPRET"] = "1"
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    if getattr(interpreter.InterpreterBuilder.create_dot, "widens_bfloat16", False):
        return
    original = interpreter.InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return original(self, widened(a), widened(b), *rest)

    def sum_in_pairs(self: Any, tile: Any) -> Any:
        data = tile.handle.data
        axes = tuple(range(data.ndim)) if self.axis is None else (self.axis,)
        for axis in axes:
            while data.shape[axis] > 1:  # lengths are powers of two
                first, second = np.split(data, 2, axis)
                data = first + second
        return self.to_tensor(data if self.keep_dims else data.squeeze(axes), tile.dtype)

    cast = interpreter.InterpreterBuilder.cast_impl

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        if source.dtype.scalar != tl.float32 or to.scalar != tl.bfloat16:
            return cast(self, source, to)
        bits = np.atleast_1d(np.asarray(source.data, np.float32)).view(np.uint32).reshape(np.shape(source.data))
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        nan = np.isnan(source.data)
        return interpreter.TensorHandle(np.where(nan, (bits >> 16) | 0x40, rounded).astype(np.uint16), to.scalar)

    create_dot.widens_bfloat16 = True
    interpreter.InterpreterBuilder.cast_impl = cast_impl
    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter.ReduceOps.sum = sum_in_pairs
    _mend_integers(interpreter)


def _mend_integers(interpreter: Any) -> None:
    """``range(n)`` and other integers of tensors with one element, where they fail."""
    import numpy as np

    patch = interpreter._patch_lang_tensor

    class Tensor:
        handle = SimpleNamespace(data=np.ones(1, np.int32))

    patch(Tensor, SimpleNamespace(set_attr=setattr))
    try:
        int(Tensor())
    except TypeError:

        def mended(tensor: Any, scope: Any) -> None:
            patch(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

        interpreter._patch_lang_tensor = mended
