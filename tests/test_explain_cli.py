"""``python -m fusedres explain``."""

from __future__ import annotations

import json
import re

import pytest
from torchvision_shim import timm_models, torchvision_models

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


def test_networks_of_libraries(capsys):
    torchvision_models()
    assert main(["explain", "torchvision:resnet18"]) == 0
    out = capsys.readouterr().out
    assert "20 of 20 convolutions would be fused" in out
    assert re.search(r"a training step on 3 x 224 x 224 moves \d+ MB per image; patched \d+ MB, 0\.\d+ of it", out)


FILE = """
from torch import nn
import its_neighbour

def Factory():
    return nn.Sequential(nn.Conv2d(3, its_neighbour.CHANNELS, 3), nn.BatchNorm2d(8))

INSTANCE = Factory()

def raises():
    raise OSError("no such weights")
"""


def test_a_callable_in_a_file(capsys, tmp_path):
    (tmp_path / "somebodys_file.py").write_text(FILE)
    (tmp_path / "its_neighbour.py").write_text("CHANNELS = 8")
    for name in ("Factory", "INSTANCE"):
        assert main(["explain", f"{tmp_path}/somebodys_file.py:{name}"]) == 0
        out = capsys.readouterr().out
        assert "1 of 1 convolutions would be fused" in out
        assert "a training step on 3 x 224 x 224 moves " in out
    assert main(["explain", f"{tmp_path}/somebodys_file.py:raises"]) == 2
    assert "raises raises OSError: no such weights" in capsys.readouterr().err
    (tmp_path / "broken.py").write_text("def (")
    assert main(["explain", f"{tmp_path}/broken.py:Factory"]) == 2
    assert "cannot be imported: SyntaxError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet19"], "'resnet19' is none of"),
        (["no_such_package:model"], "cannot be imported"),
        (["fusedres.models:resnet19"], "cannot be imported"),
        (["fusedres.models:init_weights"], "cannot be called without arguments"),
        (["fusedres.env:env_report"], "gives a EnvReport"),
        (["no_such_file.py:Model"], "there is no file no_such_file.py"),
        (["torchvision:resnet19"], "torchvision:resnet19 cannot be built: Unknown model resnet19"),
        (["timm:resnet19"], "timm:resnet19 cannot be built: Unknown model"),
        (["resnet18:"], "is none of"),
        (["resnet18", "--source", "layer9"], "no module was fused at 'layer9'"),
    ],
)
def test_what_is_wrong_is_said(capsys, arguments, message):
    if arguments[0].startswith(("torchvision:", "timm:")):
        timm_models()
    assert main(["explain", *arguments]) == 2
    assert message in capsys.readouterr().err
