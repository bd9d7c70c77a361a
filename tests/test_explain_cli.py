"""``python -m fusedres explain``."""

from __future__ import annotations

import json

import pytest

from fusedres.cli import main


def test_a_network_of_ours(capsys):
    assert main(["explain", "resnet18"]) == 0
    assert "20 of 20 convolutions would be fused" in capsys.readouterr().out


def test_a_callable_of_anyones(capsys, monkeypatch, tmp_path):
    (tmp_path / "some_network.py").write_text(
        "from torch import nn\nclass Holder:\n    @staticmethod\n    def build():\n"
        "        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["explain", "some_network:Holder.build", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["convolutions"] == 1


def test_the_generated_source(capsys):
    assert main(["explain", "resnet18", "--source", "layer1.0"]) == 0
    assert "def forward(self, x)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet19"], "'resnet19' is none of"),
        (["no_such_package:model"], "cannot be imported"),
        (["fusedres.models:resnet19"], "cannot be imported"),
        (["fusedres.models:init_weights"], "cannot be called without arguments"),
        (["fusedres.env:env_report"], "gives a EnvReport"),
        (["resnet18", "--source", "layer9"], "no module was fused at 'layer9'"),
    ],
)
def test_what_is_wrong_is_said(capsys, arguments, message):
    assert main(["explain", *arguments]) == 2
    assert message in capsys.readouterr().err
