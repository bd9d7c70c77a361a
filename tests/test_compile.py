"""Under torch.compile and torch.export a block is its modules, in one graph: the compiler fuses what it traces."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torchvision_shim import torchvision_models

import fusedres
from fusedres import nn as blocks
from fusedres.testing import assert_within_budget, channels_last, compare

BLOCKS = {
    "basic": lambda: blocks.ResidualBlock(24, 32, 2),
    "bottleneck": lambda: blocks.BottleneckBlock(24, 24),
    "pre-activation": lambda: blocks.PreActBottleneckBlock(24, 32, 2),
    "wide": lambda: blocks.WideResidualBlock(24, 24),
    "aggregated": lambda: blocks.ResNeXtBottleneckBlock(24, 32, cardinality=4, width=4),
    "squeeze-excitation": lambda: blocks.SEBottleneckBlock(24, 32, reduction=4),
    "dense": lambda: blocks.DenseBlock(3, 24, 8),
    "gated": lambda: blocks.HighwaySkip(blocks.ResidualBlock(24), 24),
}


def compile_(module: nn.Module, **options) -> None:
    torch._dynamo.reset()
    module.compile(backend="aot_eager", fullgraph=True, **options)


class Either(nn.Module):
    """A block in stock PyTorch, or compiled."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.compiles = block, False

    def forward(self, x: Tensor) -> Tensor:
        if self.compiles:
            return self.block(x)
        with fusedres.use_backend("stock"):
            return self.block(x)


def choose_compiled(module: Either) -> None:
    module.compiles = True
    compile_(module.block)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_in_one_graph(name, training):
    module = Either(BLOCKS[name]().train(training))
    compare(module, choose_compiled, lambda seed: [channels_last((4, 24, 14, 14), seed=seed)]).check()


@pytest.fixture(scope="module")
def patched() -> nn.Module:
    torch.manual_seed(0)
    model = torchvision_models().resnet18(num_classes=8)
    fusedres.patch(model)
    return model


def test_modes_and_batch_sizes_compile_once_each(patched):
    model = copy.deepcopy(patched)
    compile_(model, dynamic=True)
    for training in (True, False):
        model.train(training)(torch.randn(2, 3, 32, 32))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for training in (True, False, True):
            model.train(training)
            for batch in (2, 3, 5):
                model(torch.randn(batch, 3, 32, 32))


@pytest.mark.parametrize("training", [True, False])
def test_export(patched, training, tmp_path):
    x = torch.randn(2, 3, 32, 32)
    exported = torch.export.export(patched.train(training), (x,))
    torch.export.save(exported, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    with fusedres.use_backend("stock"):
        stock, reference = copy.deepcopy(patched)(x), copy.deepcopy(patched).double()(x.double())
    assert_within_budget(loaded(x), stock, reference)
    assert not any("fusedres" in str(node.target) for node in exported.graph.nodes)
