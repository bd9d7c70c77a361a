"""What capture refuses, without a GPU; tests/cuda/test_capture.py has the rest."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fusedres.capture import Captured, capture


def test_what_is_not_on_a_gpu_is_named():
    with pytest.raises(ValueError, match=r"example\[0\] of shape \(2, 3\) is on cpu"):
        capture(nn.Linear(3, 3), torch.zeros(2, 3))
    with pytest.raises(TypeError, match=r"example\[0\] must be a tensor, got int"):
        capture(nn.Linear(3, 3), (1, torch.zeros(2, 3)))


class _Graph:
    def __init__(self):
        self.replays = 0

    def replay(self):
        self.replays += 1


def test_a_call_replays_with_its_arguments():
    graph, held, out = _Graph(), torch.zeros(2, 3), torch.ones(1)
    captured = Captured(graph, (held,), out)
    assert captured(torch.full((2, 3), 5.0)) is out
    assert graph.replays == 1 and (held == 5).all()
    with pytest.raises(TypeError, match="captured with 1 arguments, called with 2"):
        captured(held, held)
    with pytest.raises(ValueError, match=r"argument 0 of shape \(3, 2\)"):
        captured(torch.zeros(3, 2))
    assert graph.replays == 1
