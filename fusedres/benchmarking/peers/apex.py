"""Apex's batch norms for channels_last (``apex.contrib.groupbn``): norm, sum and ReLU in one kernel, in float16.

They stand in the post-activation blocks of ``fusedres.models``, where ``relu(norm(x))`` and
``relu(norm(x) + residual)`` become one module each. Other networks have no place for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...models.resnet import BasicBlock, Bottleneck
from ..workloads import Workload
from .base import Peer, not_installed

__all__ = ["Apex"]


class Apex(Peer):
    """Training in float16 autocast."""

    name = "apex.contrib"
    infers = False
    devices = ("cuda",)

    def available(self) -> str | None:
        return not_installed("apex.contrib.groupbn", "bnp")

    def refuses(self, workload: Workload, device: torch.device) -> str | None:
        reason = super().refuses(workload, device)
        # Where it could run, that it is not there goes before what it could not do if it were.
        if device.type in self.devices and reason:
            return reason
        return reason if workload.autocast == torch.float16 else "its norms take float16 only"

    def prepare(self, model: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
        from apex.contrib.groupbn.batch_norm import BatchNorm2d_NHWC

        blocks = [m for m in model.modules() if isinstance(m, BasicBlock | Bottleneck)]
        if not blocks or any(getattr(block, "se", None) is not None for block in blocks):
            raise ValueError("the network has no post-activation blocks, or others beside them")
        for block in blocks:
            _rewrite(block, BatchNorm2d_NHWC)
        return model


def _rewrite(block: BasicBlock | Bottleneck, make: Callable[..., nn.Module]) -> None:
    pairs = [(getattr(block, f"conv{i}"), getattr(block, f"bn{i}")) for i in (1, 2, 3) if hasattr(block, f"conv{i}")]
    norms = [_Norm(make, bn) for _, bn in pairs]
    downsample = block.downsample

    def forward(x: Tensor) -> Tensor:
        side = x if downsample is None else downsample(x)
        for (conv, _), norm in zip(pairs[:-1], norms):
            x = norm(conv(x))
        return norms[-1](pairs[-1][0](x), side)

    block.forward = forward


class _Norm:
    """``relu(bn(x) + side)`` by Apex's kernel, with the parameters and statistics of the stock norm.

    Apex wants ``[N, H, W, C]``, which is how channels_last lies in memory.
    """

    def __init__(self, make: Callable[..., Any], stock: nn.BatchNorm2d) -> None:
        self._stock = stock
        self._kernel = make(stock.num_features, fuse_relu=True).to(stock.weight.device).train(stock.training)
        self._kernel.eps, self._kernel.momentum = stock.eps, stock.momentum
        for name in ("weight", "bias", "running_mean", "running_var"):
            setattr(self._kernel, name, getattr(stock, name))

    def __call__(self, x: Tensor, side: Tensor | None = None) -> Tensor:
        if self._kernel.training:
            self._stock.num_batches_tracked.add_(1)
        nhwc = [None if t is None else t.permute(0, 2, 3, 1).contiguous() for t in (x, side)]
        return self._kernel(*nhwc).permute(0, 3, 1, 2)
