"""A convolution with what surrounds it: the pending input's affine and activation before, statistics or a join behind.

With :math:`z = act(scale_c \\cdot x + shift_c)` the pending input's value (zero outside the image, as the convolution
pads) and :math:`conv` as in :mod:`fusedres.ops.conv`,

.. math:: y = conv(z, w) + b

In training (:data:`CONV_FUSED_FPROP`) the statistics of ``y``, as :mod:`fusedres.ops.bn_stats` has them, come with it.
In inference (:data:`CONV_FUSED_JOIN`) the join of :mod:`fusedres.ops.join` is applied to the accumulator:

.. math:: out = act_o(scale_k \\cdot y + shift_k + r) \\qquad r \\in \\{0,\\; residual,\\;
    res\\_scale_k \\cdot residual + res\\_shift_k\\}

``x`` is ``[N, C, H, W]`` or a channel slice of a channels_last buffer, ``weight`` ``[K, C / groups, R, S]`` of the same
dtype, which with ``x`` says how many groups there are; ``bias`` ``[K]`` in that dtype or float32; norms are ``[4, C]``
and ``[4, K]``. ``z`` is rounded to the dtype of ``x``, as a convolution of its own would read it; sums are in float32
and rounded once. Dense convolutions are the Triton backend's, grouped ones the CUDA backend's.

The idea is that of cuDNN's fused convolutions with batch-norm statistics (NVIDIA, "cuDNN: runtime fusion engines",
pattern ``scale-bias-relu-conv-genstats``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import env
from ..triton import tuning
from .bn_stats import BN_STATS
from .conv import ConvGeometry, groups_of, output_size
from .conv_winograd import winograd_unsuited
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
    y = torch.conv2d(value, weight, bias, stride, padding, dilation, groups_of(x, weight))
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
    kernels=("cpu", "cuda", "triton"),
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
    kernels=("cuda", "triton"),
)
"""``out``, channels_last, or empty where it is written to ``into``. ``residual`` has the shape and dtype of ``out``."""


# ---------------------------------------------------------------------------------------------------------------------
# Whether to call them
# ---------------------------------------------------------------------------------------------------------------------


def conv_fused_refuses(
    kind: str,
    backend: str,
    x: Tensor,
    weight: Tensor,
    g: ConvGeometry,
    *,
    prologue: bool,
    pending_addend: bool = False,
) -> str | None:
    """``None`` where ``backend`` runs this pass fused and is expected to beat the vendor's convolution, else why not.

    Dense convolutions on a GPU are Triton's: what was measured for this shape or one near it (:func:`fusedres.tune`)
    decides; without a measurement, 1x1 convolutions, which are matrix products, are fused, and larger kernels are left
    to the vendor. Grouped ones are CUDA's, up to 64 channels per group: vendors compute them at a small part of their
    peak. On a CPU, see :func:`fusedres.ops.conv_winograd.winograd_unsuited`: there the arithmetic wins, also with
    nothing to fuse.

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
    if backend == "cpu":
        return _cpu_unsuited(kind, x, weight, g)
    if g.groups != 1:  # the Triton backend hands them to CUDA's kernels, where there are any
        if backend == "triton" and (missing := env.cuda_missing()) is not None:
            return f"grouped ones are the CUDA kernels', but {missing}"
        return _memory_unsuited(x, weight) or _grouped_unsuited(kind, x, weight, g)
    if backend == "cuda":
        return "the CUDA backend's fused convolutions are grouped ones, this one is dense"
    reason = conv_fused_unsuited(kind, x, weight, g, pending_addend)
    if reason is not None:
        return reason
    filters, _, *kernel = weight.shape
    problem = tuning.pose(kind, x.dtype, x.shape, filters, kernel, g, prologue)
    measured = tuning.vendor_is_faster(problem, x.device)
    if measured:
        return f"the vendor's {kind} was measured faster for this shape"
    if measured is None and kernel != [1, 1]:
        return f"no measurement says that {kernel[0]}x{kernel[1]} {kind} beats the vendor's: see fusedres.tune"
    return None


def _cpu_unsuited(kind: str, x: Tensor, weight: Tensor, g: ConvGeometry) -> str | None:
    if kind == "wgrad":
        return "the CPU's weight gradient is conv_wgrad"
    if not x.is_contiguous(memory_format=torch.channels_last):
        return "x is not channels_last"
    if kind == "dgrad" and max(g.padding) > 2:
        return f"dgrad takes padding up to 2, this is {g.padding}"
    return winograd_unsuited(x, weight, g)


