"""Every launch of every op: on the current stream, and its error is raised by the call that it belongs to."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cuda_convs import GroupedCase
from cuda_ops import RK_WEIGHTS, JoinCase

from fusedres.ops.registry import OPS

SOURCES = Path(__file__).resolve().parents[3] / "csrc" / "cuda"

CASE = JoinCase((2, 16, 5, 3), residual="plain")
CONV = GroupedCase((2, 16, 5, 5), 16, 4)
NORMED = (None, None, None, None, 0.1, 1e-5)  # a batch norm without affine and running statistics
PASSES = (*CASE.operands, False)
WINDOW = ([3, 3], [2, 2], [1, 1])
TAKEN = torch.zeros((2, 16, 3, 2), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)


def arguments() -> dict[str, tuple]:
    """By op, what it is called with."""
    y, grad, side = CASE.y, CASE.grad, CASE.side
    flags = (CASE.count, True, False, True)
    conv = (*CONV.pending, CONV.weight, None, *CONV.geometry)
    return {
        "bn_stats": (y,),
        "bn_norm": (torch.ones(2, 16), 4.0, *NORMED),
        "bn_join": (y, *NORMED, *CASE.operands[2:]),
        "join": CASE.operands,
        "join_stats": CASE.operands,
        "join_backward_reduce": (grad, *PASSES),
        "join_backward_apply": (grad, *CASE.operands, CASE.sums()[:3].contiguous(), *flags),
        "join_backward": (grad, *PASSES, *flags),
        "join_pool": (y, *CASE.operands[1:2], *CASE.operands[4:], *WINDOW, False, True),
        "join_pool_backward": (y[:, :, :3, :2].contiguous(memory_format=torch.channels_last), TAKEN, y, *WINDOW),
        "gated_join": (y, grad, side, None),
        "gated_join_backward": (grad, y, side, y, None, True, True),
        "rk_combine": (y, [grad, side], RK_WEIGHTS[:2]),
        "rk_combine_backward": (y, RK_WEIGHTS[:2]),
        "rk_error": (y, grad, [side], RK_WEIGHTS[:1], 1e-3, 1e-3),
        "conv_fused_fprop": (*conv, True),
        "conv_fused_join": (*conv, None, None, None, 1, 0.0),
        "conv_fused_dgrad": (*CONV.gradient, CONV.weight, *CONV.pending, *CONV.geometry),
        "conv_fused_wgrad": (*CONV.gradient, *CONV.pending, *CONV.geometry, torch.empty_like(CONV.weight)),
        "bn_grad_rows": (torch.ones(4, 16), torch.ones(2, 16), 4.0),
    }


def test_no_op_is_left_out():
    assert set(arguments()) == {name for name, op in OPS.items() if "cuda" in op.kernels}


@pytest.mark.parametrize("l2_bytes", [50 << 20, 0], ids=["in the cache", "beyond it"])
@pytest.mark.parametrize("name", arguments())
def test_the_error_of_every_launch_is_raised_once(emulated, name, l2_bytes):
    emulated.emu_l2_bytes(l2_bytes)
    call: Callable = OPS[name].overload("cuda")
    before = emulated.emu_launches()
    call(*arguments()[name])
    launches = emulated.emu_launches() - before
    assert launches > 0
    for refused in range(launches):
        emulated.emu_fail(refused)
        with pytest.raises(RuntimeError, match=r"fusedres: cuda.*refused, as emu_fail asks for"):
            call(*arguments()[name])
        call(*arguments()[name])  # a stale error would be found here


def test_every_launch_is_on_the_current_stream():
    found = 0
    for path in sorted([*SOURCES.glob("*.cu"), *SOURCES.glob("*.h")]):
        text = path.read_text()
        streams = [launch.split(",")[-1].strip() for launch in re.findall(r"<<<(.*?)>>>", text, re.DOTALL)]
        streams += re.findall(r"config\.stream = (.*);", text)
        assert all(re.fullmatch(r"(call\.)?device\.stream\(\)", stream) for stream in streams), (
            f"{path.name}: {streams}"
        )
        found += len(streams)
    assert found > 10
