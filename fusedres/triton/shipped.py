"""The launches that ResNet-50 makes, for compiling without a GPU: every kernel with every form of it that a block uses.

Convolutions come in every tile that the heuristic has for one of ResNet-50's, with every prologue and epilogue, with
every activation, and in float32 with and without TensorFloat-32. :func:`tabled` has what the tables that come with
the package have chosen.

``python -m fusedres.triton.shipped FILE`` compiles them for every architecture and writes what they need, which the
tests compare with: a change of a kernel that costs registers shows as a difference in a file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from ..ops.activations import ACTIVATIONS
from ..ops.conv import ConvGeometry
from . import load, tuning
from .kernels_doc import convolutions
from .launch import Launch, recorded
from .tuning import Problem, assumed, fixed, heuristic, observed, problem_of, variants

__all__ = ["launches", "measured", "problems", "tabled"]

_BATCH = 256
_RELU = ACTIVATIONS["relu"].code


def _image(channels: int, size: int, dtype: torch.dtype) -> Tensor:
    shape = (_BATCH, channels, size, size)
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)


def _weight(filters: int, channels: int, kernel: int, dtype: torch.dtype) -> Tensor:
    shape = (filters, channels, kernel, kernel)
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)


def _rows(channels: int) -> Tensor:
    return torch.empty((4, channels), device="meta")


def _calls(dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Calls by name, on tensors without memory."""
    from .bn_norm import bn_norm
    from .bn_stats import bn_stats
    from .conv_fused import conv_fused_fprop, conv_fused_join
    from .conv_fused_backward import bn_grad_rows, conv_fused_dgrad, conv_fused_wgrad
    from .excite import excite
    from .gated_join import gated_join, gated_join_backward
    from .join import join
    from .join_backward import join_backward_apply, join_backward_mask, join_backward_reduce
    from .join_pool import join_pool, join_pool_backward
    from .rk_combine import rk_combine, rk_combine_backward, rk_error

    wide, narrow, small = _image(256, 56, dtype), _image(64, 56, dtype), _image(512, 28, dtype)
    rows, thin, gain = _rows(256), _rows(64), torch.empty((_BATCH, 256), device="meta")
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    stem, taken, window = _image(64, 112, dtype), torch.empty_like(narrow, dtype=torch.uint8), ([3, 3], [2, 2], [1, 1])
    vector = torch.empty(256, device="meta")
    nothing = (None, 0, 0.0)
    one, three, half = ([1, 1], [0, 0], [1, 1]), ([1, 1], [1, 1], [1, 1]), ([2, 2], [0, 0], [1, 1])
    shrink, expand, taps = (_weight(*shape, dtype) for shape in ((64, 256, 1), (256, 64, 1), (64, 64, 3)))
    project = _weight(512, 256, 1, dtype)
    kernel = torch.empty_like
    narrowed, widened = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((64, 256), (256, 64)))
    layers = (narrowed, vector.to(dtype)[:64], widened, vector.to(dtype))
    both = (wide, rows, wide, rows, _RELU, 0.0)
    plain = (wide, rows, None, None, _RELU, 0.0)
    return {
        "bn_stats": lambda: bn_stats(wide),
        "bn_stats per sample": lambda: bn_stats(wide, True),
        "bn_norm": lambda: bn_norm(_rows(256)[:2], 802816.0, vector, vector, vector, vector, 0.1, 1e-5),
        "join": lambda: join(*both),
        "join gain dropout": lambda: join(*plain, gain, 0.3, seed),
        "join_backward_reduce": lambda: join_backward_reduce(wide, *both, False),
        "join_backward_reduce emit": lambda: join_backward_reduce(wide, *plain, True, gain, 0.3, seed),
        "join_backward_mask": lambda: join_backward_mask(wide, *both, False),
        "join_backward_mask emit": lambda: join_backward_mask(wide, *plain, True, 0.3, seed),
        "join_backward_apply": lambda: join_backward_apply(wide, *both, rows, 802816.0, True, True, True),
        "join_pool": lambda: join_pool(stem, thin, _RELU, 0.0, *window, False, True),
        "join_pool no record": lambda: join_pool(stem, thin, _RELU, 0.0, *window, False, False),
        "join_pool_backward": lambda: join_pool_backward(narrow, taken, stem, *window),
        "gated_join": lambda: gated_join(wide, wide, wide, None),
        "gated_join_backward": lambda: gated_join_backward(wide, wide, wide, wide, 0.5, True, True),
        "excite": lambda: excite(gain, rows, *layers, _RELU, 0.0, "sigmoid", None),
        "rk_combine": lambda: rk_combine(wide, [wide] * 6, [0.5] * 6),
        "rk_combine_backward": lambda: rk_combine_backward(wide, [0.5] * 6),
        "rk_error": lambda: rk_error(wide, wide, [wide] * 7, [0.5] * 7, 1e-3, 1e-3),
        "bn_grad_rows": lambda: bn_grad_rows(rows, rows, 802816.0),
        "fprop 1x1": lambda: conv_fused_fprop(wide, rows, _RELU, 0.0, shrink, None, *one, True),
        "fprop 1x1 plain": lambda: conv_fused_fprop(narrow, *nothing, expand, None, *one, True),
        "fprop 1x1 stride 2": lambda: conv_fused_fprop(wide, *nothing, project, None, *half, True),
        "fprop 3x3": lambda: conv_fused_fprop(narrow, thin, _RELU, 0.0, taps, None, *three, True),
        "join 1x1": lambda: conv_fused_join(narrow, *nothing, expand, None, *one, rows, wide, None, _RELU, 0.0),
        "join 3x3": lambda: conv_fused_join(narrow, *nothing, taps, None, *three, thin, None, None, _RELU, 0.0),
        "dgrad 1x1": lambda: conv_fused_dgrad(wide, wide, rows, expand, narrow, thin, _RELU, 0.0, *one),
        "dgrad 1x1 skip": lambda: conv_fused_dgrad(narrow, narrow, thin, shrink, wide, *nothing, *one, wide),
        "dgrad 1x1 stride 2": lambda: conv_fused_dgrad(small, small, _rows(512), project, wide, *nothing, *half, wide),
        "dgrad 3x3": lambda: conv_fused_dgrad(narrow, narrow, thin, taps, narrow, thin, _RELU, 0.0, *three),
        "wgrad 1x1": lambda: conv_fused_wgrad(wide, wide, rows, narrow, thin, _RELU, 0.0, *one, kernel(expand)),
        "wgrad 1x1 plain": lambda: conv_fused_wgrad(narrow, narrow, thin, wide, *nothing, *one, kernel(shrink)),
        "wgrad 3x3": lambda: conv_fused_wgrad(narrow, narrow, thin, narrow, thin, _RELU, 0.0, *three, kernel(taps)),
    }


