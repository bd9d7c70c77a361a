"""The bytes that autograd keeps between forward and backward, counted by storage: exact and repeatable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["saved_bytes"]


def saved_bytes(model: nn.Module, forward: Callable[[], Any]) -> int:
    """How many bytes ``forward()`` keeps for the backward pass, the parameters and buffers of ``model`` not counted.

    A storage that is saved several times, or through several views, counts once.
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
