"""Dense blocks from one buffer: the numbers against float64, what is kept for backward, and when it runs as stock."""

from __future__ import annotations

import copy

import pytest
import torch
from described import DenseBlock, fuse

from fusedres.benchmarking.memory import saved_bytes
from fusedres.block import Act, Conv, Dense, Norm, unsupported
from fusedres.ops.activations import RELU
from fusedres.testing import INPUTS, channels_last, compare, contiguous

RUNS = {
    "float32": ({}, 14),
    "bfloat16": ({"dtype": torch.bfloat16}, 24),
    "float16": ({"dtype": torch.float16}, 36),
    "autocast": ({"autocast": torch.bfloat16}, 24),
}


def inputs(make=channels_last, size: int = 14):
    return lambda seed: [make((3, 10, size, size), seed=seed)]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("mode", ["train", "frozen", "infer"])
@pytest.mark.parametrize("memory", ["auto", "low"])
@pytest.mark.parametrize("inner", [True, False])
def test_against_float64(inner, memory, mode, run):
    options, size = RUNS[run]
    block = DenseBlock(inner=inner, memory=memory).train(mode == "train")
    compare(block, fuse, inputs(size=size), backward=mode != "infer", **options).check()


@pytest.mark.parametrize("make", INPUTS)
@pytest.mark.parametrize("backward", [True, False])
def test_inputs_of_any_layout(make, backward):
    compare(DenseBlock().train(backward), fuse, inputs(INPUTS[make]), backward=backward).check()


@pytest.mark.parametrize("memory", ["auto", "low"])
@pytest.mark.parametrize("training", [True, False])
def test_dropout_behind_the_layers(training, memory):
    compare(DenseBlock(dropout=0.3, memory=memory).train(training), fuse, inputs()).check()


def test_the_result_has_the_inputs_layout():
    block = DenseBlock()
    fuse(block)
    assert block(contiguous((2, 10, 5, 7))).is_contiguous()
    assert block(channels_last((2, 10, 5, 7))).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("frozen", [name for name, _ in DenseBlock(2).named_parameters()])
def test_one_parameter_without_gradient(frozen):
    block = DenseBlock(2).train()
    block.get_parameter(frozen).requires_grad_(False)
    compare(block, fuse, inputs()).check()


def test_input_without_gradient():
    compare(DenseBlock().train(), fuse, inputs(), input_gradients=False).check()


def test_one_frozen_norm():
    block = DenseBlock().train()
    block.layers[1][0].eval()
    compare(block, fuse, inputs()).check()


def test_one_node():
    block = DenseBlock()
    fuse(block)
    assert type(block(channels_last((2, 10, 8, 8)).requires_grad_()).grad_fn).__name__ == "DenseFunctionBackward"


def test_what_is_kept_grows_with_the_depth_not_with_its_square():
    def kept(count: int, fuses: bool) -> int:
        block = DenseBlock(count, growth=8).train()
        block.fuses = fuses
        x = channels_last((2, 10, 16, 16)).requires_grad_()
        return saved_bytes(block, lambda: block(x))

    assert kept(16, True) / kept(8, True) < 2.2
    assert kept(16, False) / kept(8, False) > 2.5


def test_a_replaced_layer_is_called():
    block = DenseBlock()
    stock = copy.deepcopy(block)
    for b in (block, stock):
        b.layers[1][2].register_forward_hook(lambda module, args, out: out * 2)
    fuse(block)
    x = channels_last((2, 10, 8, 8))
    torch.testing.assert_close(block(x), stock(x))


def test_empty_batch():
    block = DenseBlock().eval()
    fuse(block)
    assert block(torch.empty(0, 10, 8, 8)).shape == (0, 28, 8, 8)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        ((Conv("a"),), "begin with a norm"),
        ((Norm("a"), Act(RELU)), "begin with a norm"),
        ((Norm("a"), Conv("b"), Norm("c")), "end with its convolution"),
    ],
)
def test_layers_that_the_engine_cannot_express(layer, reason):
    assert reason in unsupported(Dense((layer,)))
