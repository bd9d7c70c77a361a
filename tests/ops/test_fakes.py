"""Fakes tell the true shapes, dtypes and strides, for every layout that an op takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fusedres.testing import channels_last, contiguous, sliced

LAYOUTS = {"channels_last": channels_last, "contiguous": contiguous, "sliced": sliced}
SHAPES = ((2, 5, 4, 3), (2, 1, 4, 3), (1, 5, 1, 1), (0, 5, 4, 3))
DTYPES = (torch.float32, torch.bfloat16)


def rows(x: Tensor) -> Tensor:
    return torch.rand(4, x.shape[1]) + 0.5


def vector(x: Tensor) -> Tensor:
    return torch.rand(x.shape[1]) + 0.5


def gain(x: Tensor) -> Tensor:
    return torch.rand(x.shape[:2]) + 0.5


SEED = torch.tensor([3])


def reductions(y: Tensor, r: Tensor, g: Tensor) -> list[tuple]:
    plain = (g, y, rows(y), r, rows(y), 1, 0.0)
    return [(*plain, False), (*plain, True), (g, y, None, None, None, 4, 0.0, True, gain(y), 0.5, SEED)]


def applications(y: Tensor, r: Tensor, g: Tensor) -> list[tuple]:
    count, sums = float(max(y.numel() // y.shape[1], 1)), torch.rand(3, y.shape[1])
    norm = (g, y, rows(y), r, rows(y), 1, 0.0, sums, count)
    return [
        (*norm, True, True, True),
        (*norm, True, False, False),
        (g, y, None, r, None, 1, 0.0, None, count, *3 * [False]),
    ]


# What each op is called with, from three tensors of one layout.
CALLS: dict[str, Callable[[Tensor, Tensor, Tensor], list[tuple]]] = {
    "bn_stats": lambda y, r, g: [(y,), (y, True)],
    "bn_norm": lambda y, r, g: [
        (torch.rand(2, y.shape[1]), 60.0, vector(y), vector(y), vector(y), vector(y), 0.1, 1e-5),
        (None, 1.0, None, None, vector(y), vector(y), 0.0, 1e-5),
    ],
    "join": lambda y, r, g: [
        (y, rows(y), r, rows(r), 1, 0.0),
        (y, None, r, None, 0, 0.0),
        (y, rows(y), None, None, 4, 0.0, gain(y), 0.5, SEED),
    ],
    "join_backward_reduce": reductions,
    "join_backward_apply": applications,
    "gated_join": lambda y, r, g: [(y, g, r, None), (y, g, r, 0.5)],
    "gated_join_backward": lambda y, r, g: [(g, y, r, y, None, True, True), (g, y, None, None, None, True, False)],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", [f"{op}{suffix}" for op in CALLS for suffix in ("", "_cpu")])
def test_every_layout(name, shape, layout, dtype):
    stem = name.removesuffix("_cpu")
    if (stem.startswith("gated") and layout == "sliced") or (stem == "bn_stats" and not shape[0]):
        pytest.skip("not a tensor that the kernel takes")
    op = getattr(torch.ops.fusedres, name).default
    y, r, g = (LAYOUTS[layout](shape, dtype, seed) for seed in range(3))
    for arguments in CALLS[stem](y, r, g):
        mode = FakeTensorMode()
        fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments]
        with mode:
            predicted = op(*fakes)
        assert metadata(op(*arguments)) == metadata(predicted)


def metadata(results: Any) -> list[tuple]:
    """Shape, dtype and strides of each result, but for strides along one element or none: those say nothing."""
    tensors = results if isinstance(results, (tuple, list)) else [results]
    strides = ([step for step, size in zip(t.stride(), t.shape) if size > 1 and t.numel()] for t in tensors)
    return [(t.shape, t.dtype, steps) for t, steps in zip(tensors, strides)]
