"""``python -m fusedres.triton.kernels_doc``: writes ``docs/kernels.md``, what each pass of ResNet-50 must move, and
what the compiler makes of the ways to move it.

Counted, not measured: bytes and FLOPs of every convolution's three passes and of every pass around them at batch 256 in
bfloat16, and the time below which no kernel can be on an H100 SXM, the longer of bytes over bandwidth and FLOPs over
peak (Williams, Waterman and Patterson 2009, "Roofline").
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from ..analysis.devices import DEVICES
from ..analysis.phantom import Call, phantom_input, phantom_model
from ..analysis.traffic import fused_backend, record_step
from ..models import resnet50
from ..ops.activations import ACTIVATIONS
from ..ops.conv import ConvGeometry
from ..patch import patch
from .tuning import Problem, bytes_and_flops, heuristic

__all__ = ["convolutions", "passes", "registers", "table", "ways"]

_RECORD = Path(__file__).parents[2] / "tests" / "triton" / "resources.json"

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


def convolutions() -> Iterator[tuple[int, int, int, int, int, int]]:
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
    for *shape, count in convolutions():
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
            tiles = ", ".join(map(str, heuristic(problem)[:6])) if ours else "the vendor's"
            lines.append(
                f"| {name} | {count} | {kind} | {moved / 1e6:.1f} | {flops / 1e9:.1f} | "
                f"{1e6 * max(memory, arithmetic):.0f} | {'bytes' if memory > arithmetic else 'FLOPs'} | {tiles} |\n"
            )
    lines.append(f"\nAll of them, each as often as it occurs: {1e3 * total:.1f} ms.\n")
    return "".join(lines)


_PASSES_HEAD = """
## The passes around them

What else a training step runs, as the engine calls it with fused 1x1 convolutions and the vendor's 3x3 ones, and the
convolutions of an inference, whose epilogue is the join; recorded from the engine on tensors without memory. FLOPs are
those of matrix products. A statistics pass, a join or a mask computes at most ten operations for a value besides, in
float32 at 67 TFLOP/s, which takes less time than its bytes. Left out is what moves less than ten megabytes: the rows of
norms, the classifier.

| when | pass | n | MB | GFLOP | bound, us | by |
|---|---|---|---|---|---|---|
"""

_CONVOLUTIONS = ("aten.convolution", "fusedres.conv_fused_")


def _calls(training: bool) -> list[Call]:
    model = phantom_model(resnet50(), torch.bfloat16).train(training)
    patch(model)
    image = phantom_input((_BATCH, 3, 224, 224), torch.bfloat16)
    return record_step(model, image, fused_backend(DEVICES["H100"], torch.bfloat16))


def passes() -> str:
    """What runs around the convolutions of a training step, and the convolutions of an inference with their joins."""
    rows: dict[tuple[str, str, float, float], int] = {}
    for training in (True, False):
        for call in _calls(training):
            joins = call.op == "fusedres.conv_fused_join"
            listed = joins or (training and (call.block is None or not call.op.startswith(_CONVOLUTIONS)))
            moved = call.touched + call.again
            if listed and moved >= 1e7:
                when = "backward" if call.backward else "forward" if training else "inference"
                row = when, call.op.partition(".")[2], round(moved / 1e6, 1), round(call.flops / 1e9, 1)
                rows[row] = rows.get(row, 0) + 1
    lines, total = [_PASSES_HEAD], 0.0
    for (when, name, megabytes, gigaflops), count in rows.items():
        memory, arithmetic = 1e6 * megabytes / _BANDWIDTH, 1e9 * gigaflops / _PEAK
        bound = max(memory, arithmetic)
        total += count * bound * (when != "inference")
        lines.append(
            f"| {when} | `{name}` | {count} | {megabytes:.1f} | {gigaflops:.1f} | {1e6 * bound:.0f} | "
            f"{'bytes' if memory > arithmetic else 'FLOPs'} |\n"
        )
    lines.append(f"\nThose of a training step, each as often as it occurs: {1e3 * total:.1f} ms.\n")
    return "".join(lines)


_WAYS_HEAD = """
## How tiles come, and how they are walked over

What the compiler makes of each way, from the machine code for sm_90 (Triton {version}, bfloat16; the whole record, with
sm_80 and sm_100, is `tests/triton/resources.json`, and a test compiles it anew): registers of a thread / KiB of shared
memory / instructions of the innermost loop around the matrix instructions. A persistent program's loop holds a whole
tile, what is done with the result included; the other two hold a step along the depth.

