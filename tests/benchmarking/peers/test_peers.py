"""Every peer that is installed gives stock PyTorch's numbers; every other says what is missing."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from fusedres import models
from fusedres.benchmarking.agreement import verdict
from fusedres.benchmarking.contest import contest
from fusedres.benchmarking.peers import BASELINE, OURS, PEERS, Peer, peers_named
from fusedres.benchmarking.peers.apex import Apex
from fusedres.benchmarking.peers.base import not_installed
from fusedres.benchmarking.peers.onnxruntime import OnnxRuntime
from fusedres.benchmarking.peers.tensorrt import TensorRT
from fusedres.benchmarking.peers.torchdiffeq import Torchdiffeq
from fusedres.benchmarking.referee import Referee
from fusedres.benchmarking.workloads import (
    INFERENCE_BF16,
    INFERENCE_FP32,
    TRAIN_BF16,
    TRAIN_FP32,
    Batch,
    Workload,
    settle,
)
from fusedres.nn import ODEBlock
from fusedres.testing import channels_last

CPU = torch.device("cpu")
WORKLOADS = (INFERENCE_FP32, INFERENCE_BF16, TRAIN_FP32)
TRAIN_FP16 = Workload("train step, fp16 autocast", training=True, autocast=torch.float16)


class Tiny(nn.Module):
    """One block and a classifier: small enough for every compiler."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.bn(self.conv(x))).mean((2, 3)))


def tiny() -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    model = Tiny().to(memory_format=torch.channels_last)
    # A small plane: over 144 pixels, Inductor's sums have twice the error that stock's have on two threads.
    batch = Batch.random(8, 5, num_classes=10)
    settle(model, batch.images)
    return model, batch


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_an_installed_peer_gives_the_stock_numbers(peer, workload):
    if reason := peer.refuses(workload, CPU):
        pytest.skip(reason)
    model, batch = tiny()
    batch, stock = batch.to(workload.dtype), workload.prepared(model)
    referee = Referee(stock, batch.shifted, autocast=workload.autocast, backward=workload.training)
    twin = workload.prepared(model)
    torch.compiler.reset()
    call = peer.prepare(twin, batch.images)
    assert verdict(referee.judge(twin, call)) == "ok"
    with torch.no_grad():
        first, second = call(batch.images), call(batch.shifted(1))
    assert first.dtype == workload.dtype
    assert not torch.equal(first, second)  # the first result is not overwritten by the second


def test_a_missing_package_is_named(monkeypatch):
    assert not_installed("torch") is None
    assert not_installed("no_such_package", "no_such.module") == "no_such_package, no_such.module not installed"
    for peer in PEERS:
        assert peer.available() is None or "not installed" in peer.available()


@pytest.mark.parametrize(
    ("peer", "workload", "reason"),
    [
        (TensorRT(), INFERENCE_FP32, "runs on cuda only"),
        (TensorRT(), TRAIN_FP32, "inference only"),
        (Apex(), TRAIN_BF16, "its norms take float16 only"),
        (OnnxRuntime(), INFERENCE_BF16, "its convolutions do not take bfloat16"),
    ],
)
def test_what_a_peer_cannot_do_is_said(peer, workload, reason):
    assert peer.refuses(workload, CPU) == reason


def test_where_apex_could_run_it_says_first_that_it_is_not_installed(monkeypatch):
    gpu, absent = torch.device("cuda"), "apex.contrib.groupbn, bnp not installed"
    monkeypatch.setattr(Apex, "available", lambda self: absent)
    assert Apex().refuses(TRAIN_BF16, gpu) == Apex().refuses(TRAIN_FP16, gpu) == absent
    monkeypatch.setattr(Apex, "available", lambda self: None)
    assert Apex().refuses(TRAIN_BF16, gpu) == "its norms take float16 only"
    assert Apex().refuses(TRAIN_FP16, gpu) is None and Apex().refuses(INFERENCE_FP32, gpu) == "training only"


def test_peers_have_names_of_their_own():
    assert len({peer.name for peer in PEERS}) == len(PEERS)
    assert PEERS[:2] == (BASELINE, OURS)
    assert peers_named(["OpenVINO", "eager"])[1] is BASELINE
    with pytest.raises(ValueError, match="got 'magic'"):
        peers_named(["magic"])


