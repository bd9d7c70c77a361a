"""``python -m fusedres zoo``."""

from __future__ import annotations

import json

import pytest
from torchvision_shim import torchvision_models

from fusedres.cli import main
from fusedres.zoo import agreement, timings


def test_networks_by_name(capsys):
    torchvision_models()
    assert main(["zoo", "torchvision:resnet18", "torchvision:squeezenet1_[01]", "torchvision:mnasnet0_?"]) == 2
    assert main(["zoo", "torchvision:resnet18", "torchvision:shufflenet_v2_x0*"]) == 0
    out = capsys.readouterr().out
    assert "| torchvision resnet18 | 20 | 20 | 100% | 9 | 0." in out
    assert "| torchvision shufflenet_v2_x0_5 | 56 |" in out


def test_to_a_file(tmp_path, capsys):
    torchvision_models()
    assert main(["zoo", "torchvision:resnet18", "--output", str(tmp_path / "zoo.md")]) == 0
    assert capsys.readouterr().out == ""
    assert "resnet18" in (tmp_path / "zoo.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["resnet18"], "is not of the form"),
        (["elsewhere:resnet18"], "is not of the form"),
        (["elsewhere:*"], "'elsewhere' is none of torchvision, timm, smp, transformers"),
        (["torchvision:nothing*"], "no network is named torchvision:nothing*"),
        (["torchvision:resnet19"], "torchvision:resnet19 cannot be built: Unknown model resnet19"),
        (["torchvision:resnet18", "--results", "nowhere.json"], "nowhere.json"),
    ],
)
def test_what_is_wrong_is_said(arguments, words, capsys):
    torchvision_models()
    assert main(["zoo", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_checking(capsys):
    torchvision_models()
    assert main(["zoo", "--check", "torchvision:squeezenet1_1", "torchvision:resnet19", "torchvision:alexnet"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "agrees   torchvision:squeezenet1_1: 26 of 26 convolutions"
    assert lines[1].startswith("not run  torchvision:resnet19: ")
    assert lines[2] == "not run  torchvision:alexnet: 5 of 5 convolutions, 61 million parameters"
    assert lines[3] == "1 agrees, 0 differs, 2 not run"


def test_a_difference_is_a_failure(capsys, monkeypatch):
    torchvision_models()

    def spoiled(model):
        report = agreement.patch(model)
        next(model.parameters()).data.mul_(1.5)
        return report

    monkeypatch.setattr(agreement, "agreement", lambda model, check=agreement.agreement: check(model, fuse=spoiled))
    assert main(["zoo", "--check", "torchvision:squeezenet1_1"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("differs  torchvision:squeezenet1_1: 26 of 26 convolutions; ")
    assert "0 agrees, 1 differs, 0 not run" in out


def test_timing(capsys, tmp_path, monkeypatch):
    torchvision_models()
    monkeypatch.setattr(timings, "BATCH", 2)
    monkeypatch.setattr(timings, "RESOLUTION", 64)
    monkeypatch.setattr(timings, "TURNS", 2)
    path = tmp_path / "results" / "zoo.json"
    assert main(["zoo", "--timings", "--json", str(path), "torchvision:shufflenet_v2_x0_5", "torchvision:none"]) == 0
    out = capsys.readouterr().out
    assert "torchvision:shufflenet_v2_x0_5, train step, bf16 autocast: stock " in out
    assert "torchvision:none: torchvision:none cannot be built" in out
    content = json.loads(path.read_text())
    assert content["settings"] == {"batch": 2, "resolution": 64, "turns": 2}
    assert main(["zoo", "torchvision:shufflenet_v2_x0_5", "--results", str(path)]) == 0
    assert "| train step, bf16 | inference, bf16 |" in capsys.readouterr().out
