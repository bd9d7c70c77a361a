"""Max pooling of a normalised and activated tensor, in the pass that applies both.

.. math:: out_{n,c,p} = \\max_{t \\in window} act(scale_c \\cdot y_{n,c,\\,stride \\cdot p + t - padding} + shift_c)

over the positions ``t`` that lie in the image. ``y`` is ``[N, C, H, W]`` of one dense layout, also a slice of the
channels of a channels_last buffer; ``out`` is ``[N, C, H', W']`` in its dtype and layout, with ``H'`` and ``W'`` as in
``F.max_pool2d``; a norm is the ``[4, C]`` tensor of :mod:`fusedres.ops.bn_norm`, and without one the affine is the
identity. It is the end of a stem (He et al. 2016, "Deep Residual Learning for Image Recognition", table 1), where stock
PyTorch writes the largest tensor of a network and reads it again, and keeps it for backward with eight bytes of index
beside every value of the result.

What is kept here is one byte: ``taken``, the number of the position in the window, row by row, whose value was taken,
the first of equals, and NaN wherever there is one (the last of several), as stock PyTorch takes them. Equal are values
in ``y``'s dtype, to which each is rounded before it is compared.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .join import JOIN
from .layout import dense
from .registry import declare

__all__ = [
    "JOIN_POOL",
    "JOIN_POOL_BACKWARD",
    "MOST_POSITIONS",
    "POOL_SETTINGS",
    "PoolWindow",
    "pool_window",
    "pooled_size",
]

MOST_POSITIONS = 255
"""Of a window: their numbers are bytes."""

_WINDOW = "int[2] kernel, int[2] stride, int[2] padding, bool ceil"


class PoolWindow(NamedTuple):
    """What a max pooling is; pairs are (height, width), ``ceil`` is ``F.max_pool2d``'s ``ceil_mode``."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    ceil: bool


POOL_SETTINGS = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
"""The attributes of ``nn.MaxPool2d`` that :func:`pool_window` takes, in its order."""


