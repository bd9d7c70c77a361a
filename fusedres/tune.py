"""Measured choices: :func:`tune` times a model's convolutions and blocks on its device and keeps what is best on disk.

First the Triton convolutions: candidates are the tiles that a model of registers, shared memory and waves lets through,
the best of them also by tensor descriptor and in persistent programs, and the vendor's convolution with the passes that
surround it. Then, with the best of those, every distinct block, by stock PyTorch and by each backend that runs here.
Whatever its time, a candidate whose result is not stock's within its error budget is discarded.
:mod:`fusedres.triton.tuning` has the tables, :mod:`fusedres.engine.verdict` is who asks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, suppress
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from . import select, triton
from .console import stages
from .engine import DenseProgram, Program, execute, execute_dense, execute_stock
from .engine.stock import stock_dense
from .engine.verdict import Posed, forget, posed
from .ops.conv import ConvGeometry
from .ops.conv_fused import CONV_FUSED_FPROP
from .ops.conv_fused_backward import CONV_FUSED_DGRAD, CONV_FUSED_WGRAD
from .select import why_not
from .testing import budget, rms
from .triton.tuning import Verdict, bytes_and_flops, cache_path, device_name, pose, record, record_verdicts

__all__ = ["TuneReport", "blocks", "contestants", "convolutions", "measure", "measure_block"]
__all__ += ["referee", "tune", "untunable"]

_CANDIDATES = 10  # shapes of tiles that are timed per problem: each is a compilation
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MARGIN = 0.98  # of stock's time, above which a backend is not worth leaving stock for
_DRAWS = 3
_TF32_EPSILON = 2.0**-10

Timer = Callable[[Callable[[], Any]], float]
"""From a call to its milliseconds."""


class TuneReport(NamedTuple):
    """What was measured: an entry per problem and a verdict per block, by key, and the file that has them now."""

    entries: dict[str, Any]
    path: str
    verdicts: dict[str, Verdict]
    left: int = 0
    """Problems and blocks for which there was no time."""

    def __str__(self) -> str:
        lines = [
            f"{key}: {entry.milliseconds:.4f} ms with {tuple(entry.tiles)}, vendor {entry.vendor_milliseconds:.4f} ms"
            for key, entry in self.entries.items()
        ]
        for key, v in self.verdicts.items():
            wrong = f"; wrong on {', '.join(v.wrong)}" if v.wrong else ""
            times = f"{v.milliseconds:.4f} ms, stock {v.stock_milliseconds:.4f} ms"
            lines.append(f"{key}: {v.backend}, {times}{wrong}")
        won = sum(v.backend != "stock" for v in self.verdicts.values())
        if self.left:
            lines.append(f"{self.left} more were not measured for want of time")
        return "\n".join([*lines, f"{won} of {len(self.verdicts)} blocks are faster fused", f"kept in {self.path}"])


def tune(
    model: nn.Module,
    example: Any,
    *,
    backward: bool = True,
    timer: Timer | None = None,
    seconds: float = float("inf"),
) -> TuneReport:
    """Measures the convolutions and blocks of ``model`` and keeps what is best, for this and later processes.

    From then on the backend ``"auto"`` runs on this device, in the shapes of ``example`` and near ones, every block on
    whatever was fastest with it. The model's parameters, buffers and gradients are left as they were. Takes minutes:
    every candidate is compiled. What computes most is measured first, and everything is kept as it is measured.

    Args:
        model: on a GPU, patched or not, under autocast where it will be.
        example: what it is called with: a tensor, or a tuple of arguments.
        backward: whether to measure training too.
        timer: by default the median of several runs between events on the device.
        seconds: after which nothing else is begun; one convolution and one block are measured in any case.

    Raises:
        RuntimeError: where neither the Triton nor the CUDA kernels run here, with the reasons; and while a CUDA graph
            is captured, in which nothing can be timed.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("tune: a CUDA graph is being captured, in which nothing can be timed; tune before that")
    device = next((x.device for x in _arguments(example) if isinstance(x, Tensor)), torch.device("cpu"))
    if reason := untunable(device.type):
        raise RuntimeError(f"tune: {reason}")
    # Events are timed on the current device, and that need not be the model's.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return _tuned(model, example, device, backward, timer, seconds)


