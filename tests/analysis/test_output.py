"""What the commands share."""

from __future__ import annotations

from argparse import ArgumentTypeError

import pytest

from fusedres import cli, console
from fusedres.analysis.output import shape_argument


def test_shapes():
    assert shape_argument("8,3,224,224") == shape_argument("8x3x224x224") == (8, 3, 224, 224)


@pytest.mark.parametrize("text", ["", "1,2,3", "1,2,3,x", "0,3,4,4", "1,2,3,4,5"])
def test_what_is_no_shape(text):
    with pytest.raises(ArgumentTypeError, match="N,C,H,W"):
        shape_argument(text)


STUDIES = [name for name, command in cli.COMMANDS.items() if command.module.startswith("fusedres.analysis")]


@pytest.mark.parametrize("name", STUDIES)
def test_a_missing_package_is_named(name, monkeypatch, capsys):
    monkeypatch.setattr(console, "find_spec", lambda package: None if package == "matplotlib" else object())
    assert cli.main([name]) == 2
    assert f"{name} needs matplotlib: pip install fusedres[demo]" in capsys.readouterr().out


def test_there_are_eight():
    assert len(STUDIES) == 8
