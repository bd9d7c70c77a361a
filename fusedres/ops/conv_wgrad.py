"""The weight gradient of a convolution whose input is still pending.

.. math:: dW_{k,c,t} = \\sum_{n,p} dy_{n,k,p} \\; z_{n,c,\\,stride \\cdot p + dilation \\cdot t - padding}
    \\qquad z = act(scale_c \\cdot x + shift_c)

``grad`` is ``[N, K, P, Q]``, ``x`` ``[N, C, H, W]``, both of one dtype and channels_last; ``norm`` is the ``[4, C]``
tensor of :mod:`fusedres.ops.bn_norm`, or ``None`` for no norm. The result is written to ``out``, ``[K, C, R, S]`` of
any floating dtype: that of the parameter, where autocast made the operands narrower. No groups. ``z`` is rounded to the
dtype of ``x``, as the forward's convolution read it; sums are in float32.

On a CPU these are outer products of pixels, or, of 3x3 taps of step one in float32, Winograd's minimal filtering (Lavin
and Gray 2016, section 4.1), transposed: ``dW = G^T [sum of (A dy A^T) * (B^T z B)] G`` over tiles of 2x2 results, 16
products where the definition has 36.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .conv import ConvGeometry
from .join import BY_CODE, join_argument
from .registry import declare

__all__ = ["CONV_WGRAD", "fuses_wgrad"]

_SCHEMA = (
    "(Tensor grad, Tensor x, Tensor? norm, int act, float act_param, int[] stride, int[] padding, int[] dilation, "
    "Tensor(a!) out) -> ()"
)

# Channels below which part of a tile of the kernel would be padding.
_FEWEST_CHANNELS = 32

# Pixels of a result above which the vendor's weight gradient of a bfloat16 convolution with several taps is ahead, by
# about what it costs to give it the applied value.
_MOST_PIXELS = 100


def _reference(
    grad: Tensor,
    x: Tensor,
    norm: Tensor | None,
    act: int,
    act_param: float,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    out: Tensor,
) -> None:
    z = BY_CODE[act].forward(join_argument(x, norm, None, None), act_param).to(x.dtype)
    weight = torch.empty_like(out, dtype=x.dtype)
    _, dweight, _ = torch.ops.aten.convolution_backward(
        grad, z, weight, None, stride, padding, dilation, False, [0, 0], 1, (False, True, False)
    )
    out.copy_(dweight)


def _fake(
    grad: Tensor,
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


CONV_WGRAD = declare("conv_wgrad", _SCHEMA, reference=_reference, fake=_fake, kernels=("cpu",))


def fuses_wgrad(backend: str, x: Tensor, grad: Tensor, weight: Tensor, g: ConvGeometry) -> bool:
    """Whether the backend's kernel takes these operands and is expected to beat the vendor's weight gradient."""
    return (
        backend == "cpu"
        and g.groups == 1
        and min(weight.shape[0], weight.shape[1]) >= _FEWEST_CHANNELS
        and x.dtype == grad.dtype
        and _instructions_suit(x.dtype)
        and (x.dtype != torch.bfloat16 or weight.shape[2:] == (1, 1) or grad.shape[2] * grad.shape[3] <= _MOST_PIXELS)
        and x.is_contiguous(memory_format=torch.channels_last)
        and grad.is_contiguous(memory_format=torch.channels_last)
    )


@cache
def _instructions_suit(dtype: torch.dtype) -> bool:
    """float32 needs AVX-512; bfloat16 its dot products, and no AMX, with which the vendor's kernels are ahead."""
    isa = torch.ops.fusedres.cpu_isa()
    if dtype == torch.bfloat16:
        return isa == "avx512bf16" and not torch.cpu._is_amx_tile_supported()
    return dtype == torch.float32 and isa in ("avx512", "avx512bf16")
