"""The comparison of a patched model with its stock twin where both draw random numbers, and draw the same."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fusedres.ops.dropout import draw_seed, keep_scale
from fusedres.patch import PatchReport, patch

from .blocks import assert_same, images, settled


def counter_dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """A dropout that drops what the engine drops for the same seed."""
    return x * keep_scale(x.shape, p, draw_seed(), x.dtype, x.device) if training and p else x


class _CounterDropout(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return counter_dropout(x, self.p, self.training)


def check_seeded(model: nn.Module, *inputs: Tensor) -> PatchReport:
    """As ``check_patched``, with the generator seeded before every call of the model."""
    settled(model).register_forward_pre_hook(_seed)
    stock = copy.deepcopy(model)
    for module in stock.modules():
        if type(module) is nn.Dropout and module.p:
            module.__class__ = _CounterDropout
    report = patch(model)
    assert_same(model, stock, *inputs or (images(),))
    return report


def _seed(*_: object) -> None:
    torch.manual_seed(3)