| kernel | by address | by descriptor | persistent |
|---|---|---|---|
"""

_WAYS_TAIL = """
**By descriptor** one thread begins one copy for a whole tile, instead of each thread one for every 16 bytes with an
address and a mask of its own. No kernel needs more registers for that, most need fewer, and the steps of `fprop` with a
1x1 kernel and nothing pending are the shortest. Where an input is pending the step is hardly shorter: the norm's rows
still come by address, and waiting for a copy and choosing the thread that begins it cost as much. `wgrad`, of
whose small tiles each thread copies little, gains registers alone. What a tile waits for is not in the code, so tables
decide: tuning tries descriptors on the best tiles by address, from compute capability 9.0 on. Before that the compiler
turns them into 64-bit addresses: on sm_80 the 1x1 `fprop` spills 168 bytes of a thread with a prologue and 496 without,
`dgrad` 544. Without a measurement tiles come by address, which every device has.

**Persistent** programs, as many as run at once, loop over tiles in the order that a grid would have, so that
neighbours still share rows. It is for depths of at most four steps, the 1x1 convolutions of 64 to 256 channels: with
one step, as from 64 to 256 channels at 56x56, a program's pipeline has nothing to run ahead of. In one loop over all
tiles the copies of the next tile begin before the stores of this one (`ahead` in the record: of the loop's
instructions UTMALDG stands before STG), at the price of registers, and of shared memory for the result beside a
pipeline that stays full. By address that fails: the next tile's addresses take the registers that this one's result
needs (all 128 in `fprop` with a prologue and in `dgrad` with a skip), and `dgrad` then keeps 41 KiB of tiles in flight
instead of 57. `wgrad` is split so that its grid fills the device once, with long loops: there is no next tile. Nor is
it for 3x3 kernels, whose nine taps are steps enough. On sm_100, where sums lie in tensor memory and pass through
registers on their way out, the loop spills 8 bytes of a thread in the 1x1 `fprop` of stride 2 and 40 in the join: not
tried there.

**Stores** and the epilogue's reads stay by address. They happen once for a tile and are 16 bytes wide already
(STG.E.128), and statistics, masks and sums need the same values in registers.
"""


def ways(record: Path = _RECORD) -> str:
    """What the compiler makes of each way to load tiles and to walk over them, as recorded, and what follows."""
    text = json.loads(record.read_text())
    rows: dict[str, dict[str, str]] = {}
    for name, row in text["kernels"].items():
        parts = re.fullmatch(r"(.*?)( by descriptor| persistent)?, bfloat16: conv_\w+", name)
        if parts:
            registers, shared, _, _, _, step, _ = row["sm_90"]
            rows.setdefault(parts[1], {})[parts[2] or ""] = f"{registers} / {shared / 1024:.0f} / {step}"
    lines = [
        f"| {name} | {found['']} | {found[' by descriptor']} | {found.get(' persistent', '')} |\n"
        for name, found in rows.items()
        if " by descriptor" in found
    ]
    return _WAYS_HEAD.format(version=text["triton"]) + "".join(lines) + _WAYS_TAIL


_REGISTERS = """
## What a tile leaves room for

None of the {count} convolution kernels in the record spills: tiles that are taken without a measurement, for every
convolution above with every prologue and epilogue, and the ways of the section before, on sm_80, sm_90 and sm_100. Most
have 128 registers of a thread. Where that is too little, half a tile is computed by 4 warps of up to 224
registers: with an activation of more than one kink, up to GELU's error function, and on sm_100, where sums pass from
tensor memory through registers, beside a residual. Float32 has room for 64 columns, and without TensorFloat-32,
multiplied in registers, for two stages. The table has the most registers of a thread, and in parentheses how many
kernels there are.

| | sm_80 | sm_90 | sm_100 |
|---|---|---|---|
"""


def registers(record: Path = _RECORD) -> str:
    """The most registers by activation, precision and architecture, as recorded.

    Raises:
        ValueError: where one spills, which this says that none does.
    """
    kernels = json.loads(record.read_text())["kernels"]
    found: dict[str, dict[str, list[int]]] = {}
    for name, row in kernels.items():
        form, _, kernel = name.partition(": ")
        if not kernel.startswith("conv_"):
            continue
        for arch, (count, _, local, *_) in row.items():
            if local:
                raise ValueError(f"{name} spills {local} bytes of a thread on {arch}")
            found.setdefault(_what(form), {}).setdefault(arch, []).append(count)
    lines = [
        f"| {what} | " + " | ".join(f"{max(row[arch])} ({len(row[arch])})" for arch in _ARCHITECTURES) + " |\n"
        for what, row in found.items()
    ]
    return _REGISTERS.format(count=sum(name.partition(": ")[2].startswith("conv_") for name in kernels)) + "".join(
        lines
    )


_ARCHITECTURES = ("sm_80", "sm_90", "sm_100")


def _what(form: str) -> str:
    """What decides a form's registers, by its name."""
    rest, _, precision = form.rpartition(", ")
    activation = rest.rpartition(" ")[2]
    return f"{activation if activation in ACTIVATIONS else 'relu'}, {precision}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", nargs="?", type=Path, default=Path(__file__).parents[2] / "docs" / "kernels.md")
    parser.parse_args().path.write_text(table() + passes() + ways() + registers())
