"""Devices and this machine."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fusedres.analysis import DEVICES, devices


def test_the_table():
    assert set(DEVICES) == {"H100", "H200", "A100", "RTX4090"}
    for device in DEVICES.values():
        assert device.peak(torch.float16) == device.peak(torch.bfloat16) == 2 * device.peak(torch.float32)
        # A balance far above one operation per byte, or a number is off by a power of ten.
        assert 50 < device.peak(torch.bfloat16) / device.bandwidth < 500


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_this_machine_is_measured(monkeypatch, dtype):
    monkeypatch.setattr(devices, "_COPIED", 2**22)
    monkeypatch.setattr(devices, "_SIDE", 128)
    device = devices.device_named("cpu", dtype)
    assert 1e7 < device.bandwidth < 1e13
    assert 1e7 < device.peak(dtype) < 1e15
    assert "this CPU" in device.name


def test_the_peak_is_of_the_fastest_product(monkeypatch):
    """Matrix products are not it everywhere: in float32 stock convolutions are twice as fast on some machines."""
    counted = []

    def fastest(call):
        with FlopCounterMode(display=False) as counter:
            call()
        counted.append({str(op): flops for op, flops in counter.get_flop_counts().get("Global", {}).items()})
        return 1e-3 if "aten.convolution" in counted[-1] else 1.0  # a slow library of matrix products

    monkeypatch.setattr(devices, "_fastest", fastest)
    monkeypatch.setattr(devices, "_SIDE", 128)
    device = devices.measured_cpu(torch.float32)
    convolutions = [flops["aten.convolution"] for flops in counted if "aten.convolution" in flops]
    assert device.peak(torch.float32) == pytest.approx(max(convolutions) / 1e-3)
    assert {"aten.mm": 2 * 128**3} in counted and len(convolutions) == len(devices._CONVOLUTIONS)
    assert {kernel for *_, kernel in devices._CONVOLUTIONS} == {1, 3}


def test_unknown_names():
    with pytest.raises(ValueError, match="got 'P100'"):
        devices.device_named("P100", torch.float32)
