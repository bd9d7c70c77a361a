"""A compiled model is one graph, with stock numbers, in every mode and for every batch size."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from trained import small_resnet

import fusedres
from fusedres import nn as blocks
from fusedres.select import FEWEST_ELEMENTS
from fusedres.testing import Results, channels_last, compare, compare_results, run_and_collect

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


def test_modes_and_batch_sizes_compile_once_each():
    """One graph for training and one for evaluation serve every batch size and every change of mode, with stock's
    numbers in each: outputs, gradients and running statistics.
    """
    sizes = (4, 5, 7)
    stock = small_resnet()
    model = copy.deepcopy(stock)
    assert fusedres.patch(model).coverage == 1.0
    compile_(model, dynamic=True)
    for training in (True, False):
        run_and_collect(model.train(training), [channels_last((sizes[0], 3, 40, 40)).requires_grad_()])

    def calls(one: nn.Module, seed: int, like: Results | None = None) -> Results:
        """In training and in evaluation with every batch size, and in training again."""
        found: Results = {}
        for call, (training, batch) in enumerate([*itertools.product((True, False), sizes), (True, sizes[0])]):
            one.train(training).zero_grad()
            x = channels_last((batch, 3, 40, 40), next(one.parameters()).dtype, 10 * seed + call).requires_grad_()
            results = run_and_collect(one, [x], like=None if like is None else like[f"{call}: output"])
            found |= {f"{call}: {name}": t for name, t in results.items()}
        return found

    def draw(seed: int) -> tuple[Results, Results, Results]:
        model.load_state_dict(stock.state_dict())
        expected = calls(copy.deepcopy(stock), seed)
        return calls(model, seed), expected, calls(copy.deepcopy(stock).double(), seed, expected)

    with torch._dynamo.config.patch(error_on_recompile=True):
        compare_results(draw).check()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("name", "channels"), [("bottleneck", 24), ("dense", 48)])
def test_one_graph_for_small_and_large_batches(monkeypatch, name, channels, training):
    """Whether an input is too small for the engine is no part of a graph for every size."""
    for mode in FEWEST_ELEMENTS:
        monkeypatch.setitem(FEWEST_ELEMENTS, mode, 6 * channels * 14 * 14)
    block = BLOCKS[name]().train(training)
    stock = copy.deepcopy(block)
    compile_(block, dynamic=True)

    def call(batch: int) -> None:
        with torch.set_grad_enabled(training):
            x = channels_last((batch, 24, 14, 14))
            torch.testing.assert_close(block(x), stock(x), rtol=1e-4, atol=1e-4)

    call(4)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (9, 3, 7):
            call(batch)


@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_have_the_strides_of_their_parameters(name):
    block = BLOCKS[name]().to(memory_format=torch.channels_last)
    block(channels_last((4, 24, 14, 14))).sum().backward()
    for path, p in block.named_parameters():
        assert p.grad.stride() == p.stride(), path
