"""What is timed of networks that give no logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fusedres.zoo.timings import WithLogits


class _Gives(nn.Module):
    def __init__(self, what) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor):
        return self.what(x)


@pytest.mark.parametrize(
    ("gives", "shape"),
    [
        (lambda x: x.mean((2, 3)), (2, 3)),
        (lambda x: x, (2, 3)),
        (lambda x: x[:, :1], (2, 20)),
        (lambda x: {"out": x, "aux": None}, (2, 3)),
        (lambda x: [(x[:, :1], None)], (2, 20)),
    ],
)
def test_every_output_is_made_logits_that_have_a_gradient(gives, shape):
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    logits = WithLogits(_Gives(gives))(x)
    assert logits.shape == shape
    nn.functional.cross_entropy(logits, torch.zeros(2, dtype=torch.long)).backward()
    assert x.grad.abs().sum() > 0
