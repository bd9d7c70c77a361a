"""Whole blocks on this backend, against stock PyTorch and float64; the convolutions inside are the fused kernels."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from described import DenseBlock, Described, Gate, conv, fuse, norm
from torch import nn

from fusedres.ops.registry import OPS
from fusedres.select import kernels
from fusedres.testing import channels_last, compare
from fusedres.triton import tuning

BLOCKS = {
    "basic": lambda: Described([conv(16, 16, 3, bias=True), norm(16), "relu", conv(16, 16, 3), norm(16)], []),
    "bottleneck": lambda: bottleneck([]),
    "bottleneck, low memory": lambda: bottleneck([], memory="low"),
    "bottleneck, projection": lambda: bottleneck([conv(16, 32, 1, 2), norm(32)], 32, 2),
    "plain projection": lambda: Described([conv(16, 24, 3, 2), norm(24)], [conv(16, 24, 1, 2, bias=True)]),
    "pre-activation": lambda: Described(
        [norm(16), "silu", conv(16, 24, 1, bias=True), norm(24), "relu", conv(24, 16, 3)], [], "identity"
    ),
    "pre-activation, shared": lambda: Described(
        [norm(16), "relu", conv(16, 8, 1), norm(8), "relu", conv(8, 24, 3, 2)],
        [conv(16, 24, 1, 2)],
        "identity",
        residual="pending",
    ),
    "squeeze-excitation": lambda: Described(
        [conv(16, 16, 1), norm(16), "relu", conv(16, 16, 3), norm(16), Gate(16, 4)], []
    ),
    "dropout": lambda: Described(
        [norm(16), "relu", conv(16, 16, 1), norm(16), "relu", nn.Dropout(0.3), conv(16, 16, 3)], [], "identity"
    ),
    "chain": lambda: Described([conv(16, 24, 3, 2), norm(24), "relu", conv(24, 16, 1, bias=True), norm(16), "silu"]),
    "dense": lambda: DenseBlock(2, 16, 8),
}


def bottleneck(shortcut, filters=16, stride=1, **options):
    branch = [conv(16, 8, 1), norm(8), "relu", conv(8, 8, 3, stride), norm(8), "relu", conv(8, filters, 1)]
    return Described([*branch, norm(filters)], shortcut, in_place=True, **options)


@pytest.fixture(params=["", "3x3 too"])
def measured(request, monkeypatch):
    """Without a measurement the vendor's 3x3 convolutions run; with one that says so, ours do."""
    if request.param:
        monkeypatch.setattr(tuning, "vendor_is_faster", lambda problem, device: False)


def check(device, name, mode, size=(8, 6), **options):
    block = BLOCKS[name]().train(mode == "train").to(device)
    block.options["backend"] = "triton"

    def draw(seed):
        return [channels_last((2, 16, *size), seed=seed).to(device)]

    compare(block, fuse, draw, backward=mode != "infer", **options).check()


@pytest.mark.parametrize("mode", ["train", "frozen", "infer"])
@pytest.mark.parametrize("name", BLOCKS)
def test_float32(device, measured, name, mode):
    check(device, name, mode)


@pytest.mark.parametrize("mode", ["train", "infer"])
@pytest.mark.parametrize("name", ["bottleneck, projection", "pre-activation", "dense"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes(device, name, mode, dtype):
    # Of few values, which side of a kink they fall on is luck: see tests/engine/test_blocks.py.
    check(device, name, mode, (20, 16) if dtype == torch.float16 and name == "dense" else (8, 6), dtype=dtype)


@pytest.mark.parametrize("name", ["bottleneck", "pre-activation"])
def test_autocast(device, name):
    check(device, name, "train", autocast=torch.bfloat16)


def test_a_bottleneck_runs_fused_kernels(device, monkeypatch):
    """As many as the engine's own tests count with the references."""
    monkeypatch.setattr(tuning, "vendor_is_faster", lambda problem, device: False)
    calls = Counter()
    found = kernels(torch.device(device).type, torch.float32, "triton")

    def counted(name):
        def call(*args):
            calls[name] += 1
            return OPS[name].overload("triton")(*args)

        return call

    fused = ("conv_fused_fprop", "conv_fused_dgrad", "conv_fused_wgrad")
    for name in fused:
        monkeypatch.setattr(found, name, counted(name))
    block = bottleneck([conv(16, 32, 1), norm(32)], 32).to(device)
    block.options["backend"] = "triton"
    fuse(block)
    block(channels_last((2, 16, 8, 6)).to(device).requires_grad_()).sum().backward()
    assert calls == dict.fromkeys(fused, 4)
