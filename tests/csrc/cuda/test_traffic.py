"""What the passes move: every load and store of a tensor moves the sectors that it needs, and no others."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cuda_ops import POOLINGS, RK_WEIGHTS, JoinCase, PoolCase

from fusedres.ops.registry import OPS
from fusedres.testing import channels_last

SHAPE = (2, 64, 8, 8)  # rows of whole sectors in every dtype


def run(name: str, *args: object) -> None:
    OPS[name].overload("cuda")(*args)


def join(case: JoinCase) -> None:
    run("join", *case.operands)


def join_stats(case: JoinCase) -> None:
    run("join_stats", *case.operands)


def bn_join(case: JoinCase) -> None:
    run("bn_join", case.y, None, None, None, None, 0.1, 1e-5, *case.operands[2:])


def join_backward(case: JoinCase) -> None:
    run("join_backward", case.grad, *case.operands, True, case.count, True, False, True)


def gated_join(case: JoinCase) -> None:
    run("gated_join", case.y, case.grad, case.side, None)


def gated_join_backward(case: JoinCase) -> None:
    run("gated_join_backward", case.grad, case.y, case.side, case.y, None, True, True)


def rk_combine(case: JoinCase) -> None:
    run("rk_combine", case.y, [case.grad, case.side], RK_WEIGHTS[:2])


def rk_error(case: JoinCase) -> None:
    run("rk_error", case.y, case.grad, [case.side], RK_WEIGHTS[:1], 1e-3, 1e-3)


# How often a tensor's size is read and written; where one launch holds two passes, the second reads from the cache.
PASSES: dict[Callable[[JoinCase], None], int] = {
    join: 3,
    join_stats: 3,
    bn_join: 1 + 3,
    join_backward: 3 + 1 + 3 + 2,
    gated_join: 4,
    gated_join_backward: 4 + 3,
    rk_combine: 4,
    rk_error: 3,
}


def sectors_moved(emulated: ctypes.CDLL, call: Callable[[], object]) -> int:
    """By the loads and stores of tensors, which must need all that they move."""
    emulated.emu_traffic.restype = ctypes.c_char_p
    emulated.emu_clear_traffic()
    emulated.emu_count_traffic(1)
    call()
    emulated.emu_count_traffic(0)
    entries = [json.loads(line) for line in emulated.emu_traffic().splitlines()]
    moves = [e for e in entries if e["at"].startswith("pack.h") and e["space"] == "global"]
    assert all(e["sectors"] == e["ideal"] for e in moves)
    return sum(e["sectors"] for e in moves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", PASSES, ids=lambda op: op.__name__)
def test_tensors_are_moved_in_whole_sectors(emulated, op, dtype):
    case = JoinCase(SHAPE, "channels_last", dtype, "plain")
    moved = sectors_moved(emulated, lambda: op(case))
    needed = PASSES[op] * channels_last(SHAPE, dtype).nbytes // 32
    # Statistics are relative to the first pixel of the result, which every block makes for itself.
    assert needed < moved < 1.2 * needed if op is join_stats else moved == needed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", POOLINGS)
def test_pooling_moves_whole_sectors(emulated, window, dtype):
    """Forward a pixel is read by every window that it is in; backward it reads of each the gradient and the number.

    A warp has the channels of one pixel here: of several it would find some of the reads to be the same.
    """
    n, c, height, width = 2, 512 // dtype.itemsize, 6, 6
    case = PoolCase((n, c, height, width), POOLINGS[window], dtype=dtype)
    out, taken = case.pooled()
    inside = F.avg_pool2d(torch.ones(1, 1, height, width), *case.window, divisor_override=1).sum()
    pairs = int(inside) * n * c
    forward = sectors_moved(emulated, case.pooled)
    assert forward == (pairs * dtype.itemsize + out.nbytes + taken.nbytes) // 32
    backward = sectors_moved(emulated, lambda: run("join_pool_backward", out, taken, case.y, *case.window[:3]))
    assert backward == (pairs * (dtype.itemsize + 1) + case.y.nbytes) // 32
