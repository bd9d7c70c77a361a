"""Blocks as data, and what a call on a module sees: its parameters, buffers and settings as they are at that moment."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from described import BLOCKS, Described, basic, bottleneck, fuse, norms
from torch import Tensor, nn

from fusedres import binding
from fusedres.block import Act, Block, Conv, Dropout, DropPath, Norm, SqueezeExcite, link_plans, run, unsupported
from fusedres.engine import inference
from fusedres.ops.activations import IDENTITY, RELU
from fusedres.testing import channels_last, compare

X = channels_last((2, 24, 8, 8))
GATE = SqueezeExcite("fc1", "fc2")

# ---------------------------------------------------------------------------------------------------------------------
# Descriptions
# ---------------------------------------------------------------------------------------------------------------------


def test_steps_are_grouped_into_links():
    steps = (Conv("a"), Norm("b.0"), Act(RELU), Conv("c"))
    links = link_plans(Block(steps)).branch
    assert [link[:3] for link in links] == [
        (None, IDENTITY, ("a",)),
        (("b", "0"), RELU, ("c",)),
        (None, IDENTITY, None),
    ]


@pytest.mark.parametrize(
    "block, reason",
    [
        (Block((Norm("a"), Norm("b"))), "a norm that follows a norm"),
        (Block((Act(RELU), Norm("b"))), "a norm that follows a norm or an activation"),
        (Block((Conv("a"), Act(RELU), Act(RELU))), "two activations in a row"),
        (Block((Conv("a"),), None, RELU), "needs a join"),
        (Block((Conv("a"), Act(RELU)), ()), "branch ends with an activation"),
        (Block((Conv("a"),), (Conv("b"), Act(RELU))), "shortcut ends with an activation"),
        (Block((Conv("a"),), (Norm("b"),)), "a norm without a convolution"),
        (Block((Conv("a"), Dropout("b")), ()), "branch ends with a dropout"),
        (Block((Conv("a"), Dropout("b"), Act(RELU), Conv("c"))), "a dropout that no convolution follows"),
        (Block((Conv("a"), Act(RELU), DropPath("b")), ()), "a gain that follows an activation"),
        (Block((Conv("a"), GATE, GATE)), "two excitations"),
        (Block((Conv("a"), DropPath("b"), GATE), ()), "a gain that follows"),
        (Block((Conv("a"),), (Conv("b"), DropPath("c"))), "the shortcut has a gain"),
        (Block((Norm("a"),), (), residual="pending"), "needs a convolution"),
    ],
)
def test_what_the_engine_cannot_express_is_told_in_words(block, reason):
    assert reason in unsupported(block)
    with pytest.raises(ValueError, match=reason):
        run(block, nn.Module(), X)


@pytest.mark.parametrize("name", BLOCKS)
def test_what_it_can_express_is_supported(name):
    assert unsupported(BLOCKS[name]().block) is None


def test_a_shortcut_from_a_pending_value_that_is_the_input():
    assert not link_plans(Block((Conv("a"),), (), residual="pending")).shares


# ---------------------------------------------------------------------------------------------------------------------
# What a call sees
# ---------------------------------------------------------------------------------------------------------------------


def pair(block: Described) -> tuple[Described, Described]:
    """A block in stock PyTorch, and its fused copy."""
    ours = copy.deepcopy(block)
    fuse(ours)
    return block, ours


def assert_same(stock: Described, ours: Described, x: Tensor = X) -> None:
    with torch.no_grad():
        torch.testing.assert_close(ours(x), stock(x), rtol=1e-4, atol=1e-4)


def optimizer_step(block: Described) -> None:
    block.train(False)
    optimizer = torch.optim.SGD(block.parameters(), 0.5)
    block(X).square().mean().backward()
    optimizer.step()


def load(block: Described, **options: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    state = block.state_dict()
    new = {k: torch.rand(v.shape, generator=generator) if v.is_floating_point() else v for k, v in state.items()}
    block.load_state_dict(new, **options)


def in_place(block: Described) -> None:
    with torch.no_grad():
        block.branch[2].weight.mul_(-1)
        block.branch[1].running_var.add_(1)


def replaced(block: Described) -> None:
    block.branch[0].weight = nn.Parameter(-block.branch[0].weight.detach())


def replaced_at_the_same_address(block: Described) -> None:
    for step in (0, 2):
        values = -block.branch[step].weight.detach()
        del block.branch[step].weight
        gc.collect()
        block.branch[step].weight = nn.Parameter(values.clone())


def train_step(block: Described) -> None:
    block.train()
    block(X * 3 + 1)
    block.eval()


def new_eps(block: Described) -> None:
    block.branch[1].eps = 0.5


def new_padding(block: Described) -> None:
    block.branch[0].padding = (0, 0)
    block.branch[2].padding = (2, 2)


def through_data(block: Described) -> None:
    """Averaged weights are often written like this, and PyTorch does not count it."""
    for t in block.state_dict(keep_vars=True).values():
        if t.is_floating_point():
            t.data.mul_(1.5)


def through_data_in_part(what: str) -> Callable[[Described], None]:
    """As code for pruning does: one filter, one input channel, one channel of a norm."""

    def write(block: Described) -> None:
        conv, bn = block.branch[0], block.branch[1]
        part = {
            "a filter": conv.weight.data[5],
            "an input channel": conv.weight.data[:, 3],
            "a row of taps": conv.weight.data[:, :, 0],
            "a scale": bn.weight.data[5],
            "a variance": bn.running_var.data[2],
        }[what]
        part.mul_(0.25)

    return write


PARTS = ("a filter", "an input channel", "a row of taps", "a scale", "a variance")

CHANGES = {
    "optimizer step": optimizer_step,
    "load_state_dict": load,
    "load_state_dict, assigned": lambda block: load(block, assign=True),
    "in place": in_place,
    "through .data": through_data,
    **{f"{what} through .data": through_data_in_part(what) for what in PARTS},
    "a parameter replaced": replaced,
    "a parameter replaced at the same address": replaced_at_the_same_address,
    "through another dtype": lambda block: block.half().float(),
    "running statistics": train_step,
    "eps": new_eps,
    "padding": new_padding,
    "dtype": lambda block: block.double(),
    "layout": lambda block: block.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("change", CHANGES)
def test_folded_weights_follow_the_module(change):
    stock, ours = pair(basic().eval())
    assert_same(stock, ours)
    for one in (stock, ours):
        CHANGES[change](one)
    assert_same(stock, ours, X.double() if change == "dtype" else X)


def test_folding_is_done_once(monkeypatch):
    calls = []
    monkeypatch.setattr(inference, "fold", lambda *args, fold=inference.fold: calls.append(1) or fold(*args))
    block = bottleneck(24, 48, 2).eval()
    fuse(block)
    with torch.no_grad():
        for _ in range(3):
            block(X)
    assert len(calls) == 4


def test_inference_mode_parameters_are_folded_anew_each_time():
    with torch.inference_mode():
        stock, ours = pair(basic().eval())
        assert_same(stock, ours)
        for one in (stock, ours):
            one.branch[0].weight.mul_(-1)
        assert_same(stock, ours)


@pytest.mark.parametrize("training", [True, False])
def test_under_inference_mode(training):
    stock, ours = pair(basic().train(training))
    with torch.inference_mode():
        assert_same(stock, ours)
    for (name, a), (_, b) in zip(ours.named_buffers(), stock.named_buffers()):
        torch.testing.assert_close(a, b, msg=name)


def test_folded_weights_are_neither_copied_nor_pickled():
    block = basic().eval()
    size = len(pickle.dumps(block.state_dict()))
    fuse(block)
    with torch.no_grad():
        block(X)
    assert len(pickle.dumps(block.state_dict())) == size
    assert copy.deepcopy(block) not in binding._FOLDED


def test_folded_weights_go_with_the_module():
    block = basic().eval()
    fuse(block)
    with torch.no_grad():
        block(X)
    assert block in binding._FOLDED
    gone = weakref.ref(block)
    del block
    gc.collect()
    assert gone() is None


def test_train_and_eval_in_turn():
    stock, ours = pair(bottleneck(24, 48, 2))
    for training in (True, False, True, True, False, False):
        for one in (stock, ours):
            one.train(training)
        assert_same(stock, ours)
    for (name, a), (_, b) in zip(ours.named_buffers(), stock.named_buffers()):
        torch.testing.assert_close(a, b, msg=name)


def test_running_statistics_may_be_dropped_or_ignored():
    for change in ("reset", "ignore"):
        stock, ours = pair(basic().train())
        for norm in (*norms(stock), *norms(ours)):
            norm.track_running_stats = False
            if change == "reset":
                norm.running_mean = norm.running_var = norm.num_batches_tracked = None
        for training in (True, False):
            assert_same(stock.train(training), ours.train(training))
        for (name, a), (_, b) in zip(ours.named_buffers(), stock.named_buffers()):
            torch.testing.assert_close(a, b, msg=name)


# ---------------------------------------------------------------------------------------------------------------------
# The second argument, and what runs as stock
# ---------------------------------------------------------------------------------------------------------------------


def with_residual(**options) -> Described:
    block = basic()
    return Described([block.branch[0], block.branch[1]], [], residual="argument", **options)


@pytest.mark.parametrize("mode", ["train", "frozen", "infer"])
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("run", [{}, {"autocast": torch.bfloat16}], ids=["float32", "autocast"])
def test_residual_from_an_argument(mode, in_place, run):
    def inputs(seed: int) -> list[Tensor]:
        return [channels_last((4, 24, 16, 16), seed=seed), channels_last((4, 24, 16, 16), seed=seed + 50)]

    stock = with_residual(in_place=in_place).train(mode == "train")
    compare(stock, fuse, inputs, backward=mode != "infer", **run).check()


@pytest.mark.parametrize("make", [torch.zeros_like, lambda x: x.contiguous(), lambda x: x.transpose(2, 3)])
@pytest.mark.parametrize("training", [True, False])
def test_residual_of_another_layout(make, training):
    stock, ours = pair(with_residual().train(training))
    with torch.no_grad():
        torch.testing.assert_close(ours(X, make(X)), stock(X, make(X)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("shape", [(2, 24, 1, 1), (1, 24, 8, 8), (24, 8, 8)], ids=str)
def test_residual_that_broadcasts(training, backward, shape):
    stock, ours = pair(with_residual().train(training))
    residual = torch.randn(shape).requires_grad_(backward)
    with torch.set_grad_enabled(backward):
        outs = ours(X, residual), stock(X, residual)
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)
    if backward:
        grads = [torch.autograd.grad(out.square().sum(), residual)[0] for out in outs]
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)


def test_same_tensor_as_input_and_residual():
    stock, ours = pair(with_residual().train())
    grads = []
    for one in (stock, ours):
        x = X.clone().requires_grad_()
        grads.append(torch.autograd.grad(one(x, x).square().sum(), x)[0])
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)


class Wrapped(Tensor):
    """A subclass that stock PyTorch carries through."""


@pytest.mark.parametrize(
    "x",
    [torch.zeros(24, 8, 8), torch.zeros(2, 24, 8, 8, dtype=torch.float64), torch.zeros(2, 3, 8, 8), torch.zeros(2, 24)],
    ids=["no batch", "another dtype", "other channels", "other dimensions"],
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_bad_inputs_raise_what_stock_raises(x, training, grad):
    errors = []
    for one in pair(basic().train(training)):
        with pytest.raises(Exception) as error, torch.set_grad_enabled(grad):
            one(x)
        errors.append((error.type, str(error.value)))
    assert errors[0] == errors[1]


def test_subclasses_of_tensor_are_kept():
    stock, ours = pair(basic().eval())
    x = X.as_subclass(Wrapped)
    with torch.no_grad():
        assert type(ours(x)) is type(stock(x)) is Wrapped


def test_function_transforms():
    block = basic(bias=False).eval()
    x = channels_last((2, 24, 4, 4))
    found = []
    for fuses in (False, True):
        block.fuses = fuses
        parameters = dict(block.named_parameters())

        def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(block, parameters, (x[None],)).square().sum()

        found.append(torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x))
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name], rtol=1e-3, atol=1e-3)


def test_forward_mode_derivatives():
    block, x = basic().eval(), channels_last((2, 24, 4, 4))
    found = []
    for fuses in (False, True):
        block.fuses = fuses
        found.append(torch.func.jvp(block, (x,), (torch.ones_like(x),))[1])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_a_hooked_module_is_called_once_and_counts_once():
    stock, ours = pair(basic().train())
    calls = []
    for one in (stock, ours):
        one.branch[2].register_forward_hook(lambda *_: calls.append(1))
        one(X)
    assert len(calls) == 2
    for a, b in zip(norms(ours), norms(stock)):
        assert a.num_batches_tracked == b.num_batches_tracked == 1


@pytest.mark.parametrize(
    ("name", "index"), [("squeeze-excitation", "4.fc1"), ("dropout", "3"), ("stochastic depth", "2")], ids=str
)
def test_a_hook_on_a_gate_or_a_dropout_runs(name, index):
    ours = BLOCKS[name]().train()
    fuse(ours)
    calls = []
    ours.branch.get_submodule(index).register_forward_hook(lambda *_: calls.append(1))
    ours(X)
    assert calls


@pytest.mark.parametrize(("name", "index"), [("dropout", 3), ("stochastic depth", 2)], ids=str)
def test_chance_follows_the_module(name, index):
    ours = BLOCKS[name]().train()
    fuse(ours)
    module = ours.branch[index]
    first = ours(X)
    module.p = 0.01
    assert not torch.equal(ours(X), first)
    module.eval()
    stock, fused = pair(ours)
    stock.fuses = False
    assert_same(stock, fused)


@pytest.mark.parametrize("p", [0.0, 1.0])
@pytest.mark.parametrize(("name", "index"), [("dropout", 3), ("stochastic depth", 2)], ids=str)
def test_chance_that_is_none(name, index, p):
    block = BLOCKS[name]().train()
    block.branch[index].p = p
    stock, fused = pair(block)
    assert_same(stock, fused)