# float16 compiles to what bfloat16 does but for the names of instructions.
_FORMS = {
    torch.bfloat16: None,
    torch.float32: ("join_pool", "join_pool_backward", "fprop 1x1", "fprop 3x3", "dgrad 1x1", "wgrad 1x1"),
    torch.float16: ("fprop 1x1",),
}


_COSTLY = ("pending", "pending, skip")  # forms whose registers the activation decides


def _around(problem: Problem, act: int = _RELU) -> dict[str, Callable[[], Any]]:
    """A pass of a convolution with what the engine may have around it, by the names of these, the usual one first."""
    from .conv_fused import conv_fused_fprop, conv_fused_join
    from .conv_fused_backward import conv_fused_dgrad, conv_fused_wgrad

    (_, channels, size, _), filters, dtype = problem.shape, problem.filters, problem.dtype
    x, y = _image(channels, size, dtype), _image(filters, problem.size[0], dtype)
    weight = _weight(filters, channels, problem.kernel_size[0], dtype)
    inside, outside, bias = _rows(channels), _rows(filters), torch.empty(filters, dtype=dtype, device="meta")
    raw = (y, outside) if problem.prologue else (None, None)
    pending, plain = (inside, act, 0.0), (None, 0, 0.0)
    g = tuple(map(list, problem.geometry[:3]))
    strided = problem.geometry.stride != (1, 1)
    if problem.kind == "fprop" and strided:
        return {
            "pending": lambda: conv_fused_fprop(x, *pending, weight, None, *g, True),
            "plain": lambda: conv_fused_fprop(x, *plain, weight, None, *g, True),
        }
    if problem.kind == "fprop":
        ending = (act, 0.0)
        return {
            "pending": lambda: conv_fused_fprop(x, *pending, weight, None, *g, True),
            "pending, bias": lambda: conv_fused_fprop(x, *pending, weight, bias, *g, True),
            "plain": lambda: conv_fused_fprop(x, *plain, weight, None, *g, True),
            "pending, join": lambda: conv_fused_join(x, *pending, weight, None, *g, outside, y, None, *ending),
            "pending, projected join": (
                lambda: conv_fused_join(x, *pending, weight, None, *g, outside, y, outside, *ending)
            ),
            "plain, join": lambda: conv_fused_join(x, *plain, weight, None, *g, outside, y, None, *ending),
        }
    if problem.kind == "wgrad":
        out = torch.empty_like(weight)
        return {
            "pending": lambda: conv_fused_wgrad(y, *raw, x, *pending, *g, out),
            "plain": lambda: conv_fused_wgrad(y, *raw, x, *plain, *g, out),
        }
    if strided:
        return {
            "plain, skip": lambda: conv_fused_dgrad(y, *raw, weight, x, *plain, *g, x),
            "plain": lambda: conv_fused_dgrad(y, *raw, weight, x, *plain, *g),
        }
    return {
        "pending": lambda: conv_fused_dgrad(y, *raw, weight, x, *pending, *g),
        "pending, skip": lambda: conv_fused_dgrad(y, *raw, weight, x, *pending, *g, x),
        "plain, skip": lambda: conv_fused_dgrad(y, *raw, weight, x, *plain, *g, x),
    }


