"""``python -m tools.gpu.stream DEVICE``: whether the library finds torch's current stream, as JSON.

The kernels ask torch for it through a symbol of the stable ABI that is *weak*, for CPU builds of torch lack it. A weak
symbol that is not found is null without a word, so it is looked up here as the loader does, and used.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys

import torch

from fusedres import env
from fusedres.ops.bn_stats import BN_STATS

__all__ = ["look"]

SYMBOL = "aoti_torch_get_current_cuda_stream"


def look(device: str) -> dict[str, object]:
    """What was found in words, and what is wrong."""
    if reason := env.library_missing():
        return {"told": "no library", "problems": [reason]}
    loaded = hasattr(ctypes.CDLL(None), SYMBOL) or _in_torch()
    if device == "cpu":
        wanted = torch.version.cuda is not None
        problems = (
            [] if loaded is wanted else [f"{SYMBOL} {'exists' if loaded else 'is missing'} in this build of torch"]
        )
        return {"told": "there" if loaded else "null, as it must be in a CPU build of torch", "problems": problems}
    problems = [] if loaded else [f"{SYMBOL} is not in libtorch_cuda.so"]
    if reason := env.cuda_missing():
        return {"told": "no CUDA kernels", "problems": [*problems, reason]}
    problems += _runs_on_the_current_stream()
    return {"told": "WRONG" if problems else "found, and the kernels run on it", "problems": problems}


def _in_torch() -> bool:
    """Whether torch's own library of CUDA parts has it: that is not in the global scope."""
    try:
        return hasattr(ctypes.CDLL("libtorch_cuda.so", mode=os.RTLD_NOLOAD | os.RTLD_LAZY), SYMBOL)
    except OSError:
        return False


def _runs_on_the_current_stream() -> list[str]:
    """A kernel behind a long wait on a stream of its own must see what the stream wrote before it."""
    x = torch.zeros(8, 64, 28, 28, device="cuda").to(memory_format=torch.channels_last)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.fill_(3.0)
        mean = BN_STATS.overload("cuda")(x)[0]
    stream.synchronize()
    wrong = not torch.equal(mean, torch.full_like(mean, 3.0))
    return [f"bn_stats ran on another stream than the current one: mean {mean[0].item()}, not 3"] if wrong else []


if __name__ == "__main__":
    print(json.dumps(look(sys.argv[1])))
