"""Blocks whose inputs are too small to be fused: the same bits as from their modules, with fewer calls."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from described import BLOCKS, Depth, Described, basic, conv, fuse, norm
from torch import Tensor, nn
from torchvision_shim import torchvision_models

import fusedres
from fusedres import select
from fusedres.testing import channels_last, run_and_collect


@pytest.fixture(autouse=True)
def everything_too_small(monkeypatch, nothing_too_small) -> None:
    for mode in select.FEWEST_ELEMENTS:
        monkeypatch.setitem(select.FEWEST_ELEMENTS, mode, sys.maxsize)


def without_dropout(block: nn.Module) -> nn.Module:
    """``Described`` draws a fused block's masks, and here none is fused."""
    for module in block.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return block


def check(stock: Described, *inputs: Tensor, backward: bool = True) -> None:
    """The same bits either way, and inputs that stay as they are."""
    ours = copy.deepcopy(stock)
    fuse(ours)
    before = [x.clone() for x in inputs]
    found, expected = (run_and_collect(one, inputs, backward=backward) for one in (ours, stock))
    assert all(torch.equal(x, y) for x, y in zip(inputs, before))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["train", "frozen", "infer"])
@pytest.mark.parametrize("name", BLOCKS)
def test_the_same_bits_as_the_modules(name, mode):
    block = without_dropout(BLOCKS[name]()).train(mode == "train")
    channels = next(iter(block.parameters())).shape[1 if isinstance(block.branch[0], nn.Conv2d) else 0]
    check(block, channels_last((2, channels, 6, 6)).requires_grad_(mode != "infer"), backward=mode != "infer")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"norm_momentum": None},
        {"norm_affine": False},
        {"norm_track_running_stats": False},
        {"padding_mode": "reflect"},
        {"padding": "same", "dilation": 2},
    ],
    ids=str,
)
def test_settings(options, training):
    check(basic(24, **options).train(training), channels_last((2, 24, 6, 6)).requires_grad_())


def reset_statistics(block: nn.Module) -> None:
    block.branch[1].running_mean = block.branch[1].running_var = block.branch[1].num_batches_tracked = None


def halve_by_a_hook(block: nn.Module) -> None:
    for i in range(4):
        block.branch[i].register_forward_hook(lambda module, inputs, out: out * 0.5)


def replace_forward(block: nn.Module) -> None:
    block.branch[2].forward = lambda x: x * 0.5


def replace_convolution(block: nn.Module) -> None:
    block.branch[0]._conv_forward = lambda x, weight, bias: x * 0.5


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "statistics taken away": reset_statistics,
    "hooks": halve_by_a_hook,
    "a forward of its own": replace_forward,
    "a convolution of its own": replace_convolution,
    "weight norm": lambda block: nn.utils.parametrizations.weight_norm(block.branch[0]),
    "another layer": lambda block: block.branch.__setitem__(1, nn.InstanceNorm2d(24)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_layers_are_called(name):
    block = basic(24).train()
    CHANGES[name](block)
    check(block, channels_last((2, 24, 6, 6)))


def test_what_others_hold_is_not_written_to():
    """An activation is in place only behind a layer's function; not on an input, nor on what a hook has seen."""
    block, kept = Described(["relu", conv(24, 24, 3), norm(24), "relu", Depth(0.0), "relu"]).train(), []
    fuse(block)
    block.branch[1].register_forward_hook(lambda module, inputs, out: kept.append((out, out.clone())))
    x = channels_last((2, 24, 6, 6))
    before = x.clone()
    block(x)
    assert torch.equal(x, before)
    assert all(torch.equal(out, copied) for out, copied in kept) and kept


# ---------------------------------------------------------------------------------------------------------------------
# What Python does per call
# ---------------------------------------------------------------------------------------------------------------------


class Counter:
    """Function calls, of Python and of C, and bytecode instructions in the calling thread: no clock, so no luck."""

    def __init__(self) -> None:
        self.calls = self.instructions = 0

    def __enter__(self) -> Counter:
        sys.setprofile(self._profile)
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.settrace(None)
        sys.setprofile(None)

    def _profile(self, frame: Any, event: str, argument: Any) -> None:
        self.calls += event in ("call", "c_call")

    def _trace(self, frame: Any, event: str, argument: Any) -> Any:
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        self.instructions += event == "opcode"
        return self._trace


@pytest.fixture
def as_users_have_it(monkeypatch, everything_too_small) -> Iterator[None]:
    """With the thresholds that the library ships."""
    monkeypatch.setattr(select, "FEWEST_ELEMENTS", SHIPPED)


SHIPPED = dict(select.FEWEST_ELEMENTS)


@pytest.mark.parametrize("mode", ["train", "frozen", "infer"])
@pytest.mark.usefixtures("as_users_have_it")
def test_less_python_than_stock_for_small_inputs(mode):
    """ResNet-50 on 32x32 images, whose last stage has one pixel: one image, or two to train with."""
    model = torchvision_models().resnet50().train(mode == "train")
    x = torch.randn(2 if mode == "train" else 1, 3, 32, 32)
    counts = []
    for one in (model, copy.deepcopy(model)):
        if counts:
            assert fusedres.patch(one).coverage == 1.0
        with torch.set_grad_enabled(mode != "infer"):
            one(x)
            with Counter() as counter:
                one(x)
        counts.append(counter)
    stock, patched = counts
    assert patched.calls < stock.calls
    assert patched.instructions < stock.instructions
