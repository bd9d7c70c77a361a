"""Bytes that a training step moves, and the time that a device's bandwidth and arithmetic allow for it.

A batch-normalised network is bound by memory: per block, this counts the bytes that three schedules move, from the
shapes alone. *Stock* is PyTorch's eager mode, op by op. *Inductor-like* is what a fusing compiler makes of the same ops
(:mod:`fusedres.analysis.schedules`). *Fused* is this library: the passes that its engine runs, as ``docs/design.md``
lists them, recorded from the engine itself. On a GPU these have fused convolutions where the Triton backend runs them
without a measurement: for 1x1 kernels.

Counted is memory as if there were no cache: every kernel reads each of its operands and writes each of its results
once per pass that it makes. Batch norm in training makes two (sums, then values), a convolution's backward two (dgrad
and wgrad).
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..console import console, lacks, make_table, stages
from ..explain_cli import load_model
from ..ops.conv import ConvGeometry
from ..ops.conv_fused import conv_fused_unsuited
from ..patch import patch, unpatch
from ..select import fused_references, use_backend, why_not
from .blocks import blocks_of
from .devices import DEVICES, Device, device_named
from .output import COLOURS, add_output_arguments, new_figure, save_figure, shape_argument, write
from .phantom import Call, Recorder, phantom_input, phantom_model
from .schedules import Kernel, eager, inductor_like

__all__ = ["Cost", "Traffic", "add_arguments", "fused_backend", "record_step", "run", "save_plot", "traffic"]

SCHEDULES = ("stock", "inductor", "fused")

OUTSIDE = "(outside of blocks)"


@dataclass(frozen=True)
class Cost:
    """What one block costs in one schedule, forward and backward.

    Attributes:
        nbytes: moved, in all passes of all kernels.
        touched: moved if every kernel touched each of its tensors once.
        flops: of matrix products, two per multiply-add.
        seconds: the sum over the kernels of ``max(bytes / bandwidth, flops / arithmetic)``.
        kernels: how many.
    """

    nbytes: int
    touched: int
    flops: int
    seconds: float
    kernels: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Traffic:
    """What :func:`traffic` found.

    Attributes:
        blocks: for each block's path, and :data:`OUTSIDE`, the cost by schedule (:data:`SCHEDULES`).
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: Device
    blocks: Mapping[str, Mapping[str, Cost]]

    def total(self, schedule: str) -> Cost:
        """The whole step's cost."""
        return sum((costs[schedule] for costs in self.blocks.values()), Cost(0, 0, 0, 0.0, 0))

    def to_dict(self) -> dict[str, Any]:
        def plain(costs: Mapping[str, Cost]) -> dict[str, Any]:
            return {schedule: asdict(cost) for schedule, cost in costs.items()}

        return {
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.name,
            "bandwidth": self.device.bandwidth,
            "arithmetic": self.device.peak(self.dtype),
            "blocks": {path: plain(costs) for path, costs in self.blocks.items()},
            "total": plain({schedule: self.total(schedule) for schedule in SCHEDULES}),
        }

    def __str__(self) -> str:
        total = {schedule: self.total(schedule) for schedule in SCHEDULES}
        each = ", ".join(
            f"{name} {c.nbytes / 1e6 / self.shape[0]:.0f} MB and {1e3 * c.seconds / self.shape[0]:.3f} ms"
            for name, c in total.items()
        )
        return f"per image on {self.device.name}, {str(self.dtype).removeprefix('torch.')}: {each}"


