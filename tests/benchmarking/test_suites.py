"""The suites in ``bench/``: complete, of shapes that occur, and honest about what they time."""

from __future__ import annotations

import ast
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fusedres.analysis.devices import DEVICES
from fusedres.benchmarking import grid
from fusedres.benchmarking.race import Entrant
from fusedres.benchmarking.results import Measurement, this_machine
from fusedres.ops.registry import OPS

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from bench import racing, shapes  # noqa: E402
from bench.ops import contestants  # noqa: E402
from bench.racing import Groups, ReplayClock, extra_info  # noqa: E402

SUITES = ROOT / "bench"


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_every_op_has_a_benchmark(op):
    stem = op.reference.__module__.rsplit(".", 1)[1]
    path = SUITES / "ops" / f"test_{stem}.py"
    assert path.exists(), f"{op.name} is declared in fusedres/ops/{stem}.py, so its benchmark is bench/ops/{path.name}"
    assert f'OPS["{op.name}"]' in path.read_text()


# ---------------------------------------------------------------------------------------------------------------------
# Shapes
# ---------------------------------------------------------------------------------------------------------------------


class Seen:
    """The inputs of norms, and the convolutions, of a network."""

    def __init__(self, network: shapes.Network) -> None:
        self.normalised: set[tuple[int, ...]] = set()
        self.convolutions: set[tuple] = set()
        with torch.device("meta"), torch.no_grad():
            model = network.make().eval()
            for module in model.modules():
                module.register_forward_hook(self._see)
            model(torch.empty(2, 3, *[network.batches[0][1]] * 2))

    def _see(self, module, args, out) -> None:
        if isinstance(module, nn.BatchNorm2d):
            self.normalised.add(tuple(args[0].shape[1:]))
        if isinstance(module, nn.Conv2d):
            found = (tuple(args[0].shape[1:]), module.out_channels, module.kernel_size[0], module.stride[0])
            self.convolutions.add((*found, module.groups, tuple(out.shape[1:])))


OF_NETWORKS = {**shapes.CONVOLUTIONS, "ResNeXt-50": shapes.GROUPED}


@pytest.fixture(scope="module")
def seen():
    return {name: Seen(shapes.NETWORKS[name]) for name in {*shapes.ACTIVATIONS, *OF_NETWORKS}}


def test_the_networks_of_the_suites_are_all_kinds():
    assert len(shapes.NETWORKS) == 9
    assert all(batch for network in shapes.NETWORKS.values() for batch in network.batches)


@pytest.mark.parametrize("name", shapes.ACTIVATIONS)
def test_every_activation_occurs_in_its_network(seen, name):
    assert {shape[1:] for shape in shapes.ACTIVATIONS[name]} <= seen[name].normalised


@pytest.mark.parametrize("name", OF_NETWORKS)
def test_every_convolution_occurs_in_its_network(seen, name):
    found = {(c.shape[1:], c.channels, c.size, c.stride, c.groups, c.out[1:]) for c in OF_NETWORKS[name]}
    assert found <= seen[name].convolutions


def test_all_grouped_convolutions_of_resnext_are_measured(seen):
    grouped = {c for c in seen["ResNeXt-50"].convolutions if c[4] > 1}
    assert grouped == {(c.shape[1:], c.channels, c.size, c.stride, c.groups, c.out[1:]) for c in shapes.GROUPED}


def test_modified_activations_are_of_a_network(seen):
    everything = set().union(*(s.normalised for s in seen.values()))
    assert {shape[1:] for shape in shapes.MODIFIED} <= everything


def test_blocks_are_all_kinds_and_run_on_their_shapes():
    assert set(shapes.BLOCKS) == set(grid.BLOCKS)
    for name, of_block in shapes.BLOCKS.items():
        for shape in of_block:
            with torch.device("meta"):
                assert grid.BLOCKS[name](shape[1])(torch.empty(shape)).shape[0] == shape[0]


def test_a_convolution_knows_its_work():
    conv = shapes.Convolution((8, 128, 56, 56), 128, 3, 2)
    assert conv.out == (8, 128, 28, 28) and conv.flops == 2 * 8 * 28 * 28 * 128 * 128 * 9
    assert conv.within((2, 16, 7, 7)) == shapes.Convolution((2, 16, 7, 7), 16, 3, 2)
    grouped = shapes.Convolution((8, 128, 56, 56), 128, 3, 2, 32)
    assert grouped.flops == conv.flops // 32
    assert grouped.within((2, 16, 7, 7)) == shapes.Convolution((2, 16, 7, 7), 16, 3, 2, 4)


