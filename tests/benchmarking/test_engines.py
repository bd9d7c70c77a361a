"""Under PyTorch's own engines: what is timed beside what, and what is said of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fusedres.benchmarking import engines
from fusedres.benchmarking.engines import compiled, overhead, said, spread
from fusedres.benchmarking.results import Measurement, Results
from fusedres.benchmarking.workloads import INFERENCE_FP32, TRAIN_FP32
from fusedres.cli import main
from fusedres.testing import Comparison, Entry

BATCH = (2, 32)


def test_two_processes_with_ddp_and_without(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(engines, "_TRAINING", {"fp32": TRAIN_FP32})
    path = tmp_path / "engines.json"
    sizes = ["--network", "resnet18", "--batch", "2", "--resolution", "32", "--turns", "2"]
    assert main(["engines", *sizes, "--only", "ddp", "--json", str(path)]) == 0
    found = {m.contestant: m for m in Results.load(path).measurements}
    assert list(found) == ["eager", "fusedres", "eager, DDP", "fusedres, DDP"]
    assert {name: list(m.speedup) for name, m in found.items()} == {
        "eager": [],
        "fusedres": ["eager"],
        "eager, DDP": [],
        "fusedres, DDP": ["eager, DDP"],
    }
    assert all(m.seconds["turns"] == 2 and m.variant.startswith("2 processes") for m in found.values())
    assert main(["report", str(path), "--out", str(tmp_path / "page.md")]) == 0
    assert "| fusedres, DDP |" in (tmp_path / "page.md").read_text()
    lines = capsys.readouterr().out
    for line in ("without DDP, patched over stock", "with DDP, patched over stock", "difference"):
        assert lines.count(f": {line}: ") == 1


def test_compiled_beside_not_compiled():
    plain, inner = compiled("resnet18", INFERENCE_FP32, BATCH, turns=2, backend="aot_eager")
    assert plain.baseline and not plain.speedup and inner.first_step > 0
    assert list(inner.speedup) == ["fusedres"] and inner.check == "ok"
    (line,) = said((plain, inner))
    assert "compiled over uncompiled, patched" in line


@pytest.mark.parametrize("workload", [TRAIN_FP32, INFERENCE_FP32], ids=lambda workload: workload.name)
def test_one_small_image(workload):
    stock, ours = overhead("resnet50", workload, turns=2)
    assert stock.shape == (1, 3, 32, 32) and list(ours.speedup) == ["eager"] and ours.check == "ok"
    (line,) = said((stock, ours))
    assert "patched over stock" in line and "at least 1" in line


def test_inference_has_nothing_to_average():
    with pytest.raises(ValueError, match="must be one that trains, got 'inference, fp32'"):
        spread("resnet18", INFERENCE_FP32, BATCH)


def test_a_red_check_has_no_times(monkeypatch):
    red = Comparison((Entry("output", 3.0, 1.0, 2.0, 1.0),))
    monkeypatch.setattr(type(TRAIN_FP32), "check", lambda *args, **kwargs: red)
    for name in ("interleave", "in_child"):
        monkeypatch.setattr(engines, name, lambda *args, **kwargs: pytest.fail("timed"))
    for question, *batch in ((spread, BATCH), (compiled, BATCH), (overhead,)):
        (only,) = question("resnet18", TRAIN_FP32, *batch)
        assert only.check.startswith("RED") and only.seconds is None
        (line,) = said([only])
        assert "RED" in line


@pytest.mark.parametrize(("alone", "with_ddp", "reached"), [(1.5, 1.44, True), (1.5, 1.41, False), (1.2, 1.3, True)])
def test_what_the_ratios_say(alone, with_ddp, reached):
    plain = Measurement("ddp", "resnet50", "train step", "float32", (8, 3, 224, 224), "", seconds={"median": 1.0})
    found = [
        replace(plain, contestant="fusedres", speedup={"eager": alone}),
        replace(plain, contestant="fusedres, DDP", speedup={"eager, DDP": with_ddp}),
    ]
    *_, last = said(found)
    assert f"{with_ddp / alone - 1:+.1%}" in last and ("not reached" not in last) == reached