def traffic(
    model: nn.Module,
    shape: Sequence[int],
    dtype: torch.dtype = torch.bfloat16,
    device: str | Device = "H100",
    *,
    memory: str = "auto",
) -> Traffic:
    """Bytes, FLOPs and the roofline's time of a training step (forward and backward), per block and schedule.

    Nothing is computed and no activation gets memory: the model's code runs on phantom tensors in channels_last, in
    training mode, in ``dtype`` throughout. The roofline is the least time of each kernel, ``max(bytes / bandwidth,
    flops / arithmetic)`` (Williams et al. 2009), added up; caches, launches and the optimizer are left out.

    Args:
        model: stock or patched, or made of ``fusedres.nn`` blocks; it is not changed.
        shape: of the input, ``[N, C, H, W]``.
        device: ``"H100"``, ``"H200"``, ``"A100"``, ``"RTX4090"`` with their published peaks, ``"cpu"`` for this
            machine, measured at the start, or any :class:`~fusedres.analysis.devices.Device`.
        memory: as in :func:`fusedres.patch`, for the fused schedule.

    Raises:
        ValueError: for a device or dtype that is not in the table, or a model that reads values in its forward.
    """
    shape = tuple(shape)
    device = device_named(device, dtype) if isinstance(device, str) else device
    device.peak(dtype)  # an unknown dtype is told before any work
    stock = phantom_model(model, dtype).train()
    unpatch(stock)
    fused = phantom_model(stock)
    patch(fused, memory=memory)
    calls = record_step(stock, phantom_input(shape, dtype), use_backend("stock"))
    kernels = {
        "stock": eager(calls),
        "inductor": inductor_like(calls),
        "fused": eager(record_step(fused, phantom_input(shape, dtype), fused_backend(device, dtype))),
    }
    paths = [*blocks_of(stock), None]
    blocks = {
        OUTSIDE if path is None else path: {
            schedule: _cost([k for k in found if k.block == path], device, dtype) for schedule, found in kernels.items()
        }
        for path in paths
    }
    return Traffic(shape, dtype, device, blocks)


def fused_backend(device: Device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """What the engine runs on for a device: its passes, not its kernels."""
    if device.name.startswith("this CPU"):
        return use_backend("cpu" if why_not("cpu", "cpu", dtype) is None else "reference")
    return fused_references(_fuses_pointwise)


def _fuses_pointwise(kind: str, x: Tensor, weight: Tensor, g: ConvGeometry, prologue: bool) -> bool:
    return tuple(weight.shape[2:]) == (1, 1) and conv_fused_unsuited(kind, x, weight, g) is None


def record_step(
    model: nn.Module, x: Tensor, backend: AbstractContextManager[None], *, phantom: bool = True
) -> list[Call]:
    """The ops of one forward and backward of ``model``, each attributed to its block.

    Args:
        backend: what the engine runs on: :func:`fusedres.use_backend` or :func:`fused_backend`.
        phantom: whether ``model`` and ``x`` are phantoms, on which no op runs.

    Raises:
        ValueError: for a model none of whose outputs depends on a parameter.
    """
    recorder = Recorder(blocks_of(model), phantom)
    with backend, torch.enable_grad(), recorder.attributing():
        outputs = [t for t in tree_leaves(model(x)) if isinstance(t, Tensor) and t.requires_grad]
        if not outputs:
            raise ValueError("no output of the model requires a gradient")
        torch.autograd.backward(outputs, [torch.empty_like(t) for t in outputs])
    return recorder.calls


def _cost(kernels: Sequence[Kernel], device: Device, dtype: torch.dtype) -> Cost:
    return Cost(
        sum(k.nbytes for k in kernels),
        sum(k.nbytes - k.again for k in kernels),
        sum(k.flops for k in kernels),
        sum(device.seconds(k.nbytes, k.flops, dtype) for k in kernels),
        len(kernels),
    )


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default="resnet50", help="as for explain (default %(default)s)")
    parser.add_argument(
        "--shape", type=shape_argument, default=(64, 3, 224, 224), help="N,C,H,W (default 64,3,224,224)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of all tensors (default %(default)s)")
    parser.add_argument(
        "--device", nargs="+", choices=[*DEVICES, "cpu"], default=[*DEVICES, "cpu"], help="default: all"
    )
    parser.add_argument("--memory", choices=("auto", "low"), default="auto", help="of the fused schedule")
    add_output_arguments(parser, "traffic")


