"""Running out of memory inside a kernel is an exception, after which the process goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fusedres import env

pytestmark = pytest.mark.skipif(env.library_missing() is not None, reason=str(env.library_missing()))

# In a process of its own, which may take no more memory than it has: what the kernel asks for itself is then refused.
PROGRAM = """
import resource
import torch
import fusedres
from fusedres.select import kernels

THREADS, SHAPE = 2, (4, 1024, 56, 56)

def channels_last(*shape):
    return torch.ones(shape).contiguous(memory_format=torch.channels_last)

def address_space():
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()

torch.set_num_threads(THREADS)
k = kernels("cpu", torch.float32, "cpu")
x, side = channels_last(*SHAPE), channels_last(*SHAPE)
gain, seed = torch.ones(SHAPE[:2]), torch.zeros((), dtype=torch.int64)
rows = torch.ones(4, SHAPE[1])
WINDOW = [3, 3], [2, 2], [1, 1]
pooled, taken = k.join_pool(x, rows, 1, 0.0, *WINDOW, False, True)

def conv_wgrad(channels, filters, size):
    weight, geometry = channels_last(filters, channels, 1, 1), ([1, 1], [0, 0], [1, 1])
    a, grad = channels_last(4, channels, size, size), channels_last(4, filters, size, size)
    out = torch.empty_like(weight)
    return lambda: k.conv_wgrad(grad, a, rows[:, :channels].contiguous(), 1, 0.0, *geometry, out) or out

def conv_winograd(channels):
    weight = channels_last(32, channels, 3, 3)
    packed, a = k.conv_winograd_pack(weight), channels_last(1, channels, 8, 8)
    return lambda: k.conv_winograd(a, packed, 32, None, None, 1, 0.0, [1, 1])

def conv_fused_fprop(channels):
    weight, a = channels_last(channels, channels, 3, 3), channels_last(1, channels, 8, 8)
    out, geometry = torch.empty_like(a), ([1, 1], [1, 1], [1, 1])
    return lambda: (k.conv_fused_fprop(a, None, 0, 0.0, weight, None, *geometry, False, out), out)[1]

# Those that keep their memory: a small call, the one that wants more.
KEEPS = {
    "conv_wgrad": (conv_wgrad(16, 16, 4), conv_wgrad(512, 512, 28)),
    "conv_winograd": (conv_winograd(16), conv_winograd(2048)),
    "conv_fused_fprop": (conv_fused_fprop(16), conv_fused_fprop(512)),
}
CALLS = {
    "bn_stats": lambda: k.bn_stats(x),
    "bn_stats, per sample": lambda: k.bn_stats(x, True),
    "join": lambda: k.join(x, rows, side, rows, 1, 0.0),
    "join_pool": lambda: k.join_pool(x, rows, 1, 0.0, *WINDOW, False, True),
    "join_pool_backward": lambda: k.join_pool_backward(pooled, taken, x, *WINDOW),
    "join_backward_reduce": lambda: k.join_backward_reduce(x, x, rows, side, rows, 1, 0.0, False),
    "join_backward_apply": lambda: k.join_backward_apply(
        x, x, rows, None, None, 1, 0.0, torch.ones(3, SHAPE[1]), 8.0, True, False, False
    ),
}
SMALL, CALLS = CALLS | {name: s for name, (s, _) in KEEPS.items()}, CALLS | {name: l for name, (_, l) in KEEPS.items()}
before = {name: call() for name, call in SMALL.items()}  # threads are there, and all that is allocated once
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
for name, call in CALLS.items():
    resource.setrlimit(resource.RLIMIT_AS, (address_space(), hard))
    try:
        call()
        said = "nothing"
    except (MemoryError, RuntimeError) as error:
        said = type(error).__name__
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    print(name, said, sep=": ")
for name, call in SMALL.items():
    again, first = call(), before[name]
    for a, b in zip(*((t if isinstance(t, tuple) else (t,)) for t in (again, first))):
        assert torch.equal(a, b), name
print("went on")
"""


def test_out_of_memory_is_an_exception():
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    *calls, last = done.stdout.splitlines()
    assert last == "went on"
    assert len(calls) == 10
    assert all(call.endswith((": MemoryError", ": RuntimeError")) for call in calls), calls
