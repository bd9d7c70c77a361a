"""The report as text, as JSON, and as data."""

from __future__ import annotations

import gc
import json
import pickle

import pytest
import torch
from survey_blocks import BottleneckBlock, MyResNet, ResidualBlock
from torch import nn

from fusedres.analysis import traffic
from fusedres.patch import Declined, Fused, PatchReport, explain, patch

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


def test_norms_in_the_summary():
    model = nn.Sequential(ResidualBlock(4), nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4))
    assert str(patch(model)).splitlines()[0] == "2 of 3 convolutions fused (67%), in 1 sites; 2 of 3 norms"


def test_what_became_one_call_is_below_its_row():
    model = nn.Sequential(ResidualBlock(4), ResidualBlock(4), BottleneckBlock(4, 8), ResidualBlock(8))
    residual = "    relu(x -> conv1 -> bn1 -> relu -> conv2 -> bn2  +  x)"
    lines = str(patch(model)).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("fused "))
    assert [lines[start + 2][:6], *lines[start + 3 : start + 4], lines[start + 4][:2]] == ["0 .. 1", residual, "2 "]
    assert lines[start + 5].startswith("    relu(x -> conv1") and "projection" in lines[start + 4]
    assert lines[start + 6].startswith("3 ")
    assert lines.count(residual) == 1  # the last row is as the first


def formulas(*said: str) -> list[str]:
    """The lines below the row of sites of one module with these formulas."""
    sites = tuple(Fused("a", "identity", "cpu", (f"a.{i}",), formula=f) for i, f in enumerate(said))
    return str(PatchReport(sites, (), len(sites))).splitlines()[5:]


def test_many_and_long_formulas():
    assert formulas("x -> a", "x -> b", "x -> b") == ["    x -> a", "    x -> b"]
    assert formulas(*"abcde") == ["    a", "    b", "    c", "    ... and 2 more such"]
    assert formulas("all\n    [...] -> a\n    [...] -> b\n    [...] -> c") == ["    [...] -> a, and 2 more"]
    (line,) = formulas("x" + " -> conv" * 20 + "  +  x -> downsample")
    assert len(line) <= 120
    assert line.startswith("    x -> conv") and " ... " in line and line.endswith("  +  x -> downsample")


def test_formula_is_that_of_the_source():
    found = patch(nn.Sequential(ResidualBlock(4)))
    assert f"# block_0: {found.fused[0].formula}\n" in found.source("0")


def test_layers_left_for_one_reason_share_a_row():
    declined = (
        *(Declined(f"a.{i}.b.{j}.conv1", f"{j}.conv1 is odd: see {i}.x") for i in range(2) for j in range(2)),
        *(Declined(f"a.{i}.b.0.conv2", "conv2 is odd") for i in range(2)),
        *(Declined(f"stage_{i}.norm", f"stage_{i}.norm is odd", "norm") for i in (1, 3)),
        *(Declined(f"head.{i}", "is odd") for i in range(3)),
        Declined("head.conv", "head.conv is even"),
    )
    lines = str(report("a", declined=declined)).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("left as it is"))
    assert [line.split("  ")[0] for line in lines[start + 2 :]] == [
        "a.*.b.*.conv1 (x 4)",
        "a.*.b.0.conv2 (x 2)",
        "stage_*.norm (x 2)",
        "head.0 .. head.2",
        "head.conv",
    ]
    assert [line.split("  ")[-1].strip() for line in lines[start + 2 :]] == [
        "conv1 is odd: see *.x",
        "conv2 is odd",
        "norm is odd",
        "is odd",
        "head.conv is even",
    ]


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
            "norms": ["0.bn1", "0.bn2"],
            "formula": "relu(x -> conv1 -> bn1 -> relu -> conv2 -> bn2  +  x)",
        }
    ]
    assert content["norms"] == 2
    assert {d["kind"] for d in content["declined"]} == {"convolution"}
    assert [d["path"] for d in content["declined"]] == ["1"]


def test_bytes_per_image():
    model = MyResNet(3, 8, 2).to(memory_format=torch.channels_last)
    found = explain(model)
    stock, fused = found.bytes_per_image((16, 3, 64, 64))
    assert 0.4 < fused / stock < 0.95
    whole = traffic(model, (16, 3, 64, 64), torch.float32)
    assert stock == whole.total("stock").nbytes / 16
    assert fused == whole.total("fused").nbytes / 16
    assert found.bytes_per_image((16, 3, 32, 64))[0] < stock
    assert patch(model, memory="low").bytes_per_image((16, 3, 64, 64))[0] == stock
    content = json.loads(found.to_json())["bytes_per_image"]
    assert content["shape"] == [32, 3, 224, 224]
    text = str(found).splitlines()[1]
    assert text.startswith("a training step on 3 x 224 x 224 moves ")
    assert f"{content['stock'] / 1e6:.3g} MB per image; patched {content['fused'] / 1e6:.3g} MB" in text


def test_bytes_that_cannot_be_predicted():
    found = explain(model := nn.Sequential(ResidualBlock(4), nn.Flatten(), nn.Linear(4 * 36, 2)))
    with pytest.raises(ValueError, match="the model does not run on 2 x 4 x 5 x 5: "):
        found.bytes_per_image((2, 4, 5, 5))
    assert found.bytes_per_image((2, 4, 6, 6))[0] > 0
    assert str(found).splitlines()[1].startswith("bytes per image: not predicted, the model does not run on")
    assert json.loads(found.to_json())["bytes_per_image"] is None
    del model
    gc.collect()  # the error above holds its frames
    with pytest.raises(ValueError, match="the model is gone"):
        found.bytes_per_image()
    with pytest.raises(ValueError, match="the report is of no model"):
        report("a").bytes_per_image()
    assert pickle.loads(pickle.dumps(found)).fused == found.fused


def test_predicting_leaves_the_model_and_the_random_numbers():
    model = MyResNet(3, 4, 1).eval()
    state, before = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    str(patch(model))
    assert torch.equal(state, torch.get_rng_state())
    assert not model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


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