@pytest.mark.parametrize("path", sorted(SUITES.rglob("test_*.py")), ids=lambda path: path.stem)
def test_no_suite_types_a_shape(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Tuple | ast.List) and len(node.elts) == 4:
            numbers = [e for e in node.elts if isinstance(e, ast.Constant) and isinstance(e.value, int)]
            assert len(numbers) < 4, f"{path.name}, line {node.lineno}: shapes are in bench/shapes.py"


# ---------------------------------------------------------------------------------------------------------------------
# What a test reports
# ---------------------------------------------------------------------------------------------------------------------


def test_the_clock_gives_every_sample_once():
    clock = ReplayClock()
    clock.load([2.0, 3.0])
    start = clock()
    clock.advance()
    assert clock() - start == 2.0
    clock.advance()
    assert clock() - start == 5.0
    with pytest.raises(StopIteration):
        clock.advance()


GROUP = Measurement("op", "sum", "call", "float32", (4,), "")


def entrant(name: str, calls: list[str]) -> Entrant:
    about = Measurement("op", "sum", "call", "float32", (4,), name, moved=8, images=2)
    return Entrant(about, lambda: calls.append(name))


def test_the_contestants_of_a_group_take_turns_whichever_test_comes_first():
    calls, entered = [], []

    def enter():
        entered.append(True)
        return [entrant("eager", calls), entrant("ours", calls)]

    groups = Groups(smoke=False)
    first = groups.finish(GROUP, "ours", enter, 4, 0.0)
    second = groups.finish(GROUP, "eager", enter, 4, 0.0)
    assert entered == [True]
    assert calls[6:] == ["eager", "ours", "ours", "eager"] * 2
    assert len(first.timing.samples) == len(second.timing.samples) == 4


def test_another_layout_is_another_group():
    groups, other = Groups(smoke=True), Measurement("op", "sum", "call", "float32", (4,), "", layout="contiguous")
    for group in (GROUP, other):
        groups.finish(group, "eager", lambda: [entrant("eager", [])], 2, 0.0)
    assert len(groups.found) == 2


def test_a_gpu_s_group_says_so_and_has_its_roofline(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(racing, "_machine", lambda device: replace(this_machine(), gpu="H100" * (device == "cuda")))
    monkeypatch.setattr(racing, "_peaks", lambda device, dtype: DEVICES["H100"])
    groups, other = Groups(smoke=False), replace(GROUP, subject="another")
    gpu = groups.finish(GROUP, "eager", lambda: [entrant("eager", [])], 2, 0.0, "cuda").measurement
    groups.finish(other, "eager", lambda: [entrant("eager", [])], 2, 0.0)
    assert gpu.roofline == pytest.approx(8 / 3.35e12)
    assert extra_info(gpu, "cuda")["device"] == "H100" != extra_info(gpu)["device"]
    found = groups.results()
    assert {device: results.machine.gpu for device, results in found.items()} == {"cuda": "H100", "cpu": ""}
    assert all(len(results.measurements) == 1 for results in found.values())


def test_extra_info_is_all_that_was_asked_for():
    seconds = {"median": 0.5, "min": 0.5, "q1": 0.5, "q3": 0.5, "turns": 3}
    m = Measurement("op", "sum", "call", "float32", (4,), "ours", seconds=seconds, speedup={"eager": 2.0})
    m = Measurement(
        **{**vars(m), "images": 2, "moved": 10**9, "flops": 10**10, "roofline": 0.25, "saved": 3, "peak": 4}
    )
    found = extra_info(m)
    assert {"device", "threads", "dtype", "layout"} <= set(found)
    assert (found["images/s"], found["GB/s"], found["GFLOP/s"], found["fraction of roofline"]) == (4.0, 2.0, 20.0, 0.5)
    assert (found["bytes saved for backward"], found["peak memory"], found["speed-up over eager"]) == (3, 4, 2.0)
    assert Measurement(**found["measurement"]) == m


PLANTED = """
import time

import pytest

from bench.racing import Groups
from fusedres.benchmarking.race import Entrant
from fusedres.benchmarking.results import Measurement

def about(name):
    return Measurement("op", "sleep", "call", "float32", (1,), name)

def entrants():
    return [
        Entrant(about("eager"), lambda: time.sleep(4e-3)),
        Entrant(about("right"), lambda: time.sleep(2e-3), lambda: "ok"),
        Entrant(about("wrong"), lambda: None, lambda: "RED: its numbers are wrong"),
        Entrant(about("torch.compile"), lambda: None, lambda: "RED: another's numbers are wrong"),
        Entrant(Measurement("op", "sleep", "call", "float32", (1,), "absent", missing="not installed")),
    ]

@pytest.mark.parametrize("contestant", ["eager", "right", "wrong", "torch.compile", "absent"])
def test_sleep(enter, contestant):
    enter(about(""), contestant, entrants)
"""


@pytest.fixture
def planted(tmp_path):
    """A suite with a wrong contestant in it, run by pytest as ``bench/`` is."""
    import subprocess

    (tmp_path / "conftest.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom bench.conftest import *\n"
    )
    (tmp_path / "test_planted.py").write_text(PLANTED)
    json_file, results = tmp_path / "benchmark.json", tmp_path / "results.json"
    options = [
        "--benchmark-json",
        str(json_file),
        "--results",
        str(results),
        "-p",
        "no:cacheprovider",
        "--rootdir",
        ".",
    ]
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-rsx", *options, "test_planted.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        # Not as a part of this run, which may be one of several that share a machine.
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
    )
    return found.stdout, json.loads(json_file.read_text())["benchmarks"], json.loads(results.read_text())