# ---------------------------------------------------------------------------------------------------------------------
# In a contest
# ---------------------------------------------------------------------------------------------------------------------


class Broken(Peer):
    name = "broken"

    def prepare(self, model, example):
        raise RuntimeError("no such device\nand more")


class Doubling(Peer):
    name = "doubling"

    def prepare(self, model, example):
        return lambda x: 2 * model(x)


class Costly(Peer):
    name = "costly"
    seconds = (1e9, 1e9)

    def prepare(self, model, example):
        pytest.fail("there was no time for it")


def test_a_contest_tells_who_is_missing_and_who_is_wrong():
    from fusedres.benchmarking.budget import TimeBudget

    model, batch = tiny()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    peers = (BASELINE, OURS, Broken(), Doubling(), Costly(), TensorRT())
    finishes = contest("tiny", TRAIN_FP32, model, [batch], peers, turns=2, budget=TimeBudget.of(60), memory=True)
    found = {f.measurement.contestant: f.measurement for f in finishes}
    assert found["eager"].baseline and found["fusedres"].check == "ok" and found["fusedres"].speedup["eager"] > 0
    assert found["broken"].missing == "it failed: RuntimeError: no such device"
    assert found["doubling"].check.startswith("RED") and found["doubling"].seconds is None
    assert found["costly"].missing.startswith("no time: needs about")
    assert found["TensorRT"].missing == "inference only"
    assert set(found["eager"].speedup) == {"fusedres"}
    assert found["eager"].saved > 0 and found["eager"].peak > 0 and found["eager"].first_step > 0
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_our_own_failure_is_an_error(monkeypatch):
    model, batch = tiny()

    def fail(*args):
        raise RuntimeError("ours")

    monkeypatch.setattr(type(OURS), "prepare", fail)
    with pytest.raises(RuntimeError, match="ours"):
        contest("tiny", INFERENCE_FP32, model, [batch], turns=1)


# ---------------------------------------------------------------------------------------------------------------------
# What is not installed here, by its shape
# ---------------------------------------------------------------------------------------------------------------------


class GroupBatchNorm(nn.BatchNorm2d):
    """What ``apex.contrib.groupbn`` computes, in plain PyTorch: ``[N, H, W, C]`` in and out."""

    def __init__(self, channels: int, fuse_relu: bool) -> None:
        super().__init__(channels)
        assert fuse_relu

    def forward(self, x: torch.Tensor, z: torch.Tensor | None = None) -> torch.Tensor:
        assert x.is_contiguous() and (z is None or z.is_contiguous())
        out = super().forward(x.permute(0, 3, 1, 2))
        out = out if z is None else out + z.permute(0, 3, 1, 2)
        return torch.relu(out).permute(0, 2, 3, 1)


@pytest.fixture
def apex(monkeypatch):
    for name in ("apex", "apex.contrib", "apex.contrib.groupbn", "apex.contrib.groupbn.batch_norm"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["apex.contrib.groupbn.batch_norm"].BatchNorm2d_NHWC = GroupBatchNorm


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_apex_norms_stand_in_the_blocks(apex, name):
    torch.manual_seed(0)
    stock = getattr(models, name)(fused=False, num_classes=10).to(memory_format=torch.channels_last).train()
    twin = TRAIN_FP32.prepared(stock)
    referee = Referee(stock, lambda seed: channels_last((4, 3, 32, 32), seed=seed))
    assert verdict(referee.judge(twin, Apex().prepare(twin, channels_last((4, 3, 32, 32))))) == "ok"


def test_apex_declines_other_blocks(apex):
    with pytest.raises(ValueError, match="no post-activation blocks"):
        Apex().prepare(models.seresnet50(fused=False), channels_last((1, 3, 32, 32)))


def test_torchdiffeq_solves_what_the_block_solves():
    peer = Torchdiffeq()
    if reason := peer.available():
        pytest.skip(reason)
    torch.manual_seed(0)

    class Flow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, t, x):
            return torch.tanh(self.conv(x)) * t

    block = ODEBlock(Flow(), "rk4", step_size=0.25)
    x = channels_last((2, 4, 5, 5))
    torch.testing.assert_close(peer.prepare(block, x)(x), block(x))
    with pytest.raises(TypeError, match="takes an ODEBlock, got Conv2d"):
        peer.prepare(nn.Conv2d(1, 1, 1), x)