def _tuned(
    model: nn.Module, example: Any, device: torch.device, backward: bool, timer: Timer | None, seconds: float
) -> TuneReport:
    """:func:`tune` on the current device."""
    backends = [name for name in select.MEASURED if why_not(name, device.type, torch.float32) is None]
    started, found = perf_counter(), []
    if "triton" in backends:
        triton.load()
        found = sorted(convolutions(model, example, backward), key=lambda problem: -bytes_and_flops(problem)[1])
    name, entries, judged = device_name(device), {}, {}
    with stages(len(found), "tuning convolutions") as begin:
        for problem in found:
            if entries and perf_counter() - started > seconds:
                break
            begin(problem.key)
            entries[problem.key] = measure(problem, device, timer)
            record(name, {problem.key: entries[problem.key]})
    cases = blocks(model, example, backward)
    with stages(len(cases), "tuning blocks") as begin:
        for key, case in cases.items():
            if judged and perf_counter() - started > seconds:
                break
            begin(key)
            judged[key] = measure_block(case, backends, timer)
            record_verdicts(name, {key: judged[key]})
    forget()
    left = len(found) - len(entries) + len(cases) - len(judged)
    return TuneReport(entries, str(cache_path(name)), judged, left)


def untunable(device_type: str) -> str | None:
    """``None`` where a backend that can be measured runs, else why none does."""
    reasons = {name: why_not(name, device_type, torch.float32) for name in select.MEASURED}
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) if all(reasons.values()) else None


def _arguments(example: Any) -> tuple[Any, ...]:
    return tuple(example) if isinstance(example, (tuple, list)) else (example,)


def convolutions(model: nn.Module, example: Any, backward: bool = True) -> list[Any]:
    """The problems that a call of the model poses: every dense convolution, each with and without a pending operand.

    Whichever backend has run the model until now: the vendor's convolutions are what is watched.
    """
    watch = _Watch()
    with watch, torch.no_grad(), select.use_backend("stock"):
        copy.deepcopy(model)(*_arguments(example))
    problems = []
    for dtype, shape, filters, kernel, g in watch.found:
        # What the engine asks for: a weight gradient of ours has something pending in any case.
        passes = [("fprop", False), ("fprop", True)]
        if backward:
            passes.append(("wgrad", True))
            if g.stride == (1, 1) or kernel == (1, 1):
                passes += [("dgrad", False), ("dgrad", True)]
        problems += [pose(kind, dtype, shape, filters, kernel, g, pending) for kind, pending in passes]
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


def measure(problem: Any, device: torch.device, timer: Timer | None = None) -> Any:
    """Times the candidates of a problem and the vendor's way; the :class:`~fusedres.triton.tuning.Entry` of the best.

    Args:
        timer: from a call to its milliseconds; by default the median of several runs, on a GPU between events.
    """
    from triton.errors import TritonError

    from .triton.tuning import Entry, heuristic, shared_bytes, shared_memory, space, variants

    timer = timer or (_milliseconds if device.type == "cuda" else _milliseconds_on_the_cpu)
    ours, vendor, exact = contestants(problem, device)
    judge = referee(problem, vendor, exact)
    capability = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8
    times: dict[Any, float] = {}

    def best_of(candidates: Iterable[Any]) -> Any:
        for tiles in candidates:
            with suppress(TritonError):  # the model of shared memory and registers lets through what a device refuses
                if judge(ours(tiles)):
                    times[tiles] = timer(lambda tiles=tiles: ours(tiles))
        return min(times, key=times.__getitem__, default=heuristic(problem))

    room = shared_memory(device)
    candidates = [tiles for tiles in space(problem, capability) if shared_bytes(problem, tiles) <= room]
    best = best_of(first_tried([heuristic(problem), *candidates]))
    best = best_of(tiles for tiles in candidates if tiles._replace(stages=best.stages) == best != tiles)
    best = best_of(variants(problem, best, capability))
    return Entry(best, times.get(best, float("inf")), timer(vendor))


def first_tried(candidates: Iterable[Any]) -> list[Any]:
    """The candidates of which the best is sought before other stages and other ways: the first few, each in a shape of
    its own, but for the stages."""
    found: dict[Any, Any] = {}
    for tiles in candidates:
        found.setdefault(tiles._replace(stages=0), tiles)
    return list(found.values())[:_CANDIDATES]


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


def referee(problem: Any, vendor: Callable[[], Tensor], exact: Callable[[], Tensor]) -> Callable[[Tensor], bool]:
    """Says of a result whether its error is within the vendor's error budget; none is that could not be checked.

    How TensorFloat-32 rounds is left open: tensor cores cut operands off, where a vendor may round them to nearest.
    """
    try:
        reference = exact()
    except torch.OutOfMemoryError:
        return lambda result: False
    allowed = budget(vendor(), reference)
    if problem.tf32:
        allowed += _TF32_EPSILON * rms(reference)
    return lambda result: rms(result.double() - reference) <= allowed


class Contestants(NamedTuple):
    """A pass by our kernel with given tiles, by the vendor's with the passes of the backend around it, and in float64.

    Each yields the tensor that the pass is for. The first two also do what comes with it: statistics, sums, masks.
    """

    ours: Callable[[Any], Tensor]
    vendor: Callable[[], Tensor]
    exact: Callable[[], Tensor]


