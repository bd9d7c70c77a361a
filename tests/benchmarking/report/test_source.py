"""What files of results amount to, whatever their form."""

from __future__ import annotations

from dataclasses import replace

from report_data import MACHINE, timing

from fusedres.benchmarking.architectures import ARCHITECTURES
from fusedres.benchmarking.report.source import Source, memory_of
from fusedres.benchmarking.results import Goal, Measurement, MemoryUse, Results, Row

EAGER = Measurement("model", "WRN-28-10", "train step", "float32", (8, 3, 32, 32), "eager", seconds=timing(0.7))
MEASURED = (EAGER, replace(EAGER, contestant="fusedres", check="ok", seconds=timing(0.5), speedup={"eager": 1.4}))
ROW = Row(
    "WRN-28-10: train step, fp32",
    "ms",
    Goal(1.15),
    700.0,
    ours=500.0,
    ratio=1.4,
    images_per_second=16.0,
    check="ok",
    spread={m.contestant: m.seconds for m in MEASURED},
)
CELL = {"case": "basic train fp32 4x64x8x8", "ratio": 1.2, "check": "ok", "seconds": {"eager": timing(0.1)}}
SETTINGS = {"network": None, "batch": 8, "resolution": 224}


def measurements(**parts):
    return Source("file.json", Results(MACHINE, SETTINGS, **parts)).measurements


def test_a_row_adds_nothing_to_what_it_was_made_from():
    """It does not say the resolution, and that of the settings is not every network's."""
    assert measurements(rows=(ROW,), measurements=MEASURED) == MEASURED


def test_rows_and_cells_of_files_without_measurements():
    network, ours, block = measurements(rows=(ROW,), grid=[CELL])
    assert (network.subject, network.contestant, ours.speedup) == ("WRN-28-10", "eager", {"eager": 1.4})
    assert (block.subject, block.workload, block.shape) == ("basic", "train step", (4, 64, 8, 8))


def test_a_row_of_another_workload_stays():
    other = replace(ROW, name="WRN-28-10: train step, bf16 autocast")
    assert len(measurements(rows=(ROW, other), measurements=MEASURED)) == 4


SAVED = Row("DenseNet-121: bytes saved for backward, fp32", "MB", Goal(0.35), 1043.0, ours=319.0, ratio=0.31)


def of_rows() -> Source:
    return Source("architectures.json", Results(MACHINE, SETTINGS, rows=(SAVED,)))


def test_a_network_has_one_name_and_each_form_once():
    """The command and the headline rows call it differently, and count a few bytes more or less."""
    own = MemoryUse("densenet121", (8, 3, 224, 224), "float32", "stock", saved=1_042_000_000, peak=1_300_000_000)
    sources = [of_rows(), Source("memory.json", Results(MACHINE, {}, memory=(own,)))]
    stock, patched = memory_of(sources)
    assert stock == replace(own, model="DenseNet-121")
    assert (patched.model, patched.variant, patched.saved) == ("DenseNet-121", "patched", 319_000_000)


def test_names_are_those_of_headline_rows():
    measured_by_make_results = ("resnet50", "densenet121", "seresnet50", "preresnet50")
    uses = tuple(MemoryUse(name, (8, 3, 8, 8), "float32", "stock", saved=1) for name in measured_by_make_results)
    names = {use.model for use in Source("memory.json", Results(MACHINE, {}, memory=uses)).memory}
    assert names <= {"ResNet-50", *(architecture.name for architecture in ARCHITECTURES)}
