"""Timing on a GPU: a graph of many calls, so that neither Python nor the launches are what is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["DEVICE", "graphed", "on_device", "repeats"]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def repeats() -> int:
    """Calls in a graph; without a GPU there is none, and a smoke test runs a call once."""
    return 20 if DEVICE == "cuda" else 1


def on_device(t: Tensor) -> Tensor:
    """``t`` where the measurement runs, with its strides."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=DEVICE).copy_(t)


def graphed(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """A function that replays a CUDA graph of :func:`repeats` calls, of these in turn, and waits for it."""
    if DEVICE == "cpu":
        return calls[0]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(repeats()):
            calls[i % len(calls)]()

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replay
