"""The gradients of a fused convolution, between two pending values; the gradient of its raw output is never stored.

Behind the convolution, :math:`y = conv(z, w)` is normalised; ``g`` is the gradient behind that norm, and the norm's
input gradient is affine in ``g`` and ``y`` (Ioffe and Szegedy 2015, section 3). :data:`BN_GRAD_ROWS` has its rows,

.. math:: dy = scale_k \\, g - slope_k (y - mean_k) - offset_k \\qquad
    slope = scale \\cdot rstd \\cdot \\frac{dgamma}{n} \\qquad offset = scale \\cdot \\frac{dbeta}{n}

(``slope`` and ``offset`` are zero for constant statistics), and both gradients apply them to what they load. Before the
convolution stands :math:`z = act(scale_c x + shift_c)`:

.. math::
    dz_{n,c,p} = \\sum_{k,t} w_{k,c,t} \\; dy_{n,k,q(p,t)} + addend \\qquad
    dx = act'(\\cdot)\\, dz \\qquad sums = \\Big(\\sum dx, \\; \\sum dx \\cdot \\hat x\\Big)

    dW_{k,c,t} = \\sum_{n,q} dy_{n,k,q} \\; z_{n,c,\\,stride \\cdot q + dilation \\cdot t - padding}

So ``dx`` is to the norm before the convolution what ``g`` was to the one behind it, with the sums from which its rows
are made: a chain of convolutions is walked without a pass of its own for any norm or activation.

Shapes: ``g`` and ``y`` ``[N, K, P, Q]``, ``x`` ``[N, C, H, W]``, ``weight`` ``[K, C / groups, R, S]``, of one dtype,
channels_last or channel slices of it; ``grad_rows`` and ``norm`` ``[4, K]`` and ``[4, C]``. Without ``grad_rows``,
``dy`` is ``g`` and ``y`` is not read. ``dy`` and ``z`` are rounded to the dtype of ``x``; sums are in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .activations import IDENTITY
from .conv import groups_of
from .conv_fused import pending_value
from .join import BY_CODE, join_argument
from .join_backward import JOIN_BACKWARD_REDUCE
from .registry import declare

__all__ = ["BN_GRAD_ROWS", "CONV_FUSED_DGRAD", "CONV_FUSED_WGRAD"]

_GEOMETRY = "int[] stride, int[] padding, int[] dilation"


# ---------------------------------------------------------------------------------------------------------------------
# The rows of a norm's input gradient
# ---------------------------------------------------------------------------------------------------------------------


def _rows_reference(norm: Tensor, sums: Tensor | None, count: float) -> Tensor:
    mean, rstd, scale, _ = norm.unbind(0)
    if sums is None:
        zero = torch.zeros_like(scale)
        return torch.stack((scale, zero, mean, zero))
    return torch.stack((scale, scale * rstd * (sums[1] / count), mean, scale * (sums[0] / count)))


def _rows_fake(norm: Tensor, sums: Tensor | None, count: float) -> Tensor:
    return torch.empty_like(norm)


BN_GRAD_ROWS = declare(
    "bn_grad_rows",
    "(Tensor norm, Tensor? sums, float count) -> Tensor",
    reference=_rows_reference,
    fake=_rows_fake,
    kernels=("cuda", "triton"),
)
"""The rows ``(scale, slope, mean, offset)``, ``[4, K]``, from those of :mod:`fusedres.ops.bn_norm` and the totals of
``g`` and ``g * yhat`` over ``count`` values (``[2, K]`` or more rows); ``sums=None`` for constant statistics."""


def _output_gradient(g: Tensor, y: Tensor | None, grad_rows: Tensor | None) -> Tensor:
    if grad_rows is None:
        return g
    if y is None:
        raise ValueError("y must be given with grad_rows")
    scale, slope, mean, offset = (row[:, None, None] for row in grad_rows.unbind(0))
    wide = grad_rows.dtype
    return (scale * g.to(wide) - slope * (y.to(wide) - mean) - offset).to(g.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# dgrad
# ---------------------------------------------------------------------------------------------------------------------


def _dgrad_reference(
    g: Tensor,
    y: Tensor | None,
    grad_rows: Tensor | None,
    weight: Tensor,
    x: Tensor,
    norm: Tensor | None,
    act: int,
    act_param: float,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    addend: Tensor | None = None,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    dy = _output_gradient(g, y, grad_rows)
    geometry = (stride, padding, dilation, False, [0, 0], groups_of(x, weight))
    wide = torch.promote_types(x.dtype, torch.float32)
    dz, _, _ = torch.ops.aten.convolution_backward(
        dy.to(wide), x.to(wide), weight.to(wide), None, *geometry, (True, False, False)
    )
    if addend is not None:
        dz = dz + addend
    slope = BY_CODE[act].derivative(join_argument(x, norm, None, None), act_param)
    dx = torch.where(slope == 0, 0.0, dz * slope).to(x.dtype)
    dx = torch.empty_like(x, memory_format=torch.channels_last).copy_(dx)
    sums = x.new_empty(0)
    if norm is not None:
        sums = JOIN_BACKWARD_REDUCE.reference(dx, x, norm, None, None, _IDENTITY, 0.0, False)[0][:2].clone()
    if into is None:
        return dx, sums
    into.copy_(dx)
    return x.new_empty(0), sums


_IDENTITY = IDENTITY.code


def _dgrad_fake(
    g: Tensor,
    y: Tensor | None,
    grad_rows: Tensor | None,
    weight: Tensor,
    x: Tensor,
    norm: Tensor | None,
    act: int,
    act_param: float,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    addend: Tensor | None = None,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    dx = x.new_empty(0) if into is not None else torch.empty_like(x, memory_format=torch.channels_last)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return dx, x.new_empty(0) if norm is None else x.new_empty((2, x.shape[1]), dtype=dtype)


CONV_FUSED_DGRAD = declare(
    "conv_fused_dgrad",
    "(Tensor g, Tensor? y, Tensor? grad_rows, Tensor weight, Tensor x, Tensor? norm, int act, float act_param, "
    f"{_GEOMETRY}, Tensor? addend=None, Tensor(a!)? into=None) -> (Tensor, Tensor)",
    reference=_dgrad_reference,
    fake=_dgrad_fake,
    kernels=("cpu", "cuda", "triton"),
)
"""``(dx, sums)``: ``dx`` channels_last, or empty where it is written to ``into``, which may be the addend itself;
``sums`` is ``[2, C]``, or empty without a norm. ``addend`` is a gradient that reaches ``z`` another way, such as the
skip's."""


