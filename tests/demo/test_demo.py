"""The demo's parts: its images, its training, its figure, and what it says when a package is missing."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fusedres import console, select
from fusedres.cli import main
from fusedres.demo.data import digits, photographs
from fusedres.demo.plot import save_figure
from fusedres.demo.training import Training, deviation, train
from fusedres.engine.training import BlockFunction


def test_photographs():
    images = photographs()
    assert images.shape == (8, 3, 224, 224)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images[1], images[0].flip(2))
    assert 0.5 < images.std() < 2


def test_digits_are_split_without_overlap():
    data = digits()
    assert len(data.train_images) + len(data.test_images) == 1797
    assert data.train_images.shape[1:] == (1, 16, 16)
    assert len(data.train_classes) == len(data.train_images)


def test_training_starts_from_the_same_weights_and_batches():
    data = digits()
    few = dataclasses.replace(
        data,
        train_images=data.train_images[:192],
        train_classes=data.train_classes[:192],
        test_images=data.test_images[:32],
        test_classes=data.test_classes[:32],
    )
    stock, fused = (train(few, 1, fused=fused) for fused in (False, True))
    assert len(stock.losses) == 3
    assert stock.losses[0] == pytest.approx(fused.losses[0], rel=1e-4)
    assert deviation(stock, fused) < 1e-2


def test_the_figure(tmp_path):
    trainings = {name: Training((2.0, 1.0), 0.5, 1.0) for name in ("stock", "patched", "stock, NCHW")}
    path = tmp_path / "figure.png"
    save_figure(path, trainings, {"train": {"eager": 1.0, "fusedres": 2.0}, "inference": {}}, "a machine")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setattr(console, "find_spec", lambda name: None if name == "sklearn" else object())
    assert main(["demo", "--quick"]) == 2
    assert "the demo needs sklearn: pip install fusedres[demo]" in capsys.readouterr().out


def test_training_runs_the_fused_kernels_at_the_size_of_digits(monkeypatch):
    """A curve that lies on stock's because both are stock would show nothing."""
    monkeypatch.setitem(select.FEWEST_ELEMENTS, "training", 2**60)
    calls = []
    apply = BlockFunction.apply
    monkeypatch.setattr(BlockFunction, "apply", lambda *args: calls.append(1) or apply(*args))
    data = digits()
    few = dataclasses.replace(data, train_images=data.train_images[:64], train_classes=data.train_classes[:64])
    train(few, 1, fused=True)
    assert len(calls) == 10  # nine blocks and the stem
