"""Whole blocks, training and inference: eager, fused, the fused formulas in plain PyTorch (reference), compiled."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench.shapes import BLOCKS, SMOKE_BLOCK
from fusedres.analysis.devices import device_of
from fusedres.analysis.traffic import traffic_on
from fusedres.benchmarking import grid
from fusedres.benchmarking.peers import BASELINE, COMPILE, OURS
from fusedres.benchmarking.peers.eager import Eager
from fusedres.benchmarking.peers.ours import Fusedres
from fusedres.benchmarking.results import Measurement

PEERS = {
    "channels_last": (BASELINE, OURS, Fusedres(backend="reference"), COMPILE),
    "contiguous": (Eager("contiguous"), OURS, COMPILE),
}
"""By the layout of their input."""

CASES = [
    (grid.Case(block, shape, training, autocast, layout), peer)
    for layout, peers in PEERS.items()
    for block, shapes in BLOCKS.items()
    for shape in (shapes if layout == "channels_last" else shapes[:1])
    for training in (True, False)
    for autocast in (None, torch.bfloat16)
    for peer in peers
]


@pytest.mark.parametrize(("case", "peer"), CASES, ids=lambda value: getattr(value, "name", None) or str(value))
def test_block(enter, smoke, case, peer):
    if smoke and peer is COMPILE:
        pytest.skip("nothing is compiled in a smoke test")
    if smoke:
        case = replace(case, shape=SMOKE_BLOCK)
    peers = [peer for peer in PEERS[case.layout] if not (smoke and peer is COMPILE)]
    group = Measurement(
        "block",
        case.block,
        "train step" if case.training else "inference",
        "float32" if case.autocast is None else "bfloat16",
        case.shape,
        "",
        autocast=case.autocast is not None,
        layout=case.layout,
    )
    enter(
        group, peer.name, lambda: grid.entrants(case, peers, memory=not smoke, modelled=None if smoke else model(case))
    )


def model(case):
    """What the traffic of the block costs on this CPU at the least."""
    dtype = case.autocast or torch.float32
    block = grid.BLOCKS[case.block](case.shape[1])
    return traffic_on([device_of("cpu", dtype)], block, case.shape, dtype, training=case.training)[0]
