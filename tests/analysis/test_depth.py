"""Very deep networks, at a depth for tests."""

from __future__ import annotations

import json
import sys

import pytest

from fusedres import models
from fusedres.analysis import deep_training
from fusedres.analysis.depth import Deep
from fusedres.analysis.peak import Measured
from fusedres.cli import main


def test_a_short_training():
    found = deep_training("cifar_resnet(8)", 30, memory="low")
    assert len(found.losses) == len(found.seconds) == 30
    assert found.falls
    assert found.peak > 2**26
    assert found.params == sum(p.numel() for p in models.cifar_resnet(8, in_channels=1).parameters())


def test_falling_is_in_the_median_of_thirds():
    assert Deep("", (3.0, 9.0, 2.0, 1.0, 1.0, 1.5), (), 0, 0).falls
    assert not Deep("", (1.0, 1.0, 0.0, 1.0, 1.0, 1.0), (), 0, 0).falls


@pytest.mark.parametrize("name", ["cifar_resnet", "cifar_resnet(x)", "nothing(20)", "NETWORKS(20)"])
def test_a_name_that_is_no_network(name):
    with pytest.raises(ValueError, match="network must be a function of"):
        deep_training(name)


def test_a_depth_that_does_not_exist():
    with pytest.raises(ValueError, match=r"6n \+ 2"):
        deep_training("cifar_resnet(9)")


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.modules["fusedres.analysis.depth"], "in_child", lambda f, *args: Measured(f(*args), 2**30))
    figure, results = tmp_path / "figure.png", tmp_path / "results.json"
    options = ["cifar_resnet(8)", "--steps", "3", "--batch", "8", "--out", str(figure), "--json", str(results)]
    assert main(["depth", *options]) in (0, 1)  # three steps need not make the loss fall
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert len(json.loads(results.read_text())[0]["losses"]) == 3
    assert "peak memory" in capsys.readouterr().out
    assert main(["depth", *options, "--limit", "0.001"]) == 1
    assert main(["depth", "nothing(3)"]) == 2
