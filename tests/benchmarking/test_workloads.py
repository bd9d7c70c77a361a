"""Workloads, contests and the grid: correctness before time."""

from __future__ import annotations

import math

import pytest
import torch

from fusedres import models
from fusedres.benchmarking import cli, grid
from fusedres.benchmarking.agreement import summaries, verdict
from fusedres.benchmarking.compiled import CompileBudget
from fusedres.benchmarking.contest import contest
from fusedres.benchmarking.workloads import INFERENCE_BF16, INFERENCE_FP32, TRAIN_BF16, TRAIN_FP32, Batch, settle
from fusedres.testing import Comparison, Entry

NO_COMPILE = CompileBudget(-math.inf)
WORKLOADS = (TRAIN_FP32, TRAIN_BF16, INFERENCE_FP32, INFERENCE_BF16)
RED = Comparison((Entry("output", 3.0, 1.0, 2.0, 1.0), Entry("grad of conv.weight", 1.0, 1.0, 2.0, 1.0)))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = models.cifar_resnet(8, fused=False).to(memory_format=torch.channels_last)
    settle(model, Batch.random(4, 16).images)
    return model


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
def test_a_contest_leaves_the_model_alone_and_times_both(network, workload):
    before = {key: value.clone() for key, value in network.state_dict().items()}
    found = contest(workload, network, Batch.random(4, 16, num_classes=10), 2, NO_COMPILE)
    assert set(found.times) == {"eager", "fusedres"}
    assert found.speedup_over("eager") > 0
    assert found.speedup_over("torch.compile") is None
    assert found.compile_note == "not asked for"
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
def test_the_check_of_a_workload(network, workload):
    comparison = workload.check(network, lambda seed: Batch.random(8, 16, seed).images)
    assert verdict(comparison) == "ok"
    kinds = [summary.kind for summary in summaries(comparison)]
    assert "output" in kinds and ("gradients" in kinds) == workload.training


def test_settling_gives_the_statistics_of_the_batch():
    model = models.cifar_resnet(8, fused=False)
    images = Batch.random(4, 16).images
    settle(model, images)
    y = model.conv1(images)
    torch.testing.assert_close(model.bn1.running_mean, y.mean((0, 2, 3)))
    assert model.bn1.momentum == 0.1


def test_a_verdict_names_what_is_red():
    assert verdict(RED).startswith("RED: 1 of 2 tensors over budget, first output")


def test_a_summary_takes_the_median_and_the_worst():
    outputs, gradients = summaries(RED)
    assert (outputs.ours, outputs.stock, outputs.budget_used) == (3.0, 1.0, 1.5)
    assert (gradients.count, gradients.budget_used) == (1, 0.5)


def test_nothing_is_timed_on_a_red_check(monkeypatch, network):
    monkeypatch.setattr(type(TRAIN_FP32), "check", lambda *args, **kwargs: RED)
    monkeypatch.setattr(cli, "contest", lambda *args: pytest.fail("timed"))
    row = cli._workload_row(
        TRAIN_FP32, cli._GOALS[TRAIN_FP32], network, Batch.random(1, 16), cli._QUICK, NO_COMPILE, lambda stage: None
    )
    assert row.check.startswith("RED") and row.ratio is None and row.ours is None


def test_the_grid_covers_every_block_shape_and_mode():
    cases = list(grid.cases((None, torch.bfloat16)))
    assert len(cases) == len(set(map(str, cases))) == 2 * 2 * len(grid.BLOCKS) * len(grid.SHAPES)
    assert (1, 64, 7, 7) in grid.SHAPES


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("block", grid.BLOCKS)
def test_a_cell_of_the_grid(block, training):
    cell = grid.measure(grid.Case(block, (2, 16, 7, 7), training), turns=2)
    assert cell.check == "ok"
    assert set(cell.times) == {"eager", "fusedres"} and cell.ratio > 0
    assert cell.to_dict()["case"] == f"{block} {'train' if training else 'inference'} fp32 2x16x7x7"


def test_a_red_cell_has_no_times(monkeypatch):
    monkeypatch.setattr(grid, "compare", lambda *args, **kwargs: RED)
    monkeypatch.setattr(grid, "interleave", lambda *args, **kwargs: pytest.fail("timed"))
    cell = grid.measure(grid.Case("basic", (2, 16, 7, 7), True))
    assert cell.ratio is None and cell.times == {} and cell.check.startswith("RED")
    row = cli._grid_row([cell], training=True)
    assert row.ratio is None and "RED" in row.check
