"""Measured tiles: :func:`tune` times the Triton convolutions of a model on its device and keeps the best on disk.

Candidates are the tiles that a model of registers, shared memory and waves lets through, and the vendor's convolution
with the passes that surround it; a candidate whose result is not the vendor's up to rounding is discarded, whatever its
time. See :mod:`fusedres.triton.tuning` for the tables.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from . import env, triton
from .console import stages
from .ops.conv import ConvGeometry
from .testing import rms

__all__ = ["TuneReport", "contestants", "convolutions", "measure", "tune"]

_CANDIDATES = 10  # tiles that are timed per problem: each is a compilation
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TuneReport(NamedTuple):
    """What was measured: an entry per problem, by key, and the file that has them now."""

    entries: dict[str, Any]
    path: str
    left: int = 0
    """Problems for which there was no time."""

    def __str__(self) -> str:
        lines = [
            f"{key}: {entry.milliseconds:.4f} ms with {tuple(entry.tiles)}, vendor {entry.vendor_milliseconds:.4f} ms"
            for key, entry in self.entries.items()
        ]
        if self.left:
            lines.append(f"{self.left} more were not measured for want of time")
        return "\n".join([*lines, f"kept in {self.path}"])


def tune(model: nn.Module, example: Any, *, backward: bool = True, seconds: float = float("inf")) -> TuneReport:
    """Measures the convolutions of ``model`` on ``example`` and keeps what is best, for this and later processes.

    The model's parameters, buffers and gradients are left as they were. Takes minutes: every candidate is compiled.
    What computes most is measured first, and each problem is kept as it is measured.

    Args:
        model: on a GPU, patched or not, under autocast where it will be.
        example: what it is called with: a tensor, or a tuple of arguments.
        backward: whether to measure the gradients' passes too.
        seconds: after which no other problem is begun; one is measured in any case.

    Raises:
        RuntimeError: where the Triton kernels do not run here, with the reason.
    """
    if reason := env.triton_missing():
        raise RuntimeError(f"tune: {reason}")
    triton.load()
    from .triton.tuning import bytes_and_flops, cache_path, device_name, record

    started = perf_counter()
    found = sorted(convolutions(model, example, backward), key=lambda problem: -bytes_and_flops(problem)[1])
    device = next((x.device for x in _arguments(example) if isinstance(x, Tensor)), torch.device("cpu"))
    name = device_name(device)
    entries: dict[str, Any] = {}
    with stages(len(found), "tuning") as begin:
        for problem in found:
            if entries and perf_counter() - started > seconds:
                break
            begin(problem.key)
            entries[problem.key] = measure(problem, device)
            record(name, {problem.key: entries[problem.key]})
    return TuneReport(entries, str(cache_path(name)), len(found) - len(entries))


def _arguments(example: Any) -> tuple[Any, ...]:
    return tuple(example) if isinstance(example, (tuple, list)) else (example,)


def convolutions(model: nn.Module, example: Any, backward: bool = True) -> list[Any]:
    """The problems that a call of the model poses: every dense convolution, each with and without a pending input."""
    from .triton.tuning import Problem

    watch = _Watch()
    with watch, torch.no_grad():
        copy.deepcopy(model)(*_arguments(example))
    problems = []
    for dtype, shape, filters, kernel, g in watch.found:
        problems += [Problem("fprop", dtype, shape, filters, kernel, g, pending) for pending in (False, True)]
        if backward:
            if g.stride == (1, 1) or kernel == (1, 1):
                problems.append(Problem("dgrad", dtype, shape, filters, kernel, g, True))
            problems.append(Problem("wgrad", dtype, shape, filters, kernel, g, True))
    return problems


class _Watch(TorchDispatchMode):
    """Notes the convolutions that run, whoever calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[tuple[Any, ...], None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            x, weight, _, stride, padding, dilation, transposed, _, groups = args
            if x.dim() == 4 and groups == 1 and not transposed and x.dtype in _DTYPES:
                g = ConvGeometry(tuple(stride), tuple(padding), tuple(dilation), 1)
                kernel = (weight.shape[2], weight.shape[3])
                if not (kernel == (1, 1) and any(padding)):
                    self.found[(x.dtype, tuple(x.shape), weight.shape[0], kernel, g)] = None
        return func(*args, **(kwargs or {}))


# ---------------------------------------------------------------------------------------------------------------------
# One problem
# ---------------------------------------------------------------------------------------------------------------------


def measure(problem: Any, device: torch.device, timer: Callable[[Callable[[], Any]], float] | None = None) -> Any:
    """Times the candidates of a problem and the vendor's way; the :class:`~fusedres.triton.tuning.Entry` of the best.

    Args:
        timer: from a call to its milliseconds; by default the median of several runs, on a GPU between events.
    """
    from triton.errors import TritonError

    from .triton.tuning import Entry, heuristic, space

    timer = timer or (_milliseconds if device.type == "cuda" else _milliseconds_on_the_cpu)
    ours, vendor = contestants(problem, device)
    expected = vendor()
    # Two roundings of each side, the pending value's and the result's.
    allowed = 4 * torch.finfo(problem.dtype).eps * rms(expected)
    capability = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8
    candidates = dict.fromkeys([heuristic(problem), *space(problem, capability)])
    times = {}
    for tiles in list(candidates)[:_CANDIDATES]:
        with suppress(TritonError):  # the model of shared memory and registers lets through what a device refuses
            if rms(ours(tiles) - expected) <= allowed:
                times[tiles] = timer(lambda tiles=tiles: ours(tiles))
    best = min(times, key=times.__getitem__, default=heuristic(problem))
    return Entry(best, times.get(best, float("inf")), timer(vendor))


def _milliseconds(call: Callable[[], Any], runs: int = 20) -> float:
    for _ in range(3):
        call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for begin, end in events:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return sorted(begin.elapsed_time(end) for begin, end in events)[runs // 2]


def _milliseconds_on_the_cpu(call: Callable[[], Any], runs: int = 3) -> float:
    """For Triton's interpreter, whose times say nothing of a GPU's."""
    times = []
    for _ in range(runs):
        start = perf_counter()
        call()
        times.append(1e3 * (perf_counter() - start))
    return sorted(times)[runs // 2]


def contestants(problem: Any, device: torch.device) -> tuple[Callable[[Any], Tensor], Callable[[], Tensor]]:
    """The pass by our kernel with given tiles, and by the vendor's with the passes of the backend around it.

    Both yield the tensor that the pass is for, and also do what comes with it: statistics, sums, masks.
    """
    from .triton import bn_stats, conv_fused, conv_fused_backward, join, join_backward

    generator = torch.Generator(device).manual_seed(0)

    def image(channels: int, height: int, width: int) -> Tensor:
        x = torch.randn(problem.shape[0], channels, height, width, device=device, generator=generator)
        return x.to(problem.dtype).contiguous(memory_format=torch.channels_last)

    def rows(channels: int) -> Tensor:
        return torch.rand(4, channels, device=device, generator=generator) + 0.5

    _, c, h, w = problem.shape
    k, g = problem.filters, problem.geometry
    x, norm = image(c, h, w), rows(c)
    weight = torch.randn(k, c, *problem.kernel_size, device=device, generator=generator) / k**0.5
    weight = weight.to(problem.dtype).contiguous(memory_format=torch.channels_last)
    geometry = (list(g.stride), list(g.padding), list(g.dilation))
    convolve_backward = torch.ops.aten.convolution_backward.default
    if problem.kind == "fprop":
        pending = (norm, 1, 0.0) if problem.prologue else (None, 0, 0.0)

        def fprop() -> Tensor:
            value = join.join(x, norm, None, None, 1, 0.0) if problem.prologue else x
            y = torch.conv2d(value, weight, None, *geometry).contiguous(memory_format=torch.channels_last)
            bn_stats.bn_stats(y)
            return y

        return (
            lambda tiles: conv_fused.conv_fused_fprop(x, *pending, weight, None, *geometry, True, tiles=tiles)[0],
            fprop,
        )
    grad, y, behind = image(k, *problem.size), image(k, *problem.size), rows(k)
    sums, count = rows(k), float(grad.numel() // k)
    grad_rows = conv_fused_backward.bn_grad_rows(behind, sums, count)

    def output_gradient() -> Tensor:
        apply = join_backward.join_backward_apply
        return apply(grad, y, behind, None, None, 0, 0.0, sums, count, True, False, False)[0]

    if problem.kind == "dgrad":

        def dgrad() -> Tensor:
            dy = output_gradient()
            dz = convolve_backward(dy, x, weight, None, *geometry, False, [0, 0], 1, (True, False, False))[0]
            dz = dz.contiguous(memory_format=torch.channels_last)
            join_backward.join_backward_reduce(dz, x, norm, None, None, 0, 0.0, False)
            return dz

        def ours(tiles: Any) -> Tensor:
            fused = conv_fused_backward.conv_fused_dgrad
            return fused(grad, y, grad_rows, weight, x, norm, 0, 0.0, *geometry, tiles=tiles)[0]

        return ours, dgrad

    def wgrad() -> Tensor:
        dy, value = output_gradient(), join.join(x, norm, None, None, 1, 0.0)
        return convolve_backward(dy, value, weight, None, *geometry, False, [0, 0], 1, (False, True, False))[1]

    def ours_wgrad(tiles: Any) -> Tensor:
        out = torch.empty_like(weight)
        conv_fused_backward.conv_fused_wgrad(grad, y, grad_rows, x, norm, 1, 0.0, *geometry, out, tiles=tiles)
        return out

    return ours_wgrad, wgrad
