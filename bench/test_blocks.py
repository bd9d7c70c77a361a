"""Whole blocks, training and inference: eager, fused, the fused formulas in plain PyTorch (reference), compiled."""

from __future__ import annotations

import pytest
import torch

from bench.shapes import BLOCKS, SMOKE_BLOCK
from fusedres.analysis.devices import device_of
from fusedres.analysis.traffic import traffic_on
from fusedres.benchmarking import grid
from fusedres.benchmarking.peers import BASELINE, COMPILE, OURS
from fusedres.benchmarking.peers.ours import Fusedres
from fusedres.benchmarking.results import Measurement

PEERS = (BASELINE, OURS, Fusedres(backend="reference"), COMPILE)
CASES = [
    grid.Case(block, shape, training, autocast)
    for block, shapes in BLOCKS.items()
    for shape in shapes
    for training in (True, False)
    for autocast in (None, torch.bfloat16)
]


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_block(enter, smoke, case, peer):
    if smoke and peer is COMPILE:
        pytest.skip("nothing is compiled in a smoke test")
    if smoke:
        case = grid.Case(case.block, SMOKE_BLOCK, case.training, case.autocast)
    peers = PEERS[:-1] if smoke else PEERS
    group = Measurement(
        "block",
        case.block,
        "train step" if case.training else "inference",
        "float32" if case.autocast is None else "bfloat16",
        case.shape,
        "",
        autocast=case.autocast is not None,
    )
    enter(
        group, peer.name, lambda: grid.entrants(case, peers, memory=not smoke, modelled=None if smoke else model(case))
    )


def model(case):
    """What the traffic of the block costs on this CPU at the least."""
    dtype = case.autocast or torch.float32
    block = grid.BLOCKS[case.block](case.shape[1])
    return traffic_on([device_of("cpu", dtype)], block, case.shape, dtype, training=case.training)[0]
