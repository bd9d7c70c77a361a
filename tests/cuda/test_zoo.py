"""Whole networks of this package, torchvision and timm on a GPU, by both of its backends."""

from __future__ import annotations

import pytest
import torch
from device_zoo import NETWORKS, check_network

from fusedres import env


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", NETWORKS)
def test_network(name, training, dtype, backend):
    if backend == "triton" and (reason := env.triton_missing()):
        pytest.skip(reason)
    # Products of float32 in float32, by every implementation; float64's have no reduced form.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        check_network(name, dtype, training, "cuda", backend)
