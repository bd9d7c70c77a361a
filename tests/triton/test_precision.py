"""How float32 is multiplied, however PyTorch has been told."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from fusedres import triton as backend

pytestmark = pytest.mark.skipif(backend.missing() is not None, reason=str(backend.missing()))

SETTINGS = {  # what a convolution and a dense layer of float32 then run with
    "pass": ("tf32", "ieee"),  # as PyTorch begins
    "backends.cudnn.conv.fp32_precision = 'ieee'": ("ieee", "ieee"),
    "backends.cudnn.conv.fp32_precision = 'tf32'": ("tf32", "ieee"),
    "backends.cudnn.fp32_precision = 'ieee'": ("ieee", "ieee"),
    "backends.fp32_precision = 'ieee'": ("ieee", "ieee"),
    "backends.fp32_precision = 'tf32'": ("tf32", "tf32"),
    "backends.fp32_precision = 'ieee'; backends.cudnn.conv.fp32_precision = 'tf32'": ("tf32", "ieee"),
    "backends.fp32_precision = 'ieee'; backends.cudnn.conv.fp32_precision = 'none'": ("ieee", "ieee"),
    "backends.cuda.matmul.fp32_precision = 'tf32'": ("tf32", "tf32"),
    "backends.cudnn.allow_tf32 = False": ("ieee", "ieee"),
    "backends.cuda.matmul.allow_tf32 = True": ("tf32", "tf32"),
    "torch.set_float32_matmul_precision('high')": ("tf32", "tf32"),
}

# Each setting in a process of its own, for none can be undone: children of one that has imported everything.
LAUNCHES = """
import json, os, sys
import torch
from torch import backends
from fusedres.triton.conv_fused import conv_fused_fprop
from fusedres.triton.conv_fused_backward import conv_fused_dgrad, conv_fused_wgrad
from fusedres.triton.excite import excite
from fusedres.triton.launch import recorded

def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=torch.channels_last)

geometry = [1, 1], [0, 0], [1, 1]
x, weight = empty(2, 8, 4, 4), empty(8, 8, 1, 1)
half, narrow = empty(2, 8, 4, 4, dtype=torch.bfloat16), empty(8, 8, 1, 1, dtype=torch.bfloat16)
means, layer = torch.empty(2, 8, device="meta"), torch.empty(8, 8, device="meta")
for setting in json.loads(sys.argv[1]):
    if os.fork():
        os.wait()
        continue
    try:
        exec(setting)
        with recorded() as launches:
            conv_fused_fprop(x, None, 0, 0.0, weight, None, *geometry, False)
            conv_fused_dgrad(x, None, None, weight, x, None, 0, 0.0, *geometry)
            conv_fused_wgrad(x, None, None, x, None, 0, 0.0, *geometry, weight)
            excite(means, None, layer, None, layer, None, 1, 0.0, "sigmoid", None)
            conv_fused_fprop(half, None, 0, 0.0, narrow, None, *geometry, False)
        found = [each.meta["PRECISION"] for each in launches if "PRECISION" in each.meta]
    except Exception as error:
        found = repr(error)
    print(json.dumps([setting, found]), flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def precisions():
    command = [sys.executable, "-c", LAUNCHES, json.dumps(list(SETTINGS))]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(map(json.loads, result.stdout.splitlines()))


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting(precisions, setting):
    convolutions, layers = SETTINGS[setting]
    assert precisions[setting] == [convolutions] * 3 + [layers, "ieee"]