def _memory_unsuited(x: Tensor, weight: Tensor) -> str | None:
    if x.dtype != weight.dtype:
        return f"x is {x.dtype}, the weight {weight.dtype}"
    if not x.is_contiguous(memory_format=torch.channels_last) and x.stride(1) != 1:
        return "x is not channels_last"
    if x.shape[1] % 8 or weight.shape[0] % 8:
        return f"{x.shape[1]} and {weight.shape[0]} channels do not divide into loads of 16 bytes"
    return None


def conv_fused_unsuited(
    kind: str, x: Tensor, weight: Tensor, g: ConvGeometry, pending_addend: bool = False
) -> str | None:
    """``None`` where the dense kernels take these operands, else why not; arguments of :func:`conv_fused_refuses`."""
    if g.groups != 1:
        return f"a dense kernel has no groups, this convolution has {g.groups}"
    if (reason := _memory_unsuited(x, weight)) is not None:
        return reason
    pointwise = tuple(weight.shape[2:]) == (1, 1)
    if kind == "dgrad" and pointwise and any(g.padding):
        return "dgrad takes no padding around a 1x1 kernel"
    if kind == "dgrad" and g.stride != (1, 1):
        if not pointwise:
            return f"dgrad with stride {g.stride} needs a 1x1 kernel"
        if pending_addend:
            return f"dgrad with stride {g.stride} takes no addend where its input is pending"
    return _image_unsuited(x, weight, g)


_LARGEST_IMAGE = 2**30  # elements: offsets are 32 bits wide, and a tile may begin in one image and end in the next


def _image_unsuited(x: Tensor, weight: Tensor, g: ConvGeometry) -> str | None:
    """Where pixels are not rows of the product, the kernels count them from the beginning of an image."""
    kernel = tuple(weight.shape[2:])
    if kernel == g.stride == (1, 1) and not any(g.padding):
        return None
    size = tuple(x.shape[2:])
    pitch = max(x.shape[1], x.stride(3) if size[1] > 1 else 0)
    p, q = output_size(size, kernel, g)
    elements = max(size[0] * size[1] * pitch, p * q * weight.shape[0])
    if elements > _LARGEST_IMAGE:
        return f"an image of {elements} elements is too large for offsets of 32 bits"
    return None


# Channels of a group above which a grouped convolution is a few dense ones, and what the CUDA kernels hold at once.
_MOST_PER_GROUP = 64
_MOST_TAPS = 64
_MOST_PHASES = 16  # of a stride: what a pixel of dgrad's result may be to it
_PATCH_BYTES = 2**15  # of what one pixel of the result reads
_FLOAT_SHARED = 2**17  # of shared memory that dgrad in float32 needs


def _grouped_unsuited(kind: str, x: Tensor, weight: Tensor, g: ConvGeometry) -> str | None:
    """The grouped kernels of ``csrc/cuda``."""
    (filters, inside, *kernel), size = weight.shape, x.element_size()
    outside = filters // g.groups
    if (inside, outside) not in ((1, 1), (4, 4)) and (inside % 8 or outside % 8):
        return f"groups of {inside} to {outside} channels are neither depthwise, nor 4 to 4, nor multiples of 8"
    if max(inside, outside) > _MOST_PER_GROUP:
        return f"groups of {inside} to {outside} channels are wide enough for the vendor's dense kernels"
    if kernel[0] * kernel[1] > _MOST_TAPS or g.stride[0] * g.stride[1] > _MOST_PHASES:
        return f"a {kernel[0]}x{kernel[1]} kernel with stride {g.stride} has too many taps"
    reach = [d * (k - 1) + 1 for d, k in zip(g.dilation, kernel)]
    if reach[0] * reach[1] * (max(inside, outside, 8) * size + 16) > _PATCH_BYTES:
        return f"a kernel that reaches over {reach[0]}x{reach[1]} pixels does not fit into shared memory"
    sliced = not x.is_contiguous(memory_format=torch.channels_last)
    if x.data_ptr() % 16 or (sliced and x.stride(3) * size % 16):
        return "x is a slice that does not begin at, or whose pixels do not lie apart, multiples of 16 bytes"
    if kind == "dgrad" and x.dtype == torch.float32 and x.is_cuda:
        shared = torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin
        if shared < _FLOAT_SHARED:
            return f"dgrad in float32 needs {_FLOAT_SHARED} bytes of shared memory, the device has {shared}"
    return None
