"""The report as text, as JSON, and as data."""

from __future__ import annotations

import json

import pytest
from survey_blocks import MyResNet, ResidualBlock
from torch import nn

from fusedres.patch import Declined, Fused, PatchReport, patch

from .blocks import Layers


def report(*paths: str, declined: tuple[Declined, ...] = ()) -> PatchReport:
    sites = tuple(Fused(path, "identity", "cpu", (f"{path}.conv",)) for path in paths)
    return PatchReport(sites, declined, len(sites) + len(declined))


def test_neighbours_of_one_kind_share_a_row():
    text = str(report("layer1.0", "layer1.1", "layer1.2", "layer2.0", "layer2.2", "layer2.3", "head"))
    rows = [line.split("  ")[0] for line in text.splitlines()[4:]]
    assert rows == ["layer1.0 .. layer1.2", "layer2.0", "layer2.2 .. layer2.3", "head"]


def test_a_path_with_several_sites():
    assert "(the model) (x 2)" in str(report("", ""))


def test_declined_rows():
    text = str(report("a", declined=(Declined("b.conv1", "has a hook"), Declined("c", "is odd"))))
    assert text.splitlines()[0] == "1 of 3 convolutions fused (33%), in 1 sites"
    assert "b.conv1" in text
    assert "has a hook" in text


def test_table_is_narrow_and_aligned():
    model = nn.Sequential(MyResNet(3, 4, 2), nn.Conv2d(4, 4, 1))
    lines = str(patch(model)).splitlines()
    start = lines.index(next(line for line in lines if line.startswith("fused")))
    column = lines[start].index("pattern")
    assert lines[start + 2][:column].strip() == "0.stem"
    assert lines[start + 2][column:].startswith("conv-bn-relu")
    assert all(len(line) <= 120 for line in lines)
    assert any(line.startswith("1 ") and "stands alone" in line for line in lines)


def test_json():
    model = nn.Sequential(ResidualBlock(4), nn.Conv2d(4, 4, 1))
    content = json.loads(patch(model, dry_run=True).to_json())
    assert content["dry_run"] is True
    assert content["coverage"] == pytest.approx(2 / 3)
    assert content["convolutions"] == 3
    assert content["fused"] == [
        {
            "path": "0",
            "pattern": "post-activation residual (identity)",
            "backend": content["fused"][0]["backend"],
            "convolutions": ["0.conv1", "0.conv2"],
            "already": False,
            "remark": "",
        }
    ]
    assert [d["path"] for d in content["declined"]] == ["1"]


def test_why_a_sum_is_not_part_of_a_chain():
    class DropPath(nn.Module):
        def forward(self, x):
            return x * 1 if self.training else x

    class Block(Layers):
        def __init__(self, drop):
            super().__init__()
            self.drop = drop

        def forward(self, x):
            return self.drop(self.branch(x)) + x

    theirs, dropout = patch(Block(DropPath())), patch(Block(nn.Dropout(0.5)))
    assert theirs.fused[0].remark == "the addition add is not fused: drop is a DropPath, which no block has"
    assert "the branch ends with a dropout before the addition" in dropout.fused[0].remark
    text = str(patch(nn.Sequential(Block(DropPath()), Block(DropPath()))))
    assert "fused in part  reason\n" in text
    assert "0 .. 1         the addition add is not fused: drop is a DropPath" in text


def test_source_of_what_was_not_fused():
    with pytest.raises(KeyError, match="no module was fused at 'layer1'; fused: \\(the model\\)"):
        patch(Layers()).source("layer1")


def test_backend_is_the_selectors():
    from fusedres.select import backend_for

    model = ResidualBlock(4)
    weight = model.conv1.weight
    assert patch(model).fused[0].backend == backend_for(weight.device, weight.dtype)
    assert patch(ResidualBlock(4).double()).fused[0].backend == "reference"
