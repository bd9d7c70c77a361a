"""Inference: batch norm, residual and activation inside the convolution.

.. math:: out = act\\big(scale_k \\cdot conv(x, w)_k + shift_k + r\\big)

With constant statistics the norm is an affine per output channel, folded into the weights,
:math:`w'_k = scale_k w_k` and :math:`b'_k = scale_k b_k + shift_k`, in float32 and rounded once. oneDNN then adds the
residual and applies the activation on the accumulator, from weights that were packed into its own layout beforehand;
3x3 convolutions in float32 run by minimal filtering where that is faster (:mod:`fusedres.ops.conv_winograd`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .activations import IDENTITY, RELU, Activation
from .conv import ConvGeometry, conv_fprop, onednn_refuses
from .conv_winograd import CONV_WINOGRAD, CONV_WINOGRAD_PACK, winograd_unsuited
from .layout import like

__all__ = ["FoldedConv", "fold"]

# How oneDNN's epilogue calls our activations: attribute, scalars, algorithm.
_ONEDNN_UNARY: dict[str, Callable[[float], tuple[str, list[float], str]]] = {
    "identity": lambda _: ("none", [], ""),
    "relu": lambda _: ("relu", [], ""),
    "relu6": lambda _: ("hardtanh", [0.0, 6.0], ""),
    "leaky_relu": lambda slope: ("leaky_relu", [slope], ""),
    "silu": lambda _: ("swish", [], ""),
    "hardswish": lambda _: ("hardswish", [], ""),
    "gelu": lambda _: ("gelu", [], "none"),
}


class FoldedConv(NamedTuple):
    """A convolution with its norm folded in, ready to run.

    Attributes:
        weight: ``[K, C / groups, R, S]``, the norm's scale included, or that packed for what runs it.
        bias: ``[K]``, the norm's shift included.
        filters: ``K``.
        runs: ``"stock"``; or, for channels_last inputs only, ``"onednn"``'s fused convolution or ``"winograd"``.
    """

    weight: Tensor
    bias: Tensor | None
    geometry: ConvGeometry
    filters: int
    runs: str

    def __call__(self, x: Tensor, residual: Tensor | None, act: Activation, join: Callable[..., Tensor]) -> Tensor:
        """``act(conv(x) + residual)``; ``join`` applies what the convolution cannot take into its epilogue."""
        if self.runs == "winograd":
            operands = (x, self.weight, self.filters, self.bias, residual, act.code, act.param)
            return CONV_WINOGRAD.overload("cpu")(*operands, self.geometry.padding)
        if self.runs == "stock":
            y = conv_fprop(x, self.weight, self.bias, self.geometry)
            if residual is None:
                return y if act == IDENTITY else join(y, None, None, None, act.code, act.param)
            # With one channel or one pixel the input's layout does not tell the result's.
            return join(y, None, like(residual, y), None, act.code, act.param)
        g = self.geometry
        shape = (g.padding, g.stride, g.dilation, g.groups)
        if residual is None:
            unary = _ONEDNN_UNARY[act.name](act.param)
            return torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, *shape, *unary)
        bias = None if self.bias is None else self.bias.to(x.dtype)  # the form with a sum takes no other
        # The only activation behind the sum. With groups PyTorch adds by itself, with an activation in float32 alone.
        relu = "relu" if act == RELU and (g.groups == 1 or x.dtype == torch.float32) else None
        out = torch.ops.mkldnn._convolution_pointwise.binary(
            x, residual, self.weight, bias, *shape, "add", 1.0, relu, [], ""
        )
        return out if relu is not None or act == IDENTITY else join(out, None, None, None, act.code, act.param)


def fold(weight: Tensor, bias: Tensor | None, norm: Tensor | None, g: ConvGeometry, x: Tensor) -> FoldedConv:
    """Folds the rows of a norm (:mod:`fusedres.ops.bn_norm`) into a convolution, and packs it where oneDNN runs it.

    Args:
        x: an input to expect: its dtype is that of the folded convolution, its layout decides whether oneDNN's fused
            form can run it, and its shape is a hint for the packed layout. Other shapes work too.
    """
    if norm is not None:
        scale, shift = norm[2], norm[3]
        bias = shift if bias is None else shift + scale * bias
        weight = weight * scale[:, None, None, None]
    folded = _rounded(weight.detach(), x.dtype)
    packs = x.is_contiguous(memory_format=torch.channels_last) and onednn_refuses(x.device.type, x.dtype) is None
    # oneDNN's ReLU turns NaN into 0: weights that make NaN are for the stock convolution.
    packs = packs and bool(torch.isfinite(folded).all()) and (bias is None or bool(torch.isfinite(bias).all()))
    filters = weight.shape[0]
    if not packs:
        return FoldedConv(folded, None if bias is None else bias.detach().to(x.dtype), g, filters, "stock")
    # What packs adds the bias to the accumulator, so it keeps all of float32.
    bias = None if bias is None else bias.detach().float()
    if winograd_unsuited(x, folded, g) is None:
        return FoldedConv(CONV_WINOGRAD_PACK.overload("cpu")(folded), bias, g, filters, "winograd")
    packed = torch._C._nn.mkldnn_reorder_conv2d_weight(
        folded.to_mkldnn(), g.padding, g.stride, g.dilation, g.groups, list(x.shape)
    )
    return FoldedConv(packed, bias, g, filters, "onednn")


def _rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    r"""``weight``, ``[K, C, R, S]``, in ``dtype``; where that is narrower, with the sum of every filter kept.

    .. math:: \Big| \sum_{crs} (q - w)_{kcrs} \Big| \le \text{half of the last weight's gap}, \qquad
        q_{kcrs} \text{ one of the two values next to } w_{kcrs}

    To the nearest, the errors of a filter have a sum, by which its channel is shifted in proportion to the mean of its
    inputs, and behind a ReLU there is one. No pooling averages that out, as it does what stock PyTorch rounds: each
    result for itself. So the weights nearest to the middle between two values, as many as it takes, go to the other.
    """
    nearest = weight.to(dtype)
    if nearest.dtype.itemsize >= weight.dtype.itemsize:
        return nearest
    exact, values = weight.flatten(1), nearest.flatten(1)
    error = values.to(exact.dtype) - exact
    excess = error.sum(1, keepdim=True)
    other = torch.nextafter(values, torch.copysign(torch.full_like(error, torch.inf), -error).to(dtype))
    gap = (other.to(exact.dtype) - values.to(exact.dtype)).abs()
    able = (error.sign() == excess.sign()) & gap.isfinite() & (gap > 0)
    cost = torch.where(able, 1 - 2 * error.abs() / gap, torch.inf)  # 0 in the middle, 1 on the nearest value
    most = min(exact.shape[1], 16 + int(2 * exact.shape[1] ** 0.5))  # errors are independent: it hardly takes more
    cost, chosen = cost.topk(most, 1, largest=False)
    moved = torch.where(cost.isfinite(), gap.gather(1, chosen), 0)
    flips = cost.isfinite() & (moved.cumsum(1) - moved / 2 <= excess.abs())
    made = torch.where(flips, other.gather(1, chosen), values.gather(1, chosen))
    return torch.empty_like(nearest).copy_(values.scatter(1, chosen, made).view(nearest.shape))
