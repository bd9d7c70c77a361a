"""A convolution in inference with its norm, a residual and ReLU in the epilogue, on Hopper's tensor cores.

.. math:: out = \\max(scale_k \\cdot conv(x, w)_k + bias_k + residual,\\; 0)

``x`` is ``[N, C, H, W]``, ``weight`` ``[K, C, R, S]`` and ``residual`` ``[N, K, P, Q]``, or absent; all are bfloat16 or
float16 and dense in channels_last. ``scale`` and ``bias`` are ``[K]`` in float32: rows two and three of the norm behind
the convolution (:mod:`fusedres.ops.bn_norm`), so that no weight is folded. Sums are in float32 and rounded once.

The kernel is CUTLASS's implicit GEMM for sm_90a, which a build has only where it was asked for
(``FUSEDRES_CUTLASS=1``); :func:`conv_epilogue_refuses` says whether it runs. ``tile`` is its tile of output pixels and
channels: 0, 1, 2 for 64 x 64, 128 x 64, 128 x 128, or -1 for what the size suggests. Nothing chooses this op yet, for
its speed has not been measured: ``pytest bench/ops/test_conv_epilogue.py`` on an H100 does that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import env
from .bn_stats import statistics_dtype
from .conv import ConvGeometry, output_size
from .registry import declare

__all__ = ["CONV_EPILOGUE", "conv_epilogue_refuses"]


def conv_epilogue_refuses(x: Tensor, weight: Tensor) -> str | None:
    """``None`` where CUTLASS's kernel runs this convolution, else why it does not."""
    if reason := env.cutlass_missing():
        return reason
    if x.device.type != "cuda":
        return f"the tensor is on {x.device.type}"
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"CUTLASS's kernels take bfloat16 and float16, not {x.dtype}"
    if weight.shape[0] % 8 or weight.shape[1] % 8:
        return f"channels must be multiples of 8, not {weight.shape[1]} and {weight.shape[0]}"
    if weight.shape[1] != x.shape[1]:
        return "CUTLASS's kernels have no groups"
    return None


def _reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    tile: int = -1,
) -> Tensor:
    wide = statistics_dtype(x.dtype)
    y = torch.conv2d(x.to(wide), weight.to(wide), None, stride, padding, dilation)
    y = scale[:, None, None] * y + bias[:, None, None]
    y = torch.relu(y if residual is None else y + residual.to(wide))
    return y.to(x.dtype).contiguous(memory_format=torch.channels_last)


def _fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    tile: int = -1,
) -> Tensor:
    g = ConvGeometry(tuple(stride), tuple(padding), tuple(dilation), 1)
    size = output_size((x.shape[2], x.shape[3]), (weight.shape[2], weight.shape[3]), g)
    shape = (x.shape[0], weight.shape[0], *size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


CONV_EPILOGUE = declare(
    "conv_epilogue",
    "(Tensor x, Tensor weight, Tensor scale, Tensor bias, Tensor? residual, int[] stride, int[] padding, "
    "int[] dilation, int tile=-1) -> Tensor",
    reference=_reference,
    fake=_fake,
    kernels=("cutlass",),
)