@cache
def pool_window(
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> PoolWindow:
    """The arguments of ``F.max_pool2d``, normalised.

    Raises:
        ValueError: for what no kernel does: dilation, indices, more than 255 positions, and what stock PyTorch refuses.
    """
    kernel = _pair("kernel_size", kernel_size)
    steps, padded = kernel if stride in (None, ()) else _pair("stride", stride), _pair("padding", padding)
    if return_indices or _pair("dilation", dilation) != (1, 1):
        raise ValueError("a max pooling with indices or with a dilation")
    if not (0 < kernel[0] * kernel[1] <= MOST_POSITIONS and min(*kernel, *steps) > 0):
        raise ValueError(f"kernel_size must have 1 to {MOST_POSITIONS} positions and strides be positive, got {kernel}")
    if not all(0 <= 2 * p <= k for p, k in zip(padded, kernel)):
        raise ValueError(f"padding must be at most half of kernel_size, got {padded} and {kernel}")
    return PoolWindow(kernel, steps, padded, bool(ceil_mode))


def _pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    pair = 2 * pair if len(pair) == 1 else pair
    if len(pair) != 2 or not all(type(number) is int for number in pair):
        raise ValueError(f"{name} must be one or two integers, got {value!r}")
    return pair


def pooled_size(size: tuple[int, int], window: PoolWindow) -> tuple[int, int]:
    """Height and width of the result."""
    return tuple(map(_pooled, size, window.kernel, window.stride, window.padding, (window.ceil,) * 2))


def _pooled(size: int, kernel: int, stride: int, padding: int, ceil: bool) -> int:
    count = (size + 2 * padding - kernel + (stride - 1 if ceil else 0)) // stride + 1
    # A window that would begin behind the image has nothing in it.
    return count - 1 if ceil and (count - 1) * stride >= size + padding else count


# ---------------------------------------------------------------------------------------------------------------------
# Forward
# ---------------------------------------------------------------------------------------------------------------------


def _reference(
    y: Tensor,
    norm: Tensor | None,
    act: int,
    act_param: float,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    ceil: bool,
    record: bool,
) -> tuple[Tensor, Tensor]:
    out, taken = _fake(y, norm, act, act_param, kernel, stride, padding, ceil, record)
    if y.numel() == 0:
        return out, taken
    value = dense(JOIN.reference(y, norm, None, None, act, act_param))
    found, index = F.max_pool2d(value, kernel, stride, padding, ceil_mode=ceil, return_indices=True)
    if record:
        rows = torch.arange(out.shape[2], device=y.device)[:, None] * stride[0] - padding[0]
        columns = torch.arange(out.shape[3], device=y.device) * stride[1] - padding[1]
        taken.copy_((index // y.shape[3] - rows) * kernel[1] + index % y.shape[3] - columns)
    return out.copy_(found), taken


def _fake(
    y: Tensor,
    norm: Tensor | None,
    act: int,
    act_param: float,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    ceil: bool,
    record: bool,
) -> tuple[Tensor, Tensor]:
    size = pooled_size(y.shape[2:], PoolWindow(tuple(kernel), tuple(stride), tuple(padding), ceil))
    out = torch.empty((*y.shape[:2], *size), dtype=y.dtype, device=y.device, memory_format=_format_of(y))
    return out, torch.empty_like(out, dtype=torch.uint8) if record else y.new_empty(0, dtype=torch.uint8)


def _format_of(y: Tensor) -> torch.memory_format:
    """That of results; where a tensor is dense in both layouts, as kernels take it."""
    last = y.is_contiguous(memory_format=torch.channels_last) or not y.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


JOIN_POOL = declare(
    "join_pool",
    f"(Tensor y, Tensor? norm, int act, float act_param, {_WINDOW}, bool record) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    kernels=("cpu", "cuda", "triton"),
)
"""``(out, taken)``; ``taken`` is uint8 in the shape and layout of ``out``, and empty unless ``record``."""


# ---------------------------------------------------------------------------------------------------------------------
# Backward
# ---------------------------------------------------------------------------------------------------------------------


def _backward_reference(
    grad: Tensor, taken: Tensor, y: Tensor, kernel: list[int], stride: list[int], padding: list[int]
) -> Tensor:
    n, c, height, width = y.shape
    out = _backward_fake(grad, taken, y, kernel, stride, padding)
    if grad.numel() == 0:
        return out.zero_()
    rows = torch.arange(grad.shape[2], device=y.device)[:, None] * stride[0] - padding[0] + taken // kernel[1]
    columns = torch.arange(grad.shape[3], device=y.device) * stride[1] - padding[1] + taken % kernel[1]
    wide = torch.promote_types(y.dtype, torch.float32)
    index = (rows * width + columns).flatten(2)
    full = torch.zeros((n, c, height * width), dtype=wide, device=y.device)
    full.scatter_add_(2, index, grad.to(wide).flatten(2))
    return out.copy_(full.view(n, c, height, width))


def _backward_fake(
    grad: Tensor, taken: Tensor, y: Tensor, kernel: list[int], stride: list[int], padding: list[int]
) -> Tensor:
    return torch.empty(y.shape, dtype=y.dtype, device=y.device, memory_format=_format_of(y))


JOIN_POOL_BACKWARD = declare(
    "join_pool_backward",
    "(Tensor grad, Tensor taken, Tensor y, int[2] kernel, int[2] stride, int[2] padding) -> Tensor",
    reference=_backward_reference,
    fake=_backward_fake,
    kernels=("cpu", "cuda", "triton"),
)
"""The gradient of what was pooled, ``act(norm(y))``: of every value, the sum of ``grad`` over the windows that took it.
Of ``y`` only shape, dtype and layout count; ``grad`` has its dtype, and ``taken``'s shape and layout. Sums are in
float32 (float64 for float64), rounded once. What follows is :mod:`fusedres.ops.join_backward`."""