def contestants(problem: Any, device: torch.device) -> Contestants:
    """Who can run a problem, on operands drawn for it."""
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

        operands = (x, *pending, weight, None, *geometry)
        return Contestants(
            lambda tiles: conv_fused.conv_fused_fprop(*operands, True, tiles=tiles)[0],
            fprop,
            lambda: CONV_FUSED_FPROP.reference(*_in_float64(operands), False)[0],
        )
    grad, y, behind = image(k, *problem.size), image(k, *problem.size), rows(k)
    sums, count = rows(k), float(grad.numel() // k)
    grad_rows = conv_fused_backward.bn_grad_rows(behind, sums, count)
    given = (grad, y, grad_rows) if problem.prologue else (grad, None, None)

    def output_gradient() -> Tensor:
        if not problem.prologue:
            return grad
        apply = join_backward.join_backward_apply
        return apply(grad, y, behind, None, None, 0, 0.0, sums, count, True, False, False)[0]

    if problem.kind == "dgrad":

        def dgrad() -> Tensor:
            dy = output_gradient()
            dz = convolve_backward(dy, x, weight, None, *geometry, False, [0, 0], 1, (True, False, False))[0]
            dz = dz.contiguous(memory_format=torch.channels_last)
            join_backward.join_backward_reduce(dz, x, norm, None, None, 0, 0.0, False)
            return dz

        operands = (*given, weight, x, norm, 0, 0.0, *geometry)
        return Contestants(
            lambda tiles: conv_fused_backward.conv_fused_dgrad(*operands, tiles=tiles)[0],
            dgrad,
            lambda: CONV_FUSED_DGRAD.reference(*_in_float64(operands))[0],
        )

    pending = (norm, 1, 0.0) if problem.prologue else (None, 0, 0.0)

    def wgrad() -> Tensor:
        dy, value = output_gradient(), join.join(x, norm, None, None, 1, 0.0) if problem.prologue else x
        return convolve_backward(dy, value, weight, None, *geometry, False, [0, 0], 1, (False, True, False))[1]

    operands = (*given, x, *pending, *geometry)

    def into(run: Callable[..., None], out: Tensor, *arguments: Any, **options: Any) -> Tensor:
        run(*arguments, out, **options)
        return out

    fused, reference = conv_fused_backward.conv_fused_wgrad, CONV_FUSED_WGRAD.reference
    return Contestants(
        lambda tiles: into(fused, torch.empty_like(weight), *operands, tiles=tiles),
        wgrad,
        lambda: into(reference, weight.double(), *_in_float64(operands)),
    )


def _in_float64(operands: Sequence[Any]) -> list[Any]:
    return [t.double() if isinstance(t, Tensor) else t for t in operands]


# ---------------------------------------------------------------------------------------------------------------------
# One block
# ---------------------------------------------------------------------------------------------------------------------


def blocks(model: nn.Module, example: Any, backward: bool = True) -> dict[str, Posed]:
    """The distinct blocks that calls of the model pose, by key: in inference, and with ``backward`` in training."""
    from .patch import patch

    patched = copy.deepcopy(model)
    patch(patched)
    with posed() as seen:
        with torch.no_grad():
            patched.eval()(*_arguments(example))
        if backward:
            with torch.enable_grad():
                patched.train()(*_arguments(example))
    return seen


def measure_block(case: Posed, backends: Sequence[str], timer: Timer | None = None) -> Verdict:
    """Judges a block's numbers on each backend, times those that are right, and stock; the verdict.

    Args:
        case: whose tensors are copied; inputs are drawn in their shapes, dtypes and layouts.
        timer: as of :func:`tune`.
    """
    timer = timer or _milliseconds
    fits = [name for name in backends if why_not(name, case.x.device.type, case.x.dtype) is None]
    wrong = tuple(name for name in fits if not _is_right(case, name))
    stock = timer(_call_of(case, "stock"))
    times = {name: timer(_call_of(case, name)) for name in fits if name not in wrong}
    best = min(times, key=times.__getitem__, default=None)
    if best is None:
        return Verdict("stock", stock, stock, wrong)
    return Verdict(best if times[best] <= _MARGIN * stock else "stock", times[best], stock, wrong)


def _call_of(case: Posed, backend: str) -> Callable[[], Any]:
    """One call, with its backward in training."""
    x, residual = _drawn(case, 0)
    tensors = [None if t is None else t.detach().clone() for t in case.tensors]
    folded: dict[int, Any] = {}
    if not case.training:

        def infer() -> Tensor:
            with torch.no_grad():
                return _execute(case.program, backend, x, residual, tensors, folded)

        return infer
    leaves = _leaves(case, x, residual, tensors)
    cotangent: list[Tensor] = []

    def step() -> Any:
        with torch.enable_grad():
            out = _execute(case.program, backend, x, residual, tensors, None)
        if not cotangent:
            cotangent.append(torch.randn_like(out))
        return torch.autograd.grad(out, leaves, cotangent[0])

    return step


def _drawn(case: Posed, seed: int) -> tuple[Tensor, Tensor | None]:
    """Inputs like those that the block was called with."""
    generator = torch.Generator(case.x.device).manual_seed(seed)
    return case.x.drawn(generator), None if case.residual is None else case.residual.drawn(generator)


def _leaves(case: Posed, x: Tensor, residual: Tensor | None, tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """What asks for a gradient, which it is made to: the inputs, and the operands that do in the model."""
    wanted = [t for t, original in zip(tensors, case.tensors) if original is not None and original.requires_grad]
    leaves = [x, *([] if residual is None else [residual]), *wanted]
    for leaf in leaves:
        leaf.requires_grad_()
    return leaves


def _execute(
    program: Program | DenseProgram,
    backend: str,
    x: Tensor,
    residual: Tensor | None,
    tensors: Sequence[Tensor | None],
    folded: dict[int, Any] | None,
) -> Tensor:
    if isinstance(program, DenseProgram):
        if backend == "stock":
            return stock_dense(program.layers, x, tensors)
        return execute_dense(program._replace(backend=backend), x, tensors, folded)
    if backend == "stock":
        return execute_stock(program, x, residual, tensors)
    return execute(program._replace(backend=backend), x, residual, tensors, folded)


def _is_right(case: Posed, backend: str) -> bool:
    """Whether a backend's outputs, gradients and running statistics are within stock's error budget.

    Where a result is over its budget, two more draws decide: see :mod:`fusedres.testing`.
    """
    case = case._replace(program=_without_chance(case.program))
    try:
        over = [_over_budget(case, backend, 0)]
        if over[0]:
            over += [_over_budget(case, backend, seed) for seed in range(1, _DRAWS)]
    except _refusals():  # what cannot be checked is not chosen
        return False
    return not any(sum(i in draw for draw in over) > len(over) // 2 for i in over[0])


def _refusals() -> tuple[type[Exception], ...]:
    """What a device has too little for: memory, or what a kernel needs of it."""
    if triton.missing() is not None:
        return (torch.OutOfMemoryError,)
    from triton.errors import TritonError

    return torch.OutOfMemoryError, TritonError


def _over_budget(case: Posed, backend: str, seed: int) -> set[int]:
    """The results that are over their budget, by number."""
    ours, stock = _results(case, backend, seed), _results(case, "stock", seed)
    with torch.autocast(case.x.device.type, enabled=False):
        exact = _results(case, "stock", seed, torch.float64)
    found = enumerate(zip(ours, stock, exact))
    return {i for i, (o, s, e) in found if not rms(o.double() - e) <= budget(s, e)}


def _results(case: Posed, backend: str, seed: int, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The output, in training every gradient, and the running statistics behind it."""

    def cast(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().clone().to(dtype or t.dtype)

    x, residual = map(cast, _drawn(case, seed))
    tensors = [cast(t) for t in case.tensors]
    if not case.training:
        with torch.no_grad():
            return [_execute(case.program, backend, x, residual, tensors, {})]
    leaves = _leaves(case, x, residual, tensors)
    with torch.enable_grad():
        out = _execute(case.program, backend, x, residual, tensors, None)
    generator = torch.Generator(out.device).manual_seed(seed + 1)
    cotangent = torch.randn(out.shape, device=out.device, generator=generator).to(case.x.dtype).to(out)
    with torch.autocast(out.device.type, enabled=False):
        grads = torch.autograd.grad(out, leaves, cotangent)
    running = [t for t, original in zip(tensors, case.tensors) if original is not None and not original.requires_grad]
    return [out.detach(), *grads, *running]


def _without_chance(program: Program | DenseProgram) -> Program | DenseProgram:
    """The block without dropout and stochastic depth, whose masks no two implementations draw alike."""

    def sure(chain: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        if chain is None:
            return None
        links = [link._replace(dropout=0.0) for link in chain]
        for i, link in enumerate(links):
            if link.gain is not None:
                gain = link.gain._replace(drop_path=0.0, mask=None) if link.gain.excite is not None else None
                links[i] = link._replace(gain=gain)
        return tuple(links)

    if isinstance(program, DenseProgram):
        return program._replace(layers=tuple(map(sure, program.layers)))
    return program._replace(branch=sure(program.branch), shortcut=sure(program.shortcut))
