"""``python -m tools.gpu.exercise DEVICE BACKEND``: every kernel of a backend once, on small odd shapes.

What compute-sanitizer watches: it slows a program down a hundredfold, so that one of each must do.
``--kernels`` prints the names of the kernels instead, for its filter.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module

import torch
from torch import nn

from fusedres import nn as blocks
from fusedres import select, triton
from fusedres.benchmarking import grid
from fusedres.patch import patch

__all__ = ["exercise", "kernels"]

_SHAPE = (2, 24, 9, 7)
_DTYPES = (torch.float32, torch.bfloat16)


def kernels(backend: str) -> list[str]:
    """Substrings of the names that the kernels of this backend have on the device."""
    if backend != "triton":
        return ["fusedres"]  # the namespace
    triton.load()
    modules = [import_module(f"fusedres.triton.{name}") for name in triton.KERNEL_MODULES]
    return sorted({name for m in modules for name, value in vars(m).items() if name.endswith("_kernel") and value})


def exercise(device: str, backend: str) -> int:
    """Runs forward and backward of every kind of block, in training and inference; how many calls that were."""
    for mode in select.FEWEST_ELEMENTS:  # so that nothing is too small to be fused
        select.FEWEST_ELEMENTS[mode] = 0
    calls = 0
    with select.use_backend(backend):
        for dtype in _DTYPES:
            for module in _modules():
                for training in (True, False):
                    _step(module.to(device, dtype, memory_format=torch.channels_last).train(training), dtype, device)
                    calls += 1
    return calls


def _modules() -> Iterator[nn.Module]:
    torch.manual_seed(0)
    channels = _SHAPE[1]
    for make in grid.BLOCKS.values():
        block = make(channels)
        patch(block)
        yield block
    yield blocks.BottleneckBlock(channels, 32, 2)
    yield blocks.WideResidualBlock(channels, channels, dropout=0.3)
    yield blocks.HighwaySkip(nn.Conv2d(channels, channels, 3, padding=1), channels)
    yield blocks.ODEBlock(_Flow(channels), method="rk4", step_size=0.5)


class _Flow(nn.Module):
    """A right-hand side for Runge-Kutta steps."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.conv(x))


def _step(module: nn.Module, dtype: torch.dtype, device: str) -> None:
    x = torch.randn(_SHAPE, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    with torch.set_grad_enabled(module.training):
        out = module(x.requires_grad_(module.training))
    if module.training:
        out.backward(torch.ones_like(out))
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    if sys.argv[1] == "--kernels":
        print(" ".join(kernels(sys.argv[2])))
    else:
        print(f"{exercise(sys.argv[1], sys.argv[2])} calls")
