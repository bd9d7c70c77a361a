"""The launches that ResNet-50 makes, for compiling without a GPU: every kernel with every form of it that a block uses.

``python -m fusedres.triton.shipped FILE`` compiles them for every architecture and writes what they need, which the
tests compare with: a change of a kernel that costs registers shows as a difference in a file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from . import load
from .launch import Launch, recorded
from .tuning import fixed, heuristic, observed, variants

__all__ = ["capabilities", "launches", "measured"]

_BATCH = 256
_RELU = 1


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
    from .rk_combine import rk_combine, rk_combine_backward, rk_error

    wide, narrow, small = _image(256, 56, dtype), _image(64, 56, dtype), _image(512, 28, dtype)
    rows, thin, gain = _rows(256), _rows(64), torch.empty((_BATCH, 256), device="meta")
    seed = torch.empty(1, dtype=torch.int64, device="meta")
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
    torch.float32: ("fprop 1x1", "fprop 3x3", "dgrad 1x1", "wgrad 1x1"),
    torch.float16: ("fprop 1x1",),
}


def launches() -> dict[str, Launch]:
    """Every different launch of the calls, by name: as the heuristic has it, and in the ways that tuning also tries."""
    load()
    found: dict[str, Launch] = {}
    seen = set()
    for dtype, names in _FORMS.items():
        short = str(dtype).removeprefix("torch.")
        for name, call in _calls(dtype).items():
            if names is not None and name not in names:
                continue
            for way, several in _ways(call).items():
                for each in several:
                    form = _form(each)
                    if form not in seen:
                        seen.add(form)
                        found[f"{name}{way}, {short}: {each.kernel.__name__}"] = each
    return found


def _ways(call: Callable[[], Any]) -> dict[str, list[Launch]]:
    """The launches of a call by the way that tiles come and are walked over."""
    with observed() as problems, recorded() as plain:
        call()
    found = {"": plain}
    for problem in problems:
        for tiles in variants(problem, heuristic(problem)):
            with fixed(tiles), recorded() as several:
                call()
            found[" persistent" if tiles.persistent else " by descriptor"] = several
    return found


def _form(launch: Launch) -> tuple[Any, ...]:
    """What makes a specialisation, as far as these calls differ in it."""
    kinds = tuple(
        (name, str(value.dtype) if isinstance(value, Tensor) else value is None or (name.endswith("pitch") and value))
        for name, value in launch.args.items()
    )
    return launch.kernel.__name__, kinds, tuple(launch.meta.items()), tuple(launch.options.items())


def measured(names: Sequence[str] | None = None) -> dict[str, dict[str, list[Any]]]:
    """The :class:`~fusedres.triton.offline.Resources` of every launch, by the architectures that it is tried on."""
    from .offline import compiled

    return {
        name: {f"sm_{c}": list(compiled(launch, c)) for c in capabilities(launch)}
        for name, launch in launches().items()
        if names is None or name in names
    }


def capabilities(launch: Launch) -> list[int]:
    """Those that a launch is for, of :data:`~fusedres.triton.offline.CAPABILITIES`: see :func:`~.tuning.variants`."""
    from .offline import CAPABILITIES

    if launch.meta.get("PERSISTENT"):
        return [90]
    return [c for c in CAPABILITIES if c >= 90 or not launch.meta.get("DESCRIPTORS")]


if __name__ == "__main__":
    lines = [f'  "{name}": {json.dumps(row)}' for name, row in measured().items()]
    table = ",\n".join(lines)
    Path(sys.argv[1]).write_text(f'{{\n "triton": "{triton.__version__}",\n "kernels": {{\n{table}\n }}\n}}\n')
