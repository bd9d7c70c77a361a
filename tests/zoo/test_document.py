"""The tables, and ``docs/zoo.md`` as it is committed."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from fusedres.benchmarking.results import Machine
from fusedres.patch import Declined, Fused, PatchReport
from fusedres.zoo import ZOO
from fusedres.zoo.document import document, row
from fusedres.zoo.timings import Measured, Timings

DOCUMENT = Path(__file__).parents[2] / "docs" / "zoo.md"
ROW = r"^\| (torchvision|timm|smp|transformers) (\S+) \| \d+ \| \d+ \| (\d+)% \| \d+ \| (?:(\d\.\d\d) )? ?\|"
MACHINE = Machine("A CPU", 2, "avx2", "2.13.0", "3.11.7", "0.1.0", "abc", "2026-01-01")


def report() -> PatchReport:
    reasons = [
        "a.conv1 stands alone: no norm next to it",
        "a.conv2 stands alone: no norm next to it",
        "nothing to fuse conv with: norm1 is a GroupNorm, which no block has",
        "the output of x.conv is used in more than one place",
        "stage.1: its forward branches on data (model.py:12: `if x.sum() > 0 | y:`)",
    ]
    norm = Declined("norm", "norm stands alone: no convolution next to it", "norm")
    declined = (*(Declined(f"conv{i}", reason) for i, reason in enumerate(reasons)), norm)
    return PatchReport((Fused("", "chain", "cpu", ("conv5",)),), declined, 6)


def test_reasons_are_counted_without_names():
    assert document({"Some": [row("timm:some", report())]}).splitlines()[-1] == (
        "| timm some | 6 | 1 | 17% | 1 |  | stands alone: no norm next to it (2); what follows is a GroupNorm, which "
        "no block has (1); the output of it is used in more than one place (1); its forward branches on data (1) |"
    )


def test_times():
    measured = {
        "train step, bf16 autocast": Measured(10.0, 8.0, 1.25, "ok"),
        "inference, bf16": Measured(10.0, 8.0, None, "RED: 1 of 3 tensors over budget"),
    }
    timings = Timings(MACHINE, {"batch": 4, "resolution": 128, "turns": 9}, {"timm:some": measured, "timm:no": "why"})
    text = document({"Some": [row(f"timm:{name}", report(), timings) for name in ("some", "no", "other")]}, timings)
    assert "medians of 9 turns in one process, on 4 images of 128 x 128" in " ".join(text.split())
    cells = [line.split(" | ")[6:8] for line in text.splitlines()[-3:]]
    assert cells == [["1.25x", ""], ["", ""], ["", ""]]


def test_times_in_a_file(tmp_path):
    timings = Timings(MACHINE, {"batch": 4}, {"timm:some": {"inference, bf16": Measured(1.0, 2.0, 0.5, "ok")}})
    timings = replace(timings, networks={**timings.networks, "timm:no": "cannot be built"})
    timings.save(tmp_path / "there" / "zoo.json")
    assert Timings.load(tmp_path / "there" / "zoo.json") == timings


def test_the_document_is_of_these_networks():
    rows = re.findall(ROW, DOCUMENT.read_text(), re.MULTILINE)
    assert [f"{library}:{name}" for library, name, *_ in rows] == [name for names in ZOO.values() for name in names]


def test_the_document_shows_the_coverage_that_is_aimed_at():
    # The stem and the head of a pre-activation network are convolutions with nothing next to them.
    aims = {"MobileNet": 90, "EfficientNet": 90, "Pre-activation ResNet": 90}
    aims |= dict.fromkeys(["ResNet", "Wide ResNet", "ResNeXt", "SE-ResNet", "RegNet", "DenseNet"], 95)
    for section in DOCUMENT.read_text().split("\n## ")[1:]:
        family = section.split("\n", 1)[0]
        for _, network, coverage, moved in re.findall(ROW, section, re.MULTILINE):
            assert int(coverage) >= aims.get(family, 0), f"{family}: {network}"
            if family in aims:
                assert float(moved) < 1.0, f"{family}: {network} moves more than stock"
