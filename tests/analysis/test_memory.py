"""What a step keeps, and what it peaks at."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import fusedres
from fusedres import models
from fusedres.analysis import memory, saved_activations
from fusedres.analysis.memory import VARIANTS, save_plot
from fusedres.analysis.peak import Measured
from fusedres.benchmarking import saved_bytes
from fusedres.benchmarking.results import MemoryUse, Results
from fusedres.cli import main


def nhwc(*shape: int) -> torch.Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def test_a_bottleneck_keeps_what_the_design_says():
    """In units of its narrow tensor: 12 as stock, 10 fused, 6 with low memory, and a few numbers per channel."""
    n, size = 4, 32
    block = models.resnet50(fused=False).layer1[1].to(memory_format=torch.channels_last)
    model = nn.Sequential(nn.BatchNorm2d(256), block)  # makes the block's input one that autograd has
    found = saved_activations(model, nhwc(n, 256, size, size))
    unit = n * 64 * size * size * 4
    # The norm in front keeps its input, 4 units; behind the block, stock keeps its output for ReLU's backward.
    for kept, units in ((found.stock, 4 + 16), (found.patched, 4 + 10), (found.low, 4 + 6)):
        assert 0 <= kept / unit - units < 0.1
    assert found.ratio == found.patched / found.stock


def test_a_patched_model_is_measured_as_a_stock_one_and_stays_patched():
    model, x = models.cifar_resnet(8, fused=False), nhwc(2, 3, 16, 16)
    stock = saved_activations(model, x)
    assert stock.stock == saved_bytes(model, lambda: model(x))
    fusedres.patch(model)
    assert saved_activations(model, x) == stock
    assert fusedres.unpatch(model) > 0


def test_every_variant_gives_the_same_gradients():
    x = nhwc(2, 3, 16, 16)
    gradients = {}
    for name in ("stock", "patched", 'patched, memory="low"', "checkpointing"):
        torch.manual_seed(0)
        model = models.cifar_resnet(8, fused=False).double()
        VARIANTS[name](model)(x.double()).square().mean().backward()
        gradients[name] = torch.cat([p.grad.flatten() for p in model.parameters()])
    for gradient in gradients.values():
        assert torch.allclose(gradient, gradients["stock"])


def test_measured_in_processes_of_their_own():
    shape = (4, 3, 64, 64)
    stages: list[str] = []
    stock, checkpointing = memory("cifar_resnet", shape, variants=("stock", "checkpointing"), begin=stages.append)
    assert stages == ["stock", "checkpointing"]
    assert not stock.missing
    assert checkpointing.saved < stock.saved
    # The step's tensors are alive at its peak.
    assert stock.peak > stock.saved / 2


def test_a_failure_is_told_in_its_row(monkeypatch):
    monkeypatch.setitem(VARIANTS, "broken", None)  # the child has no such form
    (found,) = memory("cifar_resnet", (1, 3, 8, 8), variants=("broken",))
    assert "KeyError" in found.missing


def test_unknown_names():
    with pytest.raises(ValueError, match="got 'magic'"):
        memory("cifar_resnet", (1, 3, 8, 8), variants=("magic",))
    with pytest.raises(ValueError, match="'nothing' is none of"):
        memory("nothing", (1, 3, 8, 8))


def use(variant: str, saved: int = 0, peak: int = 0, missing: str = "") -> MemoryUse:
    return MemoryUse("a network", (1, 3, 8, 8), "float32", variant, "cpu", saved, peak, missing)


@pytest.mark.parametrize(("suffix", "head"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_the_figure_with_what_is_missing(tmp_path, suffix, head):
    found = {"a": (use("stock", 2, 3), use("torch.compile", missing="no compiler")), "b": (use("stock", 1, 1),)}
    path = tmp_path / f"figure.{suffix}"
    save_plot(path, found, "a step")
    assert path.read_bytes().startswith(head)


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.modules["fusedres.analysis.memory"], "in_child", lambda f, *args: Measured(f(*args), 2**40))
    figure, results = tmp_path / "figure.svg", tmp_path / "results.json"
    options = ["--shape", "1,3,16,16", "--variants", "stock", "--out", str(figure), "--json", str(results)]
    assert main(["memory", "cifar_resnet", "wrn", "--budget", "0", *options]) == 0
    assert figure.read_bytes().startswith(b"<?xml")
    loaded = Results.load(results)
    assert [(m.model, m.variant, m.shape) for m in loaded.memory] == [("cifar_resnet", "stock", (1, 3, 16, 16))]
    assert loaded.memory[0].saved > 0 and loaded.memory[0].peak > 2**39
    assert loaded.settings["left_out"] == ["wrn: no time"]
    printed = capsys.readouterr().out
    assert "peak" in printed and "left out: wrn" in printed
    assert main(["memory", "nothing"]) == 2


def test_being_cut_off_loses_no_network(tmp_path, monkeypatch):
    def measured_or_cut_off(name, *args, **kwargs):
        if name == "wrn":
            raise KeyboardInterrupt
        return (use("stock", 2, 3),)

    monkeypatch.setattr(sys.modules["fusedres.analysis.memory"], "memory", measured_or_cut_off)
    results = tmp_path / "results.json"
    with pytest.raises(KeyboardInterrupt):
        main(["memory", "cifar_resnet", "wrn", "--json", str(results), "--out", str(tmp_path / "figure.svg")])
    assert Results.load(results).memory == (use("stock", 2, 3),)
