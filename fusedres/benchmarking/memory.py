"""Bytes of a step: those that autograd keeps between forward and backward, and those allocated at the peak."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

__all__ = ["peak_allocated", "saved_bytes", "silent_errors"]


def saved_bytes(model: nn.Module, forward: Callable[[], Any]) -> int:
    """How many bytes ``forward()`` keeps for the backward pass, the parameters and buffers of ``model`` not counted.

    They are counted by storage, which is exact and repeatable: one that is saved several times, or through several
    views, counts once.
    """
    ours = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor  # holds the storage, so that no other takes its address

    with torch.enable_grad(), saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return sum(kept.values())


def peak_allocated(call: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """How many bytes ``call()`` has allocated for tensors at its peak, beyond those that were there before.

    From PyTorch's allocators; what a library takes from the system itself is not in it.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with silent_errors(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextmanager
def silent_errors() -> Iterator[None]:
    """Inside, nothing reaches standard error, on which PyTorch's profiler tells of every start and stop."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