def problems(dtype: torch.dtype) -> Iterator[tuple[str, Problem]]:
    """The passes of ResNet-50's convolutions that are ours, by name."""
    for size, channels, filters, kernel, stride, _ in convolutions():
        geometry = ConvGeometry((stride, stride), (kernel // 2, kernel // 2), (1, 1), 1)
        name = f"{kernel}x{kernel} {channels} to {filters}" + (f" stride {stride}" if stride > 1 else "")
        for kind in ("fprop", "dgrad", "wgrad"):
            if kind != "dgrad" or stride == 1 or kernel == 1:
                shape = (_BATCH, channels, size, size)
                yield f"{kind} {name}", Problem(kind, dtype, shape, filters, (kernel, kernel), geometry, True)


def launches(capability: int) -> dict[str, Launch]:
    """Every different launch of the calls, by name: as the heuristic has it, and in the ways that tuning also tries.

    Convolutions of other tiles, activations and precisions are there as the heuristic has them, once for each
    specialisation.

    Args:
        capability: of the device, 90 for sm_90.
    """
    load()
    found: dict[str, Launch] = {}
    seen = set()

    def add(name: str, short: str, several: Sequence[Launch]) -> None:
        for each in several:
            form = _form(each)
            if form not in seen:
                seen.add(form)
                found[f"{name}, {short}: {each.kernel.__name__}"] = each

    with assumed(capability // 10):
        for dtype, names in _FORMS.items():
            short = str(dtype).removeprefix("torch.")
            for name, call in _calls(dtype).items():
                if names is None or name in names:
                    for way, several in _ways(call, capability // 10).items():
                        add(name + way, short, several)
        for act in ("relu", *(name for name in ACTIVATIONS if name not in ("identity", "relu"))):
            for name, problem in problems(torch.bfloat16):
                for form, call in _around(problem, ACTIVATIONS[act].code).items():
                    if act == "relu" or (form in _COSTLY and problem.geometry.stride == (1, 1)):
                        add(f"{name}, {form}" + f" {act}" * (act != "relu"), "bfloat16", _recorded(call))
        for allowed, short in ((True, "float32"), (False, "float32 without TF32")):
            with _tf32(allowed):
                for name, problem in problems(torch.float32):
                    if problem.geometry.stride == (1, 1):
                        add(f"{name}, pending", short, _recorded(_around(problem)["pending"]))
    return found


def _recorded(call: Callable[[], Any]) -> list[Launch]:
    with recorded() as several:
        call()
    return several


def _ways(call: Callable[[], Any], capability: int) -> dict[str, list[Launch]]:
    """The launches of a call by the way that tiles come and are walked over."""
    with observed() as asked, recorded() as plain:
        call()
    found = {"": plain}
    for problem in asked:
        for tiles in variants(problem, heuristic(problem), capability):
            with fixed(tiles), recorded() as several:
                call()
            found[" persistent" if tiles.persistent else " by descriptor"] = several
    return found


def _form(launch: Launch) -> str:
    """What makes a specialisation."""
    from .offline import specialisation

    return repr((launch.kernel.__name__, specialisation(launch), launch.options))


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def tabled(folder: Path = tuning._TABLES) -> dict[str, tuple[Launch, int]]:
    """What the tables of the package have chosen: the launches of every entry, and its device's compute capability."""
    load()
    found = {}
    for path in sorted(folder.glob("*.json")):
        for key, entry in tuning._read(path).entries.items():
            problem = problem_of(key)
            forms = _around(problem)
            call = next(call for form, call in forms.items() if problem.prologue or form.startswith("plain"))
            with fixed(entry.tiles):
                several = _recorded(call)
            for launch in several:
                found[f"{path.stem}, {key}: {launch.kernel.__name__}"] = launch, _capability(path.stem)
    return found


def measured() -> dict[str, dict[str, list[Any]]]:
    """The :class:`~fusedres.triton.offline.Resources` of every launch, by the architectures that make it."""
    from .offline import CAPABILITIES, compiled

    found: dict[str, dict[str, list[Any]]] = {}
    for capability in CAPABILITIES:
        for name, launch in launches(capability).items():
            found.setdefault(name, {})[f"sm_{capability}"] = list(compiled(launch, capability))
    return found


# What the names of NVIDIA's accelerators say, among those that kernels are compiled for here.
_DEVICES = {"a100": 80, "h100": 90, "h200": 90, "gh200": 90, "b200": 100, "gb200": 100}


def _capability(device: str) -> int:
    """Of a device by its name, as :func:`~fusedres.triton.tuning.device_name` spells it."""
    found = [capability for name, capability in _DEVICES.items() if name in device.split("-")]
    if not found:
        raise ValueError(f"there is a table for {device}, whose compute capability _DEVICES does not have")
    return found[0]


if __name__ == "__main__":
    lines = [f'  "{name}": {json.dumps(row)}' for name, row in measured().items()]
    table = ",\n".join(lines)
    Path(sys.argv[1]).write_text(f'{{\n "triton": "{triton.__version__}",\n "kernels": {{\n{table}\n }}\n}}\n')
