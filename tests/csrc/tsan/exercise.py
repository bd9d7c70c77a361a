"""What ``run.py`` runs under ThreadSanitizer: every CPU kernel, from several threads at once.

``exercise.py fused``: eight threads infer with one model, and train copies of it on one input. ``exercise.py wgrad``:
eight threads compute one weight gradient. ``exercise.py planted LIBRARY``: a race.
"""

from __future__ import annotations

import copy
import ctypes
import faulthandler
import os
import sys
import threading
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fusedres
from fusedres import env
from fusedres.ops.registry import OPS
from fusedres.select import kernels

THREADS = 8


def at_once(body: Callable[[int], object]) -> None:
    """Calls ``body`` in all threads; whatever one raises, the process ends with."""
    barrier, failures = threading.Barrier(THREADS), []

    def run(number: int) -> None:
        barrier.wait()
        try:
            body(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


class Field(nn.Module):
    """The right-hand side of a differential equation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(self.conv(y))


def count_calls(called: set[str]) -> None:
    """From here on every kernel enters its name when it is called."""
    for dtype in (torch.float32, torch.bfloat16):
        chosen = kernels("cpu", dtype, "cpu")
        for name in OPS:
            setattr(chosen, name, partial(_enter, called, name, getattr(chosen, name)))


def _enter(called: set[str], name: str, kernel: Callable, *args: Any) -> Any:
    called.add(name)
    return kernel(*args)


def fused() -> None:
    assert env.library_missing() is None, env.library_missing()
    called: set[str] = set()
    count_calls(called)
    stem = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 1, 1))
    fusedres.patch(stem)
    net = nn.Sequential(
        stem,
        fusedres.nn.BottleneckBlock(16, 32, stride=2),
        fusedres.nn.PreActResidualBlock(32, 32),
        fusedres.nn.SEBlock(32, 32),
        fusedres.nn.DenseBottleneckBlock(2, 32, 16, dropout=0.2),
    ).to(memory_format=torch.channels_last)
    # Just enough elements for an op to take several threads itself.
    x = torch.randn(3, 16, 32, 32).contiguous(memory_format=torch.channels_last)
    plain = torch.randn(1, 8, 46, 46)
    rows, weight = torch.rand(4, 32), torch.empty(48, 32, 1, 1)
    wide, filters = (torch.randn(1, c, 23, 23).contiguous(memory_format=torch.channels_last) for c in (32, 48))

    def infer(_: int) -> None:
        with torch.no_grad(), fusedres.use_backend("cpu"):
            net(x)

    def train(number: int) -> None:
        own, skip = copy.deepcopy(net).train(), fusedres.nn.HighwaySkip(nn.Conv2d(8, 8, 1), 8)
        ode = fusedres.nn.ODEBlock(Field(8), method="dopri5", rtol=1e-1, atol=1e-1)
        layout = torch.channels_last if number % 2 else torch.contiguous_format
        dtype = torch.bfloat16 if number % 4 > 1 else torch.float32
        with fusedres.use_backend("cpu"), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            own(x.contiguous(memory_format=layout)).float().square().mean().backward()
            ode(skip(plain)).square().mean().backward()
        # Which sizes go this way depends on the instruction set.
        k, own_weight = kernels("cpu", torch.float32, "cpu"), torch.empty_like(weight)
        k.conv_wgrad(filters, wide, rows, 1, 0.0, [1, 1], [0, 0], [1, 1], own_weight)
        filter3x3(k, wide, rows)

    net.eval()
    at_once(infer)
    at_once(train)
    assert not (missing := {name for name, op in OPS.items() if "cpu" in op.kernels} - called), missing
    print("ran")


def filter3x3(k: Any, x: Tensor, rows: Tensor) -> None:
    """Minimal filtering: folded, forward, and both gradients."""
    channels = x.shape[1]
    weight, geometry = torch.randn(channels, channels, 3, 3), ([1, 1], [1, 1], [1, 1])
    k.conv_winograd(x, k.conv_winograd_pack(weight), channels, None, x, 1, 0.0, [1, 1])
    y, _ = k.conv_fused_fprop(x, rows, 1, 0.0, weight, None, *geometry, True)
    k.conv_fused_dgrad(y, y, rows, weight, x, rows, 1, 0.0, *geometry)
    k.conv_wgrad(y, x, rows, 1, 0.0, *geometry, torch.empty_like(weight))


def wgrad() -> None:
    """The first call is alone, so that all memory that a kernel keeps is there when the others come."""
    x, grad = (torch.randn(2, c, 12, 12).contiguous(memory_format=torch.channels_last) for c in (32, 48))
    k, geometry = kernels("cpu", torch.float32, "cpu"), ([1, 1], [0, 0], [1, 1])

    def compute(_: int) -> None:
        for _ in range(4):
            k.conv_wgrad(grad, x, None, 0, 0.0, *geometry, torch.empty(48, 32, 1, 1))

    compute(0)
    at_once(compute)
    print("ran")


def planted(library: str) -> None:
    race = ctypes.CDLL(library).planted_race
    at_once(lambda _: race())
    print("ran")


def main(name: str, *arguments: str) -> int:
    """The exit status."""
    # Whoever watches ends the process, with the stacks that it finds; these are Python's.
    faulthandler.dump_traceback_later(300)
    try:
        {"fused": fused, "wgrad": wgrad, "planted": planted}[name](*arguments)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    status = main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Without libtorch's end, in which the sanitizer has been seen to hang; and after an error, too, for a hang there
    # is not even watched: the interpreter's end takes faulthandler's watchdog away first.
    os._exit(status)
