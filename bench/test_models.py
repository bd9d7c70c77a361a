"""Whole networks: training steps and inference, eager and fused."""

from __future__ import annotations

import pytest
import torch

from fusedres import models
from fusedres.benchmarking.shapes import BATCH, NETWORKS, SMOKE_BATCH, name_of
from fusedres.benchmarking.workloads import INFERENCE_BF16, INFERENCE_FP32, TRAIN_BF16, TRAIN_FP32, Batch, settle
from fusedres.patch import patch

WORKLOADS = (TRAIN_BF16, TRAIN_FP32, INFERENCE_BF16, INFERENCE_FP32)


@pytest.mark.parametrize("contestant", ["eager", "fusedres"])
@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
@pytest.mark.parametrize("network", NETWORKS)
def test_model(race, smoke, network, workload, contestant):
    size = SMOKE_BATCH if smoke else BATCH
    batch = Batch.random(*size, num_classes=10)
    torch.manual_seed(0)
    model = getattr(models, network)(fused=False).to(memory_format=torch.channels_last)
    settle(model, batch.images)
    if contestant == "fusedres":
        workload.check(model, lambda seed: Batch.random(*size, seed).images).check()
    model = workload.prepared(model)
    if contestant == "fusedres":
        patch(model)
    step = workload.stepper(batch)(model)
    group = f"{network} {workload.name} {name_of(size)}"
    race(group, step, dtype=workload.autocast or workload.dtype, images=len(batch))
