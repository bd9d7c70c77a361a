"""Which convolutions a model poses, and that tuning says where it cannot run; measurements run in the cases."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fusedres
from fusedres import env, triton
from fusedres.tune import convolutions, tune

needs_triton = pytest.mark.skipif(triton.missing() is not None, reason=str(triton.missing()))


def model():
    return nn.Sequential(
        nn.Conv2d(8, 16, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.Conv2d(16, 16, 3, 2, 1),
        nn.Conv2d(16, 16, 3, groups=4, padding=1),
        nn.Conv2d(16, 16, 1),
        nn.Conv2d(16, 16, 1),
    )


@needs_triton
@pytest.mark.parametrize("patched", [False, True])
def test_every_dense_convolution_is_found_once_and_nothing_changes(patched):
    net = model()
    if patched:
        fusedres.patch(net)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found = convolutions(net, torch.randn(2, 8, 9, 9))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    kinds = sorted((p.kind, p.kernel_size[0], p.prologue) for p in found)
    both = [("fprop", False), ("fprop", True), ("wgrad", True)]
    expected = [(kind, size, pends) for size in (1, 1, 3) for kind, pends in both] + [("dgrad", 1, True)] * 2
    assert kinds == sorted(expected)  # a 3x3 dgrad with stride 2 is the vendor's
    assert len(convolutions(net, torch.randn(2, 8, 9, 9), backward=False)) == 6


@pytest.mark.skipif(env.triton_missing() is None, reason="the kernels run here")
def test_tuning_says_why_it_cannot_run():
    with pytest.raises(RuntimeError, match="tune: "):
        tune(model(), torch.randn(2, 8, 9, 9))


def test_nothing_is_measured_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="tune: a CUDA graph is being captured"):
        tune(model(), torch.randn(2, 8, 9, 9))