def run(args: Namespace) -> int:
    if lacks("traffic", "matplotlib"):
        return 2
    dtype = DTYPES[args.dtype]
    try:
        model = load_model(args.model)
        found = []
        with stages(len(args.device), "traffic") as begin:
            for device in args.device:
                begin(device)
                found.append(traffic(model, args.shape, dtype, device, memory=args.memory))
    except ValueError as error:
        console.print(f"fusedres traffic: {error}")
        return 2
    title = f"{args.model}, {'x'.join(map(str, args.shape))}, {args.dtype}, one training step"
    console.print(make_table(title, _HEAD, _rows(found[0]), _CAPTION))
    console.print(make_table("", _DEVICE_HEAD, [_device_row(t) for t in found]))
    write(args, {"model": args.model, "found": [t.to_dict() for t in found]}, _drawing(found, title))
    return 0


_HEAD = ("MB per image", "stock", "inductor-like", "fused", "fused / stock", "GFLOP per image")
_CAPTION = "Forward and backward. Every kernel counted with all the passes that it makes, no cache"
_DEVICE_HEAD = ("least ms per step", "TB/s", "TFLOP/s", "stock", "inductor-like", "fused", "stock / fused")


def _rows(found: Traffic) -> list[tuple[str, ...]]:
    total = {schedule: found.total(schedule) for schedule in SCHEDULES}
    return [_row(path, costs, found.shape[0]) for path, costs in (*found.blocks.items(), ("total", total))]


def _row(path: str, costs: Mapping[str, Cost], images: int) -> tuple[str, ...]:
    stock, _, fused = (costs[schedule].nbytes for schedule in SCHEDULES)
    return (
        path or "(the model)",
        *(f"{costs[schedule].nbytes / 1e6 / images:.2f}" for schedule in SCHEDULES),
        f"{fused / stock:.2f}" if stock else "",
        f"{costs['stock'].flops / 1e9 / images:.2f}",
    )


def _device_row(found: Traffic) -> tuple[str, ...]:
    stock, inductor, fused = (1e3 * found.total(schedule).seconds for schedule in SCHEDULES)
    return (
        found.device.name,
        f"{found.device.bandwidth / 1e12:.3g}",
        f"{found.device.peak(found.dtype) / 1e12:.3g}",
        *(f"{ms:.2f}" for ms in (stock, inductor, fused)),
        f"{stock / fused:.2f}x",
    )


_LABELS = {"stock": "stock (eager)", "inductor": "inductor-like", "fused": "fused"}


def _drawing(found: Sequence[Traffic], title: str) -> Callable[[Path], None]:
    return lambda path: save_plot(path, found, title)


def save_plot(path: Path, found: Sequence[Traffic], title: str) -> None:
    """Bytes per block in each schedule, and the least time on each device."""
    figure, ((left, right),) = new_figure(1, 2, (13.0, 5.2))
    figure.suptitle(title)
    blocks = {name or "(the model)": costs for name, costs in found[0].blocks.items()}
    images = found[0].shape[0]
    for schedule in SCHEDULES:
        values = [costs[schedule].nbytes / 1e6 / images for costs in blocks.values()]
        total = found[0].total(schedule).nbytes / 1e6 / images
        left.plot(values, "o-", ms=4, color=COLOURS[schedule], label=f"{_LABELS[schedule]}: {total:.0f} MB in all")
    left.set_xticks(range(len(blocks)), list(blocks), rotation=90 if len(blocks) > 6 else 0, fontsize=8)
    left.set(title="memory traffic by block", ylabel="MB per image", ylim=(0, None))
    left.legend()
    _draw_devices(right, found)
    save_figure(figure, path)


def _draw_devices(axes: Any, found: Sequence[Traffic]) -> None:
    for place, schedule in enumerate(SCHEDULES):
        relative = [t.total(schedule).seconds / t.total("stock").seconds for t in found]
        bars = axes.bar(
            [i + 0.27 * (place - 1) for i in range(len(found))],
            relative,
            0.25,
            color=COLOURS[schedule],
            label=_LABELS[schedule],
        )
        axes.bar_label(bars, [_milliseconds(t.total(schedule).seconds) for t in found], fontsize=8)
    axes.set_xticks(
        range(len(found)), [t.device.name.replace(" (measured)", "\n(measured)") for t in found], fontsize=8
    )
    axes.set(title="least time of a step that the roofline allows (in ms)", ylabel="relative to stock", ylim=(0, 1.15))


def _milliseconds(seconds: float) -> str:
    ms = 1e3 * seconds
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"
