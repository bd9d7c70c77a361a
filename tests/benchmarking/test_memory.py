"""Bytes saved for backward, counted by storage, and bytes allocated at the peak."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from fusedres import models
from fusedres.benchmarking import saved_bytes
from fusedres.benchmarking.memory import peak_allocated, silent_errors
from fusedres.patch import patch


def test_a_linear_layer_keeps_its_input_and_not_its_weight():
    model, x = nn.Linear(8, 4), torch.randn(16, 8)
    assert saved_bytes(model, lambda: model(x)) == x.nbytes


def test_views_of_one_storage_count_once():
    x = torch.randn(4, 4, requires_grad=True)
    assert saved_bytes(nn.Identity(), lambda: (x * x.t()).sum()) == x.nbytes


def test_nothing_without_gradients():
    x = torch.randn(4, 4)
    assert saved_bytes(nn.Identity(), lambda: x * x) == 0


def test_a_fused_network_keeps_less_and_least_with_low_memory():
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    kept = {}
    for memory in ("stock", "auto", "low"):
        model = models.resnet50(fused=False).to(memory_format=torch.channels_last)
        if memory != "stock":
            patch(model, memory=memory)
        kept[memory] = saved_bytes(model, lambda model=model: model(x))
    assert kept["low"] < kept["auto"] < kept["stock"]


def test_the_peak_is_what_is_alive_at_once():
    x = torch.ones(1000, 1000)

    def call() -> torch.Tensor:
        out = (x + 1) * 2  # two at once, then one
        out = out * 3
        return out.sum()

    call()
    found = peak_allocated(call)
    assert 2 * x.nbytes <= found < 2.1 * x.nbytes
    assert peak_allocated(lambda: x.mul_(1)) < 1000


def test_the_profiler_s_messages_are_not_seen(capfd):
    with silent_errors():
        os.write(2, b"unseen")
    os.write(2, b"seen")
    assert capfd.readouterr().err == "seen"
    with pytest.raises(KeyError), silent_errors():
        raise KeyError
    os.write(2, b"again")
    assert capfd.readouterr().err == "again"
