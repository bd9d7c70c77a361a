"""``python -m fusedres zoo``, and the document that it writes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from torchvision_shim import torchvision_models

from fusedres.cli import main
from fusedres.patch import Declined, Fused, PatchReport
from fusedres.zoo import ZOO, build
from fusedres.zoo.document import document

DOCUMENT = Path(__file__).parents[1] / "docs" / "zoo.md"


def test_networks_by_name(capsys):
    torchvision_models()
    assert main(["zoo", "torchvision:resnet18", "torchvision:squeezenet1_1"]) == 0
    out = capsys.readouterr().out
    assert "| torchvision resnet18 | 20 | 20 | 100% | 9 |  |" in out
    assert "| torchvision squeezenet1_1 | 26 |" in out


def test_to_a_file(tmp_path, capsys):
    torchvision_models()
    assert main(["zoo", "torchvision:resnet18", "--output", str(tmp_path / "zoo.md")]) == 0
    assert capsys.readouterr().out == ""
    assert "resnet18" in (tmp_path / "zoo.md").read_text()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet18", "is not of the form"),
        ("elsewhere:resnet18", "is not of the form"),
        ("torchvision:resnet19", "torchvision:resnet19 cannot be built: Unknown model resnet19"),
    ],
)
def test_unknown_networks(name, words, capsys):
    torchvision_models()
    assert main(["zoo", name]) == 2
    assert words in capsys.readouterr().err


def test_building_leaves_the_random_numbers():
    torch = pytest.importorskip("torch")
    torchvision_models()
    before = torch.get_rng_state()
    build("torchvision:resnet18")
    assert torch.equal(before, torch.get_rng_state())


def test_reasons_are_counted_without_names():
    reasons = [
        "a.conv1 stands alone: no norm next to it",
        "a.conv2 stands alone: no norm next to it",
        "nothing to fuse conv with: norm1 is a GroupNorm, which no block has",
        "the output of x.conv is used in more than one place",
        "stage.1: its forward branches on data (model.py:12: `if x.sum() > 0 | y:`)",
        "features.0 is a Conv, which has a forward of its own",
    ]
    declined = tuple(Declined(f"conv{i}", reason) for i, reason in enumerate(reasons))
    report = PatchReport((Fused("", "chain", "cpu", ("conv5",)),), declined, 7)
    row = document({"Some": {"timm:some": report}}).splitlines()[-1]
    assert row == (
        "| timm some | 7 | 1 | 14% | 1 | stands alone: no norm next to it (2); what follows is a GroupNorm, which no "
        "block has (1); the output of it is used in more than one place (1); its forward branches on data (1) |"
    )


def test_the_document_is_of_these_networks():
    rows = re.findall(r"^\| (torchvision|timm) (\S+) \| \d+ \| \d+ \| \d+% \|", DOCUMENT.read_text(), re.MULTILINE)
    assert [":".join(row) for row in rows] == [name for names in ZOO.values() for name in names]


def test_the_document_shows_the_coverage_that_is_aimed_at():
    # The stem and the head of a pre-activation network are convolutions with nothing next to them.
    aims = {"MobileNet": 90, "EfficientNet": 90, "Pre-activation ResNet": 90}
    aims |= dict.fromkeys(["ResNet", "Wide ResNet", "ResNeXt", "SE-ResNet", "RegNet", "DenseNet"], 95)
    for section in DOCUMENT.read_text().split("\n## ")[1:]:
        family, rows = section.split("\n", 1)
        for network, coverage in re.findall(r"^\| (\S+ \S+) \| \d+ \| \d+ \| (\d+)% \|", rows, re.MULTILINE):
            assert int(coverage) >= aims.get(family, 0), f"{family}: {network}"