def test_no_ratio_on_a_red_check(planted):
    printed, benchmarks, results = planted
    assert "1 failed, 2 passed, 1 skipped, 1 xfailed" in printed
    assert all(f"RED: {whose} numbers are wrong" in printed for whose in ("its", "another's"))
    assert "not installed" in printed
    assert [b["extra_info"]["measurement"]["contestant"] for b in benchmarks] == ["eager", "right"]
    right = benchmarks[1]
    assert right["extra_info"]["speed-up over eager"] > 1
    measured = right["extra_info"]["measurement"]["seconds"]
    assert right["stats"]["rounds"] == measured["turns"] == 9
    assert right["stats"]["median"] == pytest.approx(measured["median"])
    assert right["group"] == "sleep, call, float32, 1"
    by_name = {m["contestant"]: m for m in results["measurements"]}
    assert by_name["wrong"]["check"].startswith("RED") and by_name["wrong"]["seconds"] is None
    assert by_name["right"]["speedup"].keys() == {"eager"} and by_name["absent"]["missing"] == "not installed"


def test_an_op_s_stock_composition_is_compiled_and_checked(monkeypatch):
    """Its ratio is what ``extra_info`` calls the speed-up over compile; images are those of a call."""
    x = torch.randn(2, 3, 4, 5)

    def eager(x):
        return lambda: torch.relu(x) + 1

    group = contestants.group_of("relu", torch.float32, x.shape)
    made = contestants.Contest(group, x, {"eager": eager}, {}, memory=False)
    stock, compiled = made.with_compiled().entrants()
    assert compiled.about.contestant == "torch.compile" and compiled.about.images == 2
    assert compiled.verdict() == "ok" and torch.equal(compiled.call(), stock.call())
    monkeypatch.setattr(torch, "compile", lambda call: lambda: 2 * call())
    assert compiled.verdict().startswith("RED")
    faster = replace(compiled.about, speedup={"torch.compile": 2.0})
    assert extra_info(faster)["speed-up over compile"] == 2.0


@pytest.mark.parametrize("compiles", [False, True])
def test_a_backward_alone_is_timed(compiles):
    x, weight, grad = torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 4)
    runs = []

    def forward(x, weight):
        runs.append(None)
        return torch.sigmoid(x * weight)

    call = contestants.backward_of(forward, grad, x, weight, compiles=compiles)
    forwards = len(runs)
    for _ in range(3):
        dx, dweight = call()
        z = torch.sigmoid(x * weight)
        torch.testing.assert_close(dx, grad * z * (1 - z) * weight)
        torch.testing.assert_close(dweight, grad * z * (1 - z) * x)
    assert len(runs) == forwards


def test_a_graph_of_many_calls_has_no_images():
    group = contestants.group_of("relu", torch.float32, (2, 3, 4, 5))
    (only,) = contestants.Contest(group, (), {"eager": lambda _: lambda: None}, {}, memory=False).entrants()
    assert only.about.images is None
