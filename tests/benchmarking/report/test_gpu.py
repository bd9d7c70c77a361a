"""A GPU's file of results, as ``tools.gpu`` writes it: a dry run on the CPU under an H100's name."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from fusedres import env
from fusedres.benchmarking.device import Bench, Job
from fusedres.benchmarking.report.figures import FIGURES
from fusedres.benchmarking.report.page import page
from fusedres.benchmarking.report.source import load
from fusedres.benchmarking.report.tables import headline
from fusedres.benchmarking.results import Results
from fusedres.benchmarking.workloads import INFERENCE_BF16, TRAIN_BF16

pytest.importorskip("matplotlib")
pytestmark = pytest.mark.skipif(env.library_missing() is not None, reason=str(env.library_missing()))

ROOT = Path(__file__).parents[3]
DRY = [
    Job("plain", "cifar_resnet", TRAIN_BF16, 2, 32),
    Job("plain", "cifar_resnet", INFERENCE_BF16, 1, 32),
    Job("kernels"),
]
ON_H100 = {"fusedres": "fusedres (triton)", "fusedres, captured": "fusedres (triton), captured", "cpu": "cuda"}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with the file where a person commits it."""
    root = tmp_path_factory.mktemp("project")
    path = root / "bench" / "results" / "nvidia-h100-80gb-hbm3" / "gpu.json"
    Bench(path, "cpu", 600, smoke=True).run(DRY)
    dry = Results.load(path)
    renamed = tuple(_on_h100(m) for m in dry.measurements if m.contestant not in ("cuda", "triton"))
    settings = {**dry.settings, "left_out": ["kernels: the process died in it", "tune: needs about 9 s of 1 s left"]}
    machine = replace(dry.machine, gpu="NVIDIA H100 80GB HBM3")
    replace(dry, machine=machine, settings=settings, measurements=renamed).save(path)
    return root


def _on_h100(m):
    speedup = {ON_H100.get(name, name): ratio for name, ratio in m.speedup.items()}
    return replace(m, contestant=ON_H100.get(m.contestant, m.contestant), speedup=speedup)


@pytest.fixture
def source(project):
    return load(next(project.glob("bench/results/*/gpu.json")), project)


def drawn(name, source):
    return next(figure for figure in FIGURES if figure.name == name).draw([source])


def test_the_headline_has_a_line_for_each_workload(source):
    text = headline(source)
    assert text.startswith("NVIDIA H100 80GB HBM3, ") and f"]({source.name})" in text
    head, _, *lines = text.split("\n\n")[1].splitlines()
    assert "over fastest other" in head and len(lines) == 2
    assert lines[0].startswith("| cifar_resnet, train step, bfloat16 autocast, 2x3x32x32 |")
    ours = next(m for m in source.measurements if m.contestant == "fusedres (triton)")
    assert "(fusedres (triton)) |" in lines[0] and f"| {ours.speedup['eager']:.2f}x |" in lines[0]
    assert lines[0].endswith("| ok |")


def test_what_is_red_is_in_the_headline_without_numbers(source):
    red = {"check": "RED: output", "seconds": None, "speedup": {}}
    measurements = tuple(replace(m, **red) if m.ours else m for m in source.measurements)
    text = headline(replace(source, results=replace(source.results, measurements=measurements)))
    assert "fusedres (triton): RED: output" in text and "x |" not in text.partition("train step")[2]


def test_readme_has_it(project, monkeypatch):
    spec = importlib.util.spec_from_file_location("update_readme", ROOT / "bench" / "update_readme.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "ROOT", project)
    text = script.updated(f"{script.BEGIN}\n{script.END}")
    assert "(fusedres (triton)) |" in text and "](bench/results/nvidia-h100-80gb-hbm3/gpu.json)" in text


def test_the_speed_up_figure_has_its_kernels(source):
    panels = drawn("speedup", source).axes
    lines = {line.get_label() for panel in panels for line in panel.get_lines()}
    assert {"bn_stats, cuda", "join, cuda", "join_backward_apply, cuda"} <= lines
    assert "ops: forward, bfloat16, beside reference" in {panel.get_title() for panel in panels}


def test_blocks_by_each_backend_are_in_the_speed_up_figure(source):
    ours = next(m for m in source.measurements if m.contestant == "fusedres (triton)")
    block = replace(ours, suite="block", subject="basic")
    results = replace(source.results, measurements=(block,))
    (panel,) = drawn("speedup", replace(source, results=results)).axes
    assert "basic, triton" in {line.get_label() for line in panel.get_lines()}


def test_the_memory_figure_has_the_peaks_of_its_training_steps(source):
    forms = {use.variant: use for use in source.memory}
    assert set(forms) == {"stock", "patched (triton)"} and forms["stock"].dtype == "bfloat16 autocast"
    step = next(m for m in source.measurements if m.contestant == "eager" and m.workload == "train step")
    assert forms["stock"].peak == step.peak > 0
    (panel,) = drawn("memory", source).axes
    assert panel.get_title() == "peak beyond parameters and input"


def test_graphs_have_no_peak_of_their_own(source):
    """Theirs was allocated when they were captured."""
    captured = tuple(replace(m, peak=1) for m in source.measurements if m.contestant.endswith("captured"))
    assert captured
    results = replace(source.results, measurements=captured)
    assert replace(source, results=results).memory == ()


def test_the_page(source):
    text = page([source]).markdown()
    assert text.count("](../bench/results/nvidia-h100-80gb-hbm3/gpu.json)") == 1
    assert "Left out for want of time: tune: needs about 9 s of 1 s left." in text
    assert "Left out: kernels: the process died in it." in text
    for title in ("Throughput by network", "Speed-up by shape", "Memory of a training step"):
        assert f"### {title}" in text
