"""Which convolutions a model poses, and that tuning says where it cannot run; measurements run in the cases."""

from __future__ import annotations

import itertools
import sys
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import fusedres
from fusedres import env, triton
from fusedres.ops.conv import ConvGeometry
from fusedres.ops.conv_fused import conv_fused_refuses
from fusedres.testing import channels_last, rms
from fusedres.triton import tuning
from fusedres.tune import convolutions, referee, tune

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
    expected = [(kind, size, pends) for size in (1, 1, 3) for kind, pends in both] + [
        ("dgrad", 1, False),
        ("dgrad", 1, True),
    ] * 2
    assert kinds == sorted(expected)  # a 3x3 dgrad with stride 2 is the vendor's
    assert len(convolutions(net, torch.randn(2, 8, 9, 9), backward=False)) == 6


@needs_triton
def test_a_patched_models_convolutions_are_found_whatever_runs_them():
    """On the reference backend a bottleneck's convolutions are ops of this package."""
    block, x = fusedres.nn.BottleneckBlock(16, 32), torch.randn(2, 16, 8, 8)
    expected = convolutions(block, x)
    assert len(expected) > 0
    with fusedres.use_backend("reference"), torch.no_grad():
        assert convolutions(block, x) == expected


@needs_triton
def test_what_the_engine_asks_for_is_measured_and_the_vendor_may_win(monkeypatch, tmp_path):
    """Every pass of a 1x1 convolution, with and without something pending, but a weight gradient of plain operands."""
    monkeypatch.setenv("FUSEDRES_CACHE", str(tmp_path))
    tuning._table.cache_clear(), tuning._looked_up.cache_clear()
    x, weight = channels_last((2, 16, 8, 8)), torch.randn(32, 16, 1, 1)
    g = ConvGeometry((1, 1), (0, 0), (1, 1), 1)
    lost = tuning.Entry(tuning.Tiles(64, 32, 32, 4, 2), 2.0, 1.0)
    tuning.record("cpu", {each.key: lost for each in convolutions(nn.Conv2d(16, 32, 1), x)})
    for kind, prologue in itertools.product(("fprop", "dgrad", "wgrad"), (True, False)):
        if (kind, prologue) != ("wgrad", False):
            reason = conv_fused_refuses(kind, "triton", x, weight, g, prologue=prologue)
            assert reason == f"the vendor's {kind} was measured faster for this shape"
    tuning._table.cache_clear(), tuning._looked_up.cache_clear()


@needs_triton
@pytest.mark.parametrize("unlike,right", [(0.0, True), (1e-5, False)])
def test_sums_of_many_terms_are_judged_by_the_vendors_error(unlike, right):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 20000, 64, generator=generator)
    exact = (a.double() * b.double()).sum(0)
    ours = torch.zeros(64)
    for x, y in zip(a, b):  # one after another, as a program adds
        ours += x * y
    vendor = torch.zeros(64)
    for x, y in zip(a.flip(0), b.flip(0)):
        vendor += x * y
    assert rms(ours - vendor) > 4 * torch.finfo(torch.float32).eps * rms(exact), "the two may differ by as much"
    judge = referee(plain(), lambda: vendor, lambda: exact)
    assert judge(ours * (1 + unlike)) == right


@needs_triton
@pytest.mark.parametrize("tf32", [False, True])
def test_tensor_cores_may_cut_operands_off_where_the_vendor_rounds(tf32):
    def rounded(t, add):
        return ((t.view(torch.int32) + add) & ~0x1FFF).view(torch.float32)

    a, b = torch.randn(2, 128, 128, generator=torch.Generator().manual_seed(0))
    exact, vendor, ours = (
        x.double() @ y.double() for x, y in ((a, b), *((rounded(a, n), rounded(b, n)) for n in (0x1000, 0)))
    )
    assert referee(plain(tf32), vendor.float, lambda: exact)(ours) == tf32
    assert not referee(plain(tf32), vendor.float, lambda: exact)(1.005 * ours)


def plain(tf32=False):
    return tuning.Problem(
        "fprop", torch.float32, (2, 8, 4, 4), 8, (1, 1), ConvGeometry((1, 1), (0, 0), (1, 1), 1), True, tf32
    )


def test_events_are_on_the_models_device(monkeypatch):
    """On a machine without a GPU: a tensor of the second one, and a device that notes when it is current."""
    current = []

    @contextmanager
    def device(which):
        current.append(which)
        yield
        current.pop()

    def observed(*_):
        seen.append(list(current))
        return {}

    seen = []
    module = sys.modules["fusedres.tune"]
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(module, "device_name", lambda which: "cpu")
    for name, found in (("untunable", None), ("why_not", "not here")):
        monkeypatch.setattr(module, name, lambda *_, found=found: found)
    monkeypatch.setattr(module, "blocks", observed)
    with FakeTensorMode():
        tune(model(), torch.empty(2, 8, 9, 9, device="cuda:1"))
    assert seen == [[torch.device("cuda:1")]]


@pytest.mark.skipif(env.triton_missing() is None, reason="the kernels run here")
def test_tuning_says_why_it_cannot_run():
    with pytest.raises(RuntimeError, match="tune: "):
        tune(model(), torch.randn(2, 8, 9, 9))


def test_nothing_is_measured_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="tune: a CUDA graph is being captured"):
        tune(model(), torch.randn(2, 8, 9, 9))
