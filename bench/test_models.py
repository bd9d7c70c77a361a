"""Whole networks: training steps and inference, by everyone who can run them."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from bench.shapes import NETWORKS, SMOKE_BATCH, name_of
from fusedres.analysis.devices import device_of
from fusedres.analysis.traffic import traffic_on
from fusedres.benchmarking.contest import enter_all
from fusedres.benchmarking.peers import BASELINE, COMPILE, OURS, PEERS
from fusedres.benchmarking.peers.eager import Eager
from fusedres.benchmarking.results import Measurement
from fusedres.benchmarking.workloads import (
    FORMATS,
    INFERENCE_BF16,
    INFERENCE_FP32,
    TRAIN_BF16,
    TRAIN_FP32,
    Batch,
    settle,
)

WORKLOADS = (TRAIN_BF16, TRAIN_FP32, INFERENCE_BF16, INFERENCE_FP32)


def middle(batches):
    """One of a few."""
    return batches[len(batches) // 2 :][:1]


ENTERED = {"channels_last": PEERS, "contiguous": (Eager("contiguous"), OURS, COMPILE, BASELINE)}
"""Peers, by the layout of the network and its images; the first is the measure."""

CASES = [
    (name, batch, layout, peer)
    for layout, peers in ENTERED.items()
    for name, network in NETWORKS.items()
    for batch in (network.batches if layout == "channels_last" else middle(network.batches))
    for peer in peers
]


def named(value):
    """A parameter in a test's name."""
    return getattr(value, "name", None) or (value if isinstance(value, str) else name_of(value))


@pytest.mark.parametrize("workload", WORKLOADS, ids=named)
@pytest.mark.parametrize(("network", "batch", "layout", "peer"), CASES, ids=named)
def test_model(enter, smoke, network, batch, layout, workload, peer):
    peers = ENTERED[layout]
    if smoke:
        peers = peers[:2]
        skip_in_smoke_test(peer not in peers, "stock PyTorch and we are enough")
        skip_in_smoke_test(workload not in smoke_workloads(network), "two workloads of each network are enough")
        skip_in_smoke_test(layout == "contiguous" and network != CASES[0][0], "one network is enough in this layout")
    size, resolution = SMOKE_BATCH if smoke else batch
    dtype = str(workload.autocast or workload.dtype).removeprefix("torch.")
    kind = "train step" if workload.training else "inference"
    shape = (size, 3, resolution, resolution)
    group = Measurement("model", network, kind, dtype, shape, "", autocast=workload.autocast is not None, layout=layout)

    def entrants():
        model, batches = prepared(network, size, resolution, layout)
        modelled = None if smoke else least(workload, model, batches[0])
        return enter_all(network, workload, model, batches, peers, modelled=modelled, memory=not smoke)

    enter(group, peer.name, entrants, turns=9 if workload.training else 15, seconds=0.0)


def skip_in_smoke_test(condition, reason):
    if condition:
        pytest.skip(f"{reason} for a smoke test")


def smoke_workloads(network):
    """Two of the four, one of them training, others for the next network."""
    place = list(NETWORKS).index(network) % 2
    return WORKLOADS[place], WORKLOADS[2 + place]


@cache
def prepared(network, size, resolution, layout):
    """The network, with running statistics that fit its weights, and its batches."""
    torch.manual_seed(0)
    model = NETWORKS[network].make().to(memory_format=FORMATS[layout])
    batches = Batch.several(size, resolution, layout=layout)
    settle(model, batches[0].images)
    return model, batches


def least(workload, model, batch):
    """What the network's traffic costs on this CPU at the least."""
    dtype = workload.autocast or workload.dtype
    return traffic_on([device_of("cpu", dtype)], model, tuple(batch.images.shape), dtype, training=workload.training)[0]
