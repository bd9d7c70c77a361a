"""Blocks whose convolutions are fused ones, by their references, which exist on any device: all of them, and mixtures.

What a pass does with a pending value may not depend on what its neighbours do, so any choice of fused passes has to
give a block's numbers. The kernels themselves run whole blocks in ``tests/triton/cases/case_blocks.py``.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from zlib import crc32

import pytest
import torch
from described import BLOCKS, DenseBlock, Described, basic, bottleneck, fuse, norms
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fusedres import select
from fusedres.ops.conv_fused import conv_fused_unsuited
from fusedres.testing import INPUTS, channels_last, compare

EVERY = BLOCKS | {
    "dense": lambda: DenseBlock(channels=16, growth=8),
    "dense, one convolution": lambda: DenseBlock(channels=16, growth=8, inner=False),
    "dense, dropout": lambda: DenseBlock(channels=16, growth=8, dropout=0.3),
}
CHOICES = {  # whether a pass that could be fused is
    "all": lambda *pass_: True,
    "none": lambda *pass_: False,
    "1x1": lambda kind, x, weight, *rest: weight.shape[2:] == (1, 1),
    "forward": lambda kind, *rest: kind == "fprop",
    "data gradients": lambda kind, *rest: kind == "dgrad",
    "weight gradients": lambda kind, *rest: kind == "wgrad",
    **{f"mixture {i}": lambda *pass_, i=i: crc32(repr((i, _signature(*pass_))).encode()) % 2 == 0 for i in range(4)},
}
RUNS = {
    "float32": (EVERY, {}, 14),
    "bfloat16": (["bottleneck, projection", "dense"], {"dtype": torch.bfloat16}, 24),
    "float16": (["pre-activation, projection"], {"dtype": torch.float16}, 36),
    "autocast": (["basic", "bottleneck, projection", "dropout", "dense"], {"autocast": torch.bfloat16}, 24),
}
# Those in which every kind of link has every kind of neighbour.
MIXED = ["bottleneck, projection", "pre-activation, shared", "squeeze-excitation chain", "dropout", "dense"]


def _signature(kind, x, weight, g, prologue):
    return kind, tuple(x.shape), tuple(weight.shape), g, prologue


class Counting(TorchDispatchMode):
    """How often each of our ops is called."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fusedres":
            self.calls[func._opname] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def choose():
    """``choose(choice)``: from then on a backend with fused convolutions runs, by its ops' references."""
    with ExitStack() as stack:

        def begin(choice):
            def fuses(kind, x, weight, g, prologue):
                fits = conv_fused_unsuited(kind, x, weight, g) is None
                return fits and CHOICES[choice](kind, x, weight, g, prologue)

            stack.enter_context(select.fused_references(fuses))

        yield begin


def inputs_of(block: nn.Module, make=channels_last, size: int = 14):
    first = next(m for m in block.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d)))
    channels = first.in_channels if isinstance(first, nn.Conv2d) else first.num_features
    return lambda seed: [make((4, channels, size, size), seed=seed)]


def check(block, make=channels_last, size: int = 14, **options) -> None:
    compare(block, fuse, inputs_of(block, make, size), **options).check()


@pytest.mark.parametrize("mode", ["train", "frozen", "infer"])
@pytest.mark.parametrize(("run", "name"), [(run, name) for run, (names, *_) in RUNS.items() for name in names])
def test_against_float64(choose, run, name, mode):
    _, options, size = RUNS[run]
    choose("all")
    check(EVERY[name]().train(mode == "train"), backward=mode != "infer", size=size, **options)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("name", "choice"), [(n, "all") for n in EVERY] + [(n, c) for n in MIXED for c in CHOICES if c != "all"]
)
def test_gradcheck(choose, name, choice, training):
    block = EVERY[name]().double().train(training)
    fuse(block)
    choose(choice)
    for norm in norms(block):
        norm.track_running_stats = not training  # gradcheck calls it again and again
    x = inputs_of(block, size=4)(0)[0][:2].double().requires_grad_()
    names, leaves = zip(*((n, p.detach().requires_grad_()) for n, p in block.named_parameters()))

    def function(x, *parameters):
        return torch.func.functional_call(block, dict(zip(names, parameters)), (x,))

    assert torch.autograd.gradcheck(function, (x, *leaves), fast_mode=True)


@pytest.mark.parametrize("choice", ["1x1", "mixture 0", "mixture 1"])
@pytest.mark.parametrize("name", ["bottleneck, projection", "pre-activation, projection", "dense"])
def test_mixtures_under_autocast(choose, name, choice):
    choose(choice)
    check(EVERY[name]().train(), size=24, autocast=torch.bfloat16)


@pytest.mark.parametrize("make", INPUTS)
@pytest.mark.parametrize("name", ["bottleneck, projection", "pre-activation", "dense"])
def test_inputs_of_any_layout(choose, make, name):
    choose("all")
    check(EVERY[name]().train(), INPUTS[make])


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (3,), (0, 2), (1, 3)], ids=str)
def test_mixtures_of_frozen_norms(choose, frozen):
    choose("all")
    block = bottleneck(24, 48, 2).train()
    for i in frozen:
        norms(block)[i].eval()
    check(block)


