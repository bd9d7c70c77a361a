"""A convolution with what surrounds it: the pending input's affine and activation before, statistics or a join behind.

With :math:`z = act(scale_c \\cdot x + shift_c)` the pending input's value (zero outside the image, as the convolution
pads) and :math:`conv` as in :mod:`fusedres.ops.conv`,

.. math:: y = conv(z, w) + b

In training (:data:`CONV_FUSED_FPROP`) the statistics of ``y``, as :mod:`fusedres.ops.bn_stats` has them, come with it.
In inference (:data:`CONV_FUSED_JOIN`) the join of :mod:`fusedres.ops.join` is applied to the accumulator:

.. math:: out = act_o(scale_k \\cdot y + shift_k + r) \\qquad r \\in \\{0,\\; residual,\\;
    res\\_scale_k \\cdot residual + res\\_shift_k\\}

``x`` is ``[N, C, H, W]`` or a channel slice of a channels_last buffer, ``weight`` ``[K, C, R, S]`` of the same dtype,
``bias`` ``[K]`` in that dtype or float32; norms are ``[4, C]`` and ``[4, K]``. ``z`` is rounded to the dtype of ``x``,
as a convolution of its own would read it; sums are in float32 and rounded once. No groups.

The idea is that of cuDNN's fused convolutions with batch-norm statistics (NVIDIA, "cuDNN: runtime fusion engines",
pattern ``scale-bias-relu-conv-genstats``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..triton import tuning
from .bn_stats import BN_STATS
from .conv import ConvGeometry, output_size
from .join import BY_CODE, JOIN, join_argument
from .registry import declare

__all__ = ["CONV_FUSED_FPROP", "CONV_FUSED_JOIN", "conv_fused_refuses", "conv_fused_unsuited", "pending_value"]

_INPUT = "Tensor x, Tensor? norm, int act, float act_param, Tensor weight, Tensor? bias"
_GEOMETRY = "int[] stride, int[] padding, int[] dilation"


def pending_value(x: Tensor, norm: Tensor | None, act: int, act_param: float) -> Tensor:
    """``act(scale * x + shift)`` in the dtype of ``x``."""
    return BY_CODE[act].forward(join_argument(x, norm, None, None), act_param).to(x.dtype)


def _convolved(
    x: Tensor,
    norm: Tensor | None,
    act: int,
    act_param: float,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    value = pending_value(x, norm, act, act_param).contiguous(memory_format=torch.channels_last)
    bias = None if bias is None else bias.to(x.dtype)
    y = torch.conv2d(value, weight, bias, stride, padding, dilation)
    return y.contiguous(memory_format=torch.channels_last)


def _result(x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]) -> Tensor:
    """An uninitialised result, channels_last."""
    g = ConvGeometry(tuple(stride), tuple(padding), tuple(dilation), 1)
    size = output_size((x.shape[2], x.shape[3]), (weight.shape[2], weight.shape[3]), g)
    shape = (x.shape[0], weight.shape[0], *size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------------------------------
# Training: with the statistics of the result
# ---------------------------------------------------------------------------------------------------------------------


def _fprop_reference(
    x: Tensor,
    norm: Tensor | None,
    act: int,
    act_param: float,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    want_stats: bool,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    y = _convolved(x, norm, act, act_param, weight, bias, stride, padding, dilation)
    stats = BN_STATS.reference(y) if want_stats else x.new_empty(0)
    if into is None:
        return y, stats
    into.copy_(y)
    return x.new_empty(0), stats


def _fprop_fake(
    x: Tensor,
    norm: Tensor | None,
    act: int,
    act_param: float,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    want_stats: bool,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    stats = x.new_empty((2, weight.shape[0]), dtype=dtype) if want_stats else x.new_empty(0)
    return x.new_empty(0) if into is not None else _result(x, weight, stride, padding, dilation), stats


CONV_FUSED_FPROP = declare(
    "conv_fused_fprop",
    f"({_INPUT}, {_GEOMETRY}, bool want_stats, Tensor(a!)? into=None) -> (Tensor, Tensor)",
    reference=_fprop_reference,
    fake=_fprop_fake,
    kernels=("triton",),
)
"""``(y, stats)``: ``y`` channels_last, or empty where it is written to ``into``, a channel slice of a channels_last
buffer; ``stats`` is ``[2, K]``, the rows mean and M2, or empty where they are not wanted."""


# ---------------------------------------------------------------------------------------------------------------------
# Inference: with the join behind
# ---------------------------------------------------------------------------------------------------------------------


def _join_reference(
    x: Tensor,
    norm: Tensor | None,
    act: int,
    act_param: float,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    out_norm: Tensor | None,
    residual: Tensor | None,
    res_norm: Tensor | None,
    out_act: int,
    out_act_param: float,
    into: Tensor | None = None,
) -> Tensor:
    y = _convolved(x, norm, act, act_param, weight, bias, stride, padding, dilation)
    out = JOIN.reference(y, out_norm, residual, res_norm, out_act, out_act_param)
    if into is None:
        return out
    into.copy_(out)
    return x.new_empty(0)


def _join_fake(
    x: Tensor,
    norm: Tensor | None,
    act: int,
    act_param: float,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    out_norm: Tensor | None,
    residual: Tensor | None,
    res_norm: Tensor | None,
    out_act: int,
    out_act_param: float,
    into: Tensor | None = None,
) -> Tensor:
    return x.new_empty(0) if into is not None else _result(x, weight, stride, padding, dilation)


CONV_FUSED_JOIN = declare(
    "conv_fused_join",
    f"({_INPUT}, {_GEOMETRY}, Tensor? out_norm, Tensor? residual, Tensor? res_norm, int out_act, float out_act_param, "
    "Tensor(a!)? into=None) -> Tensor",
    reference=_join_reference,
    fake=_join_fake,
    kernels=("triton",),
)
"""``out``, channels_last, or empty where it is written to ``into``. ``residual`` has the shape and dtype of ``out``."""


# ---------------------------------------------------------------------------------------------------------------------
# Whether to call them
# ---------------------------------------------------------------------------------------------------------------------


def conv_fused_refuses(
    kind: str, backend: str, x: Tensor, weight: Tensor, g: ConvGeometry, *, prologue: bool, pending_addend: bool = False
) -> str | None:
    """``None`` where ``backend`` runs this pass fused and is expected to beat the vendor's convolution, else why not.

    What was measured for this shape or one near it (:func:`fusedres.tune`) decides; without a measurement, 1x1
    convolutions, which are matrix products, are fused, and larger kernels are left to the vendor.

    Args:
        kind: ``"fprop"`` (both forward ops), ``"dgrad"`` or ``"wgrad"``.
        x: the convolution's input.
        prologue: whether an operand is pending: the input of ``fprop``, the output's gradient of the others.
        pending_addend: for ``dgrad``, whether an addend meets a pending ``x``.

    Raises:
        ValueError: for another ``kind``.
    """
    if kind not in ("fprop", "dgrad", "wgrad"):
        raise ValueError(f"kind must be 'fprop', 'dgrad' or 'wgrad', got {kind!r}")
    if backend not in CONV_FUSED_FPROP.kernels:
        return f"backend {backend!r} has no fused convolutions"
    reason = conv_fused_unsuited(kind, x, weight, g, pending_addend)
    if reason is not None:
        return reason
    filters, _, *kernel = weight.shape
    problem = tuning.Problem(kind, x.dtype, tuple(x.shape), filters, tuple(kernel), g, prologue)
    measured = tuning.vendor_is_faster(problem, x.device)
    if measured:
        return f"the vendor's {kind} was measured faster for this shape"
    if measured is None and kernel != [1, 1]:
        return f"no measurement says that {kernel[0]}x{kernel[1]} {kind} beats the vendor's: see fusedres.tune"
    return None


def conv_fused_unsuited(
    kind: str, x: Tensor, weight: Tensor, g: ConvGeometry, pending_addend: bool = False
) -> str | None:
    """``None`` where the kernels take these operands, else why not; arguments as of :func:`conv_fused_refuses`."""
    if g.groups != 1:
        return f"a fused convolution has no groups, this one has {g.groups}"
    if x.dtype != weight.dtype:
        return f"x is {x.dtype}, the weight {weight.dtype}"
    if not x.is_contiguous(memory_format=torch.channels_last) and x.stride(1) != 1:
        return "x is not channels_last"
    filters, channels, *kernel = weight.shape
    if channels % 8 or filters % 8:
        return f"{channels} and {filters} channels do not divide into loads of 16 bytes"
    pointwise = kernel == [1, 1]
    if kind == "dgrad" and pointwise and any(g.padding):
        return "dgrad takes no padding around a 1x1 kernel"
    if kind == "dgrad" and g.stride != (1, 1):
        if not pointwise:
            return f"dgrad with stride {g.stride} needs a 1x1 kernel"
        if pending_addend:
            return f"dgrad with stride {g.stride} takes no addend where its input is pending"
    return None
