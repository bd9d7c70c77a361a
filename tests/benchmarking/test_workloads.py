"""Workloads, contests and the grid: correctness before time."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from fusedres import models
from fusedres.analysis import devices
from fusedres.benchmarking import cli, grid
from fusedres.benchmarking.agreement import summaries, verdict
from fusedres.benchmarking.budget import TimeBudget
from fusedres.benchmarking.contest import contest
from fusedres.benchmarking.peers import BASELINE, COMPILE, OURS
from fusedres.benchmarking.peers.tensorrt import TensorRT
from fusedres.benchmarking.referee import Referee
from fusedres.benchmarking.results import Results
from fusedres.benchmarking.timing import FEWEST_TURNS
from fusedres.benchmarking.workloads import INFERENCE_BF16, INFERENCE_FP32, TRAIN_BF16, TRAIN_FP32, Batch, settle
from fusedres.cli import main
from fusedres.testing import Comparison, Entry

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
    eager, ours = contest("tiny", workload, network, [Batch.random(4, 16, num_classes=10)], turns=2)
    assert len(eager.timing.samples) == len(ours.timing.samples) == 2
    assert ours.measurement.check == "ok" and ours.measurement.speedup["eager"] > 0
    assert ours.measurement.autocast == (workload is TRAIN_BF16)
    assert ours.measurement.dtype == ("bfloat16" if workload in (TRAIN_BF16, INFERENCE_BF16) else "float32")
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


def test_a_red_check_has_no_number_in_its_row(monkeypatch, network):
    monkeypatch.setattr(Referee, "judge", lambda *args: RED)
    batch = Batch.random(1, 16, num_classes=10)
    found = {f.measurement.contestant: f.measurement for f in contest("tiny", TRAIN_FP32, network, [batch], turns=1)}
    row = cli._row("train", cli._GOALS[TRAIN_FP32], found)
    assert row.check.startswith("RED") and row.ratio is None and row.ours is None and row.eager is None


def test_the_grid_covers_every_block_shape_and_mode():
    cases = list(grid.cases((None, torch.bfloat16)))
    assert len(cases) == len(set(map(str, cases))) == 2 * 2 * len(grid.BLOCKS) * len(grid.SHAPES)
    assert (1, 64, 7, 7) in grid.SHAPES


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("block", grid.BLOCKS)
def test_a_cell_of_the_grid(block, training):
    cell = grid.measure(grid.Case(block, (2, 16, 7, 7), training), seconds=0.0)
    assert cell.check == "ok"
    assert set(cell.times) == {"eager", "fusedres"} and cell.ratio > 0
    assert len(cell.times["eager"].samples) >= 3 * FEWEST_TURNS  # of several copies
    assert cell.to_dict()["case"] == f"{block} {'train' if training else 'inference'} fp32 2x16x7x7"


def test_a_red_cell_has_no_times(monkeypatch):
    monkeypatch.setattr(Referee, "judge", lambda *args: RED)
    cell = grid.measure(grid.Case("basic", (2, 16, 7, 7), True), seconds=0.0)
    assert cell.ratio is None and cell.times == {} and cell.check.startswith("RED")
    row = cli._grid_row([cell], training=True)
    assert row.ratio is None and "RED" in row.check


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """Everything that the command measures, in little."""
    monkeypatch.setattr(cli, "BATCH", (2, 32))
    monkeypatch.setattr(grid, "SHAPES", ((2, 16, 7, 7),))
    monkeypatch.setattr(devices, "_COPIED", 2**20)
    monkeypatch.setattr(devices, "_SIDE", 64)
    monkeypatch.setattr(models, "resnet50", partial(models.resnet18, num_classes=1000))
    few = replace(
        cli._QUICK,
        seconds=600.0,
        reserve=0.0,
        train_turns=2,
        inference_turns=2,
        checked=2,
        grid_seconds=0.0,
        grid_blocks=("conv-bn-relu",),
        peers=(BASELINE, OURS, TensorRT()),
    )
    monkeypatch.setattr(cli, "_QUICK", few)


def test_the_command_writes_everything(small, tmp_path, capsys):
    path = tmp_path / "results.json"
    assert main(["bench", "--quick", "--json", str(path)]) == 0
    results = Results.load(path)
    assert [row.name for row in results.rows[:2]] == [TRAIN_BF16.name, TRAIN_FP32.name]
    assert {m.suite for m in results.measurements} == {"model", "block"}
    missing = [m for m in results.measurements if m.contestant == "TensorRT"]
    assert len(missing) == 4 and all(m.missing for m in missing)
    assert len(results.grid) == 2 and len(results.traffic) == 4
    assert {m.subject for m in results.measurements if m.suite == "model"} == {"ResNet-50"}
    ours = next(m for m in results.measurements if m.contestant == "fusedres")
    assert ours.of_roofline > 0 and ours.saved is not None and ours.peak > 0
    assert set(results.roofline["arithmetic"]) == {"float32", "bfloat16"}
    assert results.settings["left_out"] == []
    printed = capsys.readouterr().out
    assert "measured / model" in printed and "TensorRT" in printed


def test_what_there_is_no_time_for_is_named(small, tmp_path, capsys):
    path = tmp_path / "results.json"
    assert main(["bench", "--quick", "--budget", "0", "--json", str(path)]) == 0
    results = Results.load(path)
    left_out = results.settings["left_out"]
    first, *others = results.rows[:4]
    assert first.name == TRAIN_BF16.name and first.ratio is not None  # what matters most is always measured
    for row in others:
        assert row.ratio is None and any(text.startswith(f"{row.name}: no time: needs about ") for text in left_out)
    assert any(text.startswith("2 of 2 blocks: no time") for text in left_out)
    assert "left out: 2 of 2 blocks" in capsys.readouterr().out.replace("\n", " ")


def test_a_contest_takes_as_many_turns_as_it_has_time_for(network):
    batches = [Batch.random(4, 16, num_classes=10)]
    found = contest("tiny", INFERENCE_FP32, network, batches, turns=9, budget=TimeBudget.of(0.0))
    measured = {f.measurement.contestant: f.measurement for f in found}
    assert cli._turns_left_out(INFERENCE_FP32, 9, measured) == [f"{INFERENCE_FP32.name}: no time for 6 of 9 turns"]
    assert cli._turns_left_out(INFERENCE_FP32, 3, measured) == []


def test_a_full_run_leaves_every_contest_the_time_to_compile():
    assert cli._FULL.needed(TRAIN_FP32) > COMPILE.seconds[0] > cli._QUICK.needed(TRAIN_FP32)
    fixed = sum(map(cli._FULL.needed, cli._GOALS)) + cli._FULL.reserve
    assert fixed < cli._FULL.seconds <= 15 * 60 and cli._QUICK.seconds < 120


def test_an_unknown_peer(capsys):
    assert main(["bench", "--peers", "magic"]) == 2
    assert "got 'magic'" in capsys.readouterr().out