@pytest.mark.parametrize("frozen", [name for name, _ in basic(24, 32, 2).named_parameters()])
def test_one_parameter_without_gradient(choose, frozen):
    choose("all")
    block = basic(24, 32, 2).train()
    block.get_parameter(frozen).requires_grad_(False)
    check(block)


@pytest.mark.parametrize("name", EVERY)
def test_input_without_gradient(choose, name):
    choose("all")
    check(EVERY[name]().train(), input_gradients=False)


@pytest.mark.parametrize("name", EVERY)
def test_the_gradient_that_comes_in_is_not_written_to(choose, name):
    choose("all")
    block = EVERY[name]().train()
    fuse(block)
    out = block(inputs_of(block)(0)[0].requires_grad_())
    cotangent = torch.randn_like(out)
    before = cotangent.clone()
    out.backward(cotangent)
    assert torch.equal(cotangent, before)


def results(block, x):
    """The output and every gradient."""
    fuse(block)
    leaf = x.clone().requires_grad_()
    out = block(leaf)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out)
    return [out, *torch.autograd.grad(out, [leaf, *block.parameters()], cotangent)]


@pytest.mark.parametrize("choice", ["all", "1x1"])
@pytest.mark.parametrize("name", ["bottleneck", "bottleneck, projection", "dense"])
def test_low_memory_gives_the_same_bits(choose, name, choice):
    choose(choice)
    block = EVERY[name]().train()
    x = inputs_of(block)(0)[0]
    auto = results(block, x)
    block.options = {"memory": "low"}
    assert all(torch.equal(a, b) for a, b in zip(auto, results(block, x)))


def test_a_single_convolution_beside_its_identity(choose):
    """Its data gradient reads the very gradient that it is added to."""
    choose("all")
    check(Described([nn.Conv2d(24, 24, 1, bias=False), nn.BatchNorm2d(24)], []).train())


# ---------------------------------------------------------------------------------------------------------------------
# What runs
# ---------------------------------------------------------------------------------------------------------------------


def passes(choose, block, choice: str = "all", backward: bool = True) -> dict[str, int]:
    """How often each op runs."""
    choose(choice)
    fuse(block)
    with Counting() as counting:
        out = block(inputs_of(block)(0)[0].requires_grad_(backward))
        if backward:
            out.backward(torch.ones_like(out))
    return {name: count for name, count in counting.calls.items() if name not in ("bn_norm", "bn_grad_rows")}


def test_a_bottleneck_has_one_pass_of_its_own_each_way(choose):
    convolutions = {"conv_fused_fprop": 3, "conv_fused_dgrad": 3, "conv_fused_wgrad": 3}
    assert passes(choose, bottleneck().train()) == convolutions | {"join": 1, "join_backward_mask": 1}


def test_a_projection_is_fused_too(choose):
    found = passes(choose, bottleneck(24, 48, 1).train())
    convolutions = {"conv_fused_fprop": 4, "conv_fused_dgrad": 4, "conv_fused_wgrad": 4}
    assert found == convolutions | {"join": 1, "join_backward_mask": 1}


def test_beside_a_vendors_3x3(choose):
    """Its input is applied and its output measured by passes; one that emits its input masks its data gradient."""
    found = passes(choose, bottleneck().train(), "1x1")
    convolutions = {"conv_fused_fprop": 2, "conv_fused_dgrad": 2, "conv_fused_wgrad": 2}
    own = {"join": 2, "bn_stats": 1, "join_backward_mask": 2, "join_backward_apply": 1}
    assert found == convolutions | own


def test_inference_has_no_pass_of_its_own(choose):
    with torch.no_grad():
        assert passes(choose, bottleneck(24, 48, 2).eval(), backward=False) == {"conv_fused_join": 4}
        assert passes(choose, BLOCKS["pre-activation"]().eval(), backward=False) == {"conv_fused_join": 2}


@pytest.mark.parametrize("name", EVERY)
def test_inference_without_folding_nor_fusing(choose, name):
    """As on a device whose backend has no fused convolutions."""
    choose("none")
    check(EVERY[name]().eval(), backward=False)


def test_inference_beside_a_vendors_3x3_has_none_either(choose):
    """What is pending behind it is applied by the convolution that loads it."""
    with torch.no_grad():
        assert passes(choose, bottleneck().eval(), "1x1", backward=False) == {"conv_fused_join": 2}


def test_dense_layers_write_into_the_buffer(choose):
    found = passes(choose, DenseBlock(channels=16, growth=8).train())
    # One copy of the input and its statistics; in backward, a layer's first norm adds to the buffer of gradients.
    expected = {"conv_fused_fprop": 6, "conv_fused_dgrad": 6, "conv_fused_wgrad": 6}
    assert found == expected | {"bn_stats": 1, "join_backward_apply": 3}
