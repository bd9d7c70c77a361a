"""``python -m fusedres.triton.kernels_doc``: writes ``docs/kernels.md``, what each pass of ResNet-50 must move.

Counted, not measured: bytes and FLOPs of every convolution's three passes at batch 256 in bfloat16, and the time below
which no kernel can be on an H100 SXM, the longer of bytes over bandwidth and FLOPs over peak (Williams, Waterman and
Patterson 2009, "Roofline").
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

from ..ops.conv import ConvGeometry
from .tuning import Problem, bytes_and_flops, heuristic

__all__ = ["table"]

_BATCH = 256
_BANDWIDTH, _PEAK = 3.35e12, 989e12  # bytes and dense bfloat16 FLOPs per second, from NVIDIA's data sheet
_STAGES = ((56, 64, 3), (28, 128, 4), (14, 256, 6), (7, 512, 3))  # size, narrow channels, blocks

_HEAD = """# Kernels: what ResNet-50 must move

Written by `python -m fusedres.triton.kernels_doc`; counted, not measured. Batch {batch}, bfloat16, every operand read
once and every result written once; `fprop` and `wgrad` read a pending input, gradients also read the raw output from
which the norm's gradient is made, and `dgrad` the raw input whose mask and sums it takes. The bound is the longer of
bytes over {bandwidth:.2f} TB/s and FLOPs over {peak:.0f} TFLOP/s (an H100 SXM's); *by* says which. `n` is how often the
convolution occurs. Tiles (rows, columns, depth, warps, stages, registers) are those taken without a measurement.

| convolution | n | pass | MB | GFLOP | bound, us | by | tiles |
|---|---|---|---|---|---|---|---|
"""


def _convolutions() -> Iterator[tuple[int, int, int, int, int, int]]:
    """Input size, channels, filters, kernel, stride and how often, of the convolutions behind the stem."""
    channels, before = 64, 56
    for size, narrow, blocks in _STAGES:
        stride = before // size
        yield before, channels, narrow, 1, 1, 1
        yield before, channels, 4 * narrow, 1, stride, 1
        yield before, narrow, narrow, 3, stride, 1
        yield size, narrow, 4 * narrow, 1, 1, blocks
        yield size, 4 * narrow, narrow, 1, 1, blocks - 1
        yield size, narrow, narrow, 3, 1, blocks - 1
        channels, before = 4 * narrow, size


def table() -> str:
    """The page."""
    lines = [_HEAD.format(batch=_BATCH, bandwidth=_BANDWIDTH / 1e12, peak=_PEAK / 1e12)]
    merged: dict[tuple[int, ...], int] = {}
    for *shape, count in _convolutions():
        merged[tuple(shape)] = merged.get(tuple(shape), 0) + count
    total = 0.0
    for (size, channels, filters, kernel, stride), count in merged.items():
        g = ConvGeometry((stride, stride), (kernel // 2, kernel // 2), (1, 1), 1)
        name = f"{kernel}x{kernel}, {channels} to {filters}, {size}x{size}" + (
            f", stride {stride}" if stride > 1 else ""
        )
        for kind in ("fprop", "dgrad", "wgrad"):
            problem = Problem(kind, torch.bfloat16, (_BATCH, channels, size, size), filters, (kernel, kernel), g, True)
            moved, flops = bytes_and_flops(problem)
            memory, arithmetic = moved / _BANDWIDTH, flops / _PEAK
            total += count * max(memory, arithmetic)
            ours = kind != "dgrad" or stride == 1 or kernel == 1
            tiles = ", ".join(map(str, heuristic(problem))) if ours else "the vendor's"
            lines.append(
                f"| {name} | {count} | {kind} | {moved / 1e6:.1f} | {flops / 1e9:.1f} | "
                f"{1e6 * max(memory, arithmetic):.0f} | {'bytes' if memory > arithmetic else 'FLOPs'} | {tiles} |\n"
            )
    lines.append(f"\nAll of them, each as often as it occurs: {1e3 * total:.1f} ms.\n")
    return "".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", nargs="?", type=Path, default=Path(__file__).parents[2] / "docs" / "kernels.md")
    parser.parse_args().path.write_text(table())
