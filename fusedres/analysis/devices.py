"""What a device can do at best: the two numbers of its roofline (Williams et al. 2009, "Roofline: An Insightful Visual
Performance Model for Multicore Architectures")."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

__all__ = ["DEVICES", "Device", "device_named", "device_of", "measured_cpu"]


@dataclass(frozen=True)
class Device:
    """Memory bandwidth in bytes/s, and arithmetic in FLOP/s by dtype (a multiply-add is two)."""

    name: str
    bandwidth: float
    arithmetic: Mapping[torch.dtype, float]

    def seconds(self, nbytes: float, flops: float, dtype: torch.dtype) -> float:
        """The least time of a kernel: ``max(bytes / bandwidth, flops / arithmetic)``."""
        return max(nbytes / self.bandwidth, flops / self.peak(dtype))

    def peak(self, dtype: torch.dtype) -> float:
        """FLOP/s in ``dtype``.

        Raises:
            ValueError: for a dtype that is not in the device's table.
        """
        if dtype not in self.arithmetic:
            known = ", ".join(str(d) for d in self.arithmetic)
            raise ValueError(f"dtype must be one of {known} for {self.name}, got {dtype}")
        return self.arithmetic[dtype]


def _gpu(name: str, bandwidth: float, half: float, tf32: float) -> Device:
    # PyTorch's convolutions of float32 tensors run in TF32 unless told otherwise.
    return Device(name, bandwidth, {torch.bfloat16: half, torch.float16: half, torch.float32: tf32})


# Peaks as published, dense (where a data sheet gives the figure "with sparsity", half of it), float32 accumulation.
DEVICES: dict[str, Device] = {
    # NVIDIA H100 Tensor Core GPU data sheet, SXM column: 3.35 TB/s; H100 architecture white paper, table of SXM5 peaks:
    # 989.4 and 494.7 TFLOPS dense.
    "H100": _gpu("H100 SXM", 3.35e12, 989.4e12, 494.7e12),
    # NVIDIA H200 Tensor Core GPU data sheet, SXM column: 4.8 TB/s, arithmetic as H100.
    "H200": _gpu("H200 SXM", 4.8e12, 989.4e12, 494.7e12),
    # NVIDIA A100 Tensor Core GPU data sheet, 80GB SXM column: 2,039 GB/s, 312 and 156 TFLOPS dense.
    "A100": _gpu("A100 SXM 80GB", 2.039e12, 312e12, 156e12),
    # NVIDIA Ada GPU architecture white paper, appendix A: 1,008 GB/s, 165.2 (FP32 accumulate) and 82.6 TFLOPS dense.
    "RTX4090": _gpu("RTX 4090", 1.008e12, 165.2e12, 82.6e12),
}


def device_named(name: str, dtype: torch.dtype) -> Device:
    """One of :data:`DEVICES`, or ``"cpu"``: this machine's, measured now.

    Raises:
        ValueError: for any other name.
    """
    if name == "cpu":
        return measured_cpu(dtype)
    if name not in DEVICES:
        raise ValueError(f"device must be 'cpu' or one of {', '.join(map(repr, DEVICES))}, got {name!r}")
    return DEVICES[name]


def device_of(where: torch.device | str, dtype: torch.dtype) -> Device | None:
    """The peaks of a device that tensors lie on: this CPU's measured, a GPU's published; ``None`` for another GPU."""
    where = torch.device(where)
    if where.type == "cpu":
        return measured_cpu(dtype)
    name = torch.cuda.get_device_name(where).replace(" ", "")
    return next((device for key, device in DEVICES.items() if key in name), None)


_COPIED = 2**28
_SIDE = 2048
_BATCH = 8
_CONVOLUTIONS = (
    # Input and output channels, side of the image and of the kernel: a 1x1 and a 3x3 of three of ResNet-50's stages.
    (64, 256, 56, 1),
    (64, 64, 56, 3),
    (128, 128, 28, 3),
    (256, 1024, 14, 1),
    (256, 256, 14, 3),
)
_TIMES = 5


def measured_cpu(dtype: torch.dtype) -> Device:
    """This CPU with the threads that PyTorch uses now, as fast as PyTorch's own kernels make it: a copy that fits no
    cache, and the fastest among a square matrix product and convolutions of ResNet-50.

    No bound: another algorithm, such as minimal filtering, may need fewer operations than are counted.
    """
    source = torch.ones(_COPIED, dtype=torch.uint8)
    target = torch.empty_like(source)
    bandwidth = 2 * _COPIED / _fastest(lambda: target.copy_(source))
    # Convolutions too: which library multiplies matrices depends on the dtype, and it may be the slower one.
    arithmetic = max(flops / _fastest(call) for flops, call in _products(dtype))
    threads = torch.get_num_threads()
    name = f"this CPU, {threads} thread{'s' if threads > 1 else ''} (measured with PyTorch's own kernels)"
    return Device(name, bandwidth, {dtype: arithmetic})


def _products(dtype: torch.dtype) -> Iterator[tuple[int, Callable[[], Tensor]]]:
    """Operations, and what computes them."""
    matrix = torch.ones(_SIDE, _SIDE, dtype=dtype)
    yield 2 * _SIDE**3, lambda: matrix @ matrix
    for channels, made, side, kernel in _CONVOLUTIONS:
        images, weight = (
            torch.ones(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
            for shape in ((_BATCH, channels, side, side), (made, channels, kernel, kernel))
        )
        flops = 2 * _BATCH * side**2 * weight.numel()
        yield flops, partial(torch.conv2d, images, weight, padding=kernel // 2)


def _fastest(call: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(_TIMES + 1):
        start = perf_counter()
        call()
        seconds.append(perf_counter() - start)
    return min(seconds[1:])  # the first one pays for fresh memory
