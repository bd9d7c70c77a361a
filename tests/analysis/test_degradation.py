"""Training error by depth, at a size for tests."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch

from fusedres.analysis import degradation
from fusedres.analysis.degradation import small_digits
from fusedres.cli import main
from fusedres.demo.data import Digits


def few(count: int) -> Digits:
    data = small_digits()
    return replace(data, train_images=data.train_images[:count], train_classes=data.train_classes[:count])


def test_the_digits_in_their_own_size():
    data = small_digits()
    assert data.train_images.shape[1:] == data.test_images.shape[1:] == (1, 8, 8)


def test_every_kind_and_depth_is_trained():
    stages: list[str] = []
    runs = degradation((8, 14), ("plain", "pre-activation"), epochs=2, data=few(128), begin=stages.append)
    assert [(r.kind, r.depth) for r in runs] == [(k, d) for d in (8, 14) for k in ("plain", "pre-activation")]
    assert stages[0] == "plain, 8 layers"
    for r in runs:
        assert len(r.losses) == len(r.errors) == 2
        assert all(0 <= error <= 1 for error in r.errors)


def test_the_same_seed_gives_the_same_training():
    first, second = (degradation((8,), ("residual",), epochs=1, data=few(128), seed=5) for _ in range(2))
    assert first == second
    assert first != degradation((8,), ("residual",), epochs=1, data=few(128), seed=6)


def test_depth_degrades_a_plain_network_and_not_a_residual_one():
    runs = {(r.kind, r.depth): r for r in degradation((8, 50), epochs=4, data=few(640))}
    assert runs["residual", 8].errors[-1] < 0.3
    assert runs["residual", 50].errors[-1] < 0.3
    assert runs["plain", 50].errors[-1] > runs["plain", 8].errors[-1] + 0.3


def test_bad_arguments():
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        degradation((8,), epochs=0)
    with pytest.raises(ValueError, match="6n \\+ 2"):
        degradation((9,), data=few(64))
    with pytest.raises(ValueError, match="got 'dense'"):
        degradation((8,), ("dense",), data=few(64))


def test_other_images():
    images, classes = torch.randn(64, 3, 8, 8), torch.arange(64) % 4
    (run,) = degradation((8,), ("residual",), epochs=1, data=Digits(images, classes, images, classes))
    assert run.losses[0] > 0


def test_the_command(tmp_path, capsys, monkeypatch):
    data = few(64)
    # By name, since the package's attribute of this name is the function.
    monkeypatch.setattr(sys.modules["fusedres.analysis.degradation"], "small_digits", lambda: data)
    figure, results = tmp_path / "figure.png", tmp_path / "results.json"
    options = ["--depths", "8", "--epochs", "2", "--out", str(figure), "--json", str(results)]
    assert main(["degradation", *options]) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert [run["kind"] for run in json.loads(results.read_text())] == ["plain", "residual"]
    assert "last epoch's error" in capsys.readouterr().out
    assert main(["degradation", "--depths", "9"]) == 2
