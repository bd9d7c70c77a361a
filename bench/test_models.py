"""Whole networks: training steps and inference, by everyone who can run them."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from bench.shapes import NETWORKS, SMOKE_BATCH, name_of
from fusedres.analysis.devices import device_of
from fusedres.analysis.traffic import traffic_on
from fusedres.benchmarking.contest import enter_all
from fusedres.benchmarking.peers import BASELINE, OURS, PEERS
from fusedres.benchmarking.results import Measurement
from fusedres.benchmarking.workloads import INFERENCE_BF16, INFERENCE_FP32, TRAIN_BF16, TRAIN_FP32, Batch, settle

WORKLOADS = (TRAIN_BF16, TRAIN_FP32, INFERENCE_BF16, INFERENCE_FP32)
CASES = [(name, batch) for name, network in NETWORKS.items() for batch in network.batches]
SMOKE_PEERS = (BASELINE, OURS)
"""The others have tests of their own, of which some compile."""


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
@pytest.mark.parametrize(
    ("network", "batch"), CASES, ids=lambda value: value if isinstance(value, str) else name_of(value)
)
def test_model(enter, smoke, network, batch, workload, peer):
    if smoke and peer not in SMOKE_PEERS:
        pytest.skip("eager and we are enough for a smoke test")
    if smoke and workload not in smoke_workloads(network):
        pytest.skip("two workloads of each network are enough for a smoke test")
    size, resolution = SMOKE_BATCH if smoke else batch
    dtype = str(workload.autocast or workload.dtype).removeprefix("torch.")
    kind = "train step" if workload.training else "inference"
    shape = (size, 3, resolution, resolution)
    group = Measurement("model", network, kind, dtype, shape, "", autocast=workload.autocast is not None)
    peers = SMOKE_PEERS if smoke else PEERS

    def entrants():
        model, batches = prepared(network, size, resolution)
        modelled = None if smoke else least(workload, model, batches[0])
        return enter_all(network, workload, model, batches, peers, modelled=modelled, memory=not smoke)

    enter(group, peer.name, entrants, turns=9 if workload.training else 15, seconds=0.0)


def smoke_workloads(network):
    """Two of the four, one of them training, others for the next network."""
    place = list(NETWORKS).index(network) % 2
    return WORKLOADS[place], WORKLOADS[2 + place]


@cache
def prepared(network, size, resolution):
    """The network, with running statistics that fit its weights, and its batches."""
    torch.manual_seed(0)
    model = NETWORKS[network].make().to(memory_format=torch.channels_last)
    batches = Batch.several(size, resolution)
    settle(model, batches[0].images)
    return model, batches


def least(workload, model, batch):
    """What the network's traffic costs on this CPU at the least."""
    dtype = workload.autocast or workload.dtype
    return traffic_on([device_of("cpu", dtype)], model, tuple(batch.images.shape), dtype, training=workload.training)[0]