# ---------------------------------------------------------------------------------------------------------------------
# wgrad
# ---------------------------------------------------------------------------------------------------------------------


def _wgrad_reference(
    g: Tensor,
    y: Tensor | None,
    grad_rows: Tensor | None,
    x: Tensor,
    norm: Tensor | None,
    act: int,
    act_param: float,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    out: Tensor,
) -> None:
    dy = _output_gradient(g, y, grad_rows)
    z = pending_value(x, norm, act, act_param)
    geometry = (stride, padding, dilation, False, [0, 0], groups_of(x, out))
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = torch.empty_like(out, dtype=wide)
    _, dweight, _ = torch.ops.aten.convolution_backward(
        dy.to(wide), z.to(wide), weight, None, *geometry, (False, True, False)
    )
    out.copy_(dweight)


def _wgrad_fake(
    g: Tensor,
    y: Tensor | None,
    grad_rows: Tensor | None,
    x: Tensor,
    norm: Tensor | None,
    act: int,
    act_param: float,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    out: Tensor,
) -> None:
    return None


CONV_FUSED_WGRAD = declare(
    "conv_fused_wgrad",
    "(Tensor g, Tensor? y, Tensor? grad_rows, Tensor x, Tensor? norm, int act, float act_param, "
    f"{_GEOMETRY}, Tensor(a!) out) -> ()",
    reference=_wgrad_reference,
    fake=_wgrad_fake,
    kernels=("cuda", "triton"),
)
"""Writes ``dW`` to ``out``, ``[K, C / groups, R, S]`` of any floating dtype: that of the parameter, where autocast made
the operands narrower."""
