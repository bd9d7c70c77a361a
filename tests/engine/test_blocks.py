"""The engine's numbers: outputs, every gradient and the running statistics of whole blocks, against float64."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from described import BLOCKS, Described, basic, bottleneck, fuse, norms
from torch import Tensor, nn

from fusedres import use_backend
from fusedres.testing import INPUTS, channels_last, compare, contiguous, expanded, sliced, transposed

RUNS = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "autocast": {"autocast": torch.bfloat16},
}


# At a kink of ReLU two right answers differ. In how many values is a matter of luck where these are few: the narrower
# the dtype, the more values it takes until luck evens out.
SIZES = {"float32": 14, "bfloat16": 24, "float16": 36, "autocast": 24}


def inputs_of(block: nn.Module, make=channels_last, size: int = 14):
    first = block.branch[0]
    channels = first.in_channels if isinstance(first, nn.Conv2d) else first.num_features
    return lambda seed: [make((4, channels, size, size), seed=seed)]


def check(block: Described, make=channels_last, size: int = 14, **options) -> None:
    compare(block, fuse, inputs_of(block, make, size), **options).check()


def gradients(block: Described, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of a fused block."""
    block = copy.deepcopy(block)
    block.fuses, x = True, x.detach().requires_grad_()
    out = block(x)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=out.dtype)
    return [out, *torch.autograd.grad(out, [x, *block.parameters()], cotangent)]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("mode", ["train", "frozen", "infer"])
@pytest.mark.parametrize("name", BLOCKS)
def test_against_float64(name, mode, run):
    check(BLOCKS[name]().train(mode == "train"), backward=mode != "infer", size=SIZES[run], **RUNS[run])


@pytest.mark.parametrize("name", BLOCKS)
def test_training_without_gradients(name):
    check(BLOCKS[name]().train(), backward=False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_with_and_without_bias(bias, training):
    check(basic(24, 32, 2, bias=bias).train(training))


@pytest.mark.parametrize("frozen", [some for n in (1, 2, 3) for some in itertools.combinations(range(4), n)], ids=str)
def test_mixtures_of_frozen_norms(frozen):
    block = bottleneck(24, 48, 2).train()
    for i in frozen:
        norms(block)[i].eval()
    check(block)


@pytest.mark.parametrize("frozen", [name for name, _ in basic(24, 32, 2).named_parameters()])
@pytest.mark.parametrize("training", [True, False])
def test_one_parameter_without_gradient(frozen, training):
    block = basic(24, 32, 2).train(training)
    block.get_parameter(frozen).requires_grad_(False)
    check(block)


@pytest.mark.parametrize("which", ["branch", "shortcut", ""])
@pytest.mark.parametrize("run", ["float32", "autocast"])
def test_many_parameters_without_gradient(which, run):
    block = bottleneck(24, 48, 2).train()
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(not name.startswith(which))
    check(block, size=SIZES[run], **RUNS[run])


@pytest.mark.parametrize("name", BLOCKS)
def test_input_without_gradient(name):
    check(BLOCKS[name]().train(), input_gradients=False)


@pytest.mark.parametrize(
    "options",
    [
        {"norm_momentum": None},
        {"norm_affine": False},
        {"norm_track_running_stats": False},
        {"norm_eps": 0.1, "norm_momentum": 0.5},
        {"dilation": 2, "padding": 2},
        {"groups": 4},
        {"padding": "same"},
        {"padding": (1, 1), "padding_mode": "zeros"},
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False])
def test_settings_of_the_modules(options, training):
    for backward in (True, False):
        check(basic(24, **options).train(training), backward=backward)


def test_cumulative_average_over_several_batches():
    stock = basic(24, norm_momentum=None).train()
    ours = copy.deepcopy(stock)
    fuse(ours)
    for seed in range(3):
        x = channels_last((2, 24, 6, 6), seed=seed)
        stock(x), ours(x)
    for (name, a), (_, b) in zip(ours.named_buffers(), stock.named_buffers()):
        torch.testing.assert_close(a, b, msg=name)


# ---------------------------------------------------------------------------------------------------------------------
# Layouts and strides
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", INPUTS)
@pytest.mark.parametrize("name", ["basic", "bottleneck, projection", "pre-activation"])
@pytest.mark.parametrize("backward", [True, False])
def test_inputs_of_any_layout(make, name, backward):
    check(BLOCKS[name]().train(backward), INPUTS[make], backward=backward)


@pytest.mark.parametrize("make", [contiguous, channels_last])
@pytest.mark.parametrize("mode", ["train", "frozen", "infer"])
@pytest.mark.parametrize("name", BLOCKS)
def test_results_have_stocks_strides(name, mode, make):
    """What a model does behind a block, a ``view`` say, may rely on them."""
    block = BLOCKS[name]().train(mode == "train")
    (x,) = inputs_of(block, make, size=6)(0)
    with torch.set_grad_enabled(mode != "infer"):
        stock = block(x)
        fuse(block)
        assert block(x).stride() == stock.stride()


@pytest.mark.parametrize("make", [contiguous, sliced, transposed, expanded])
@pytest.mark.parametrize("name", ["basic", "chain", "pre-activation"])
def test_gradients_of_any_layout(make, name):
    check(BLOCKS[name]().train(), cotangent=lambda out: make(out.shape).to(out.dtype))


@pytest.mark.parametrize("make", [channels_last, contiguous])
@pytest.mark.parametrize("mode", ["train", "frozen", "infer"])
def test_weights_in_channels_last(make, mode):
    block = bottleneck(24, 48, 2).to(memory_format=torch.channels_last).train(mode == "train")
    check(block, make, backward=mode != "infer")


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("training", [True, False])
def test_float64_runs_as_reference(name, training):
    block = BLOCKS[name]().double().train(training)
    x = inputs_of(block)(0)[0].double()
    stock, ours = copy.deepcopy(block), copy.deepcopy(block)
    fuse(ours)
    for one in (stock, ours):
        one.x = x.clone().requires_grad_()
        one.out = one(one.x)
        one.out.square().sum().backward()
    torch.testing.assert_close(ours.out, stock.out)
    torch.testing.assert_close(ours.x.grad, stock.x.grad)
    for (key, a), (_, b) in zip(ours.named_parameters(), stock.named_parameters()):
        torch.testing.assert_close(a.grad, b.grad, msg=key, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(name, training):
    block = BLOCKS[name]().double().train(training)
    fuse(block)
    for norm in norms(block):
        norm.track_running_stats = not training  # gradcheck calls it again and again
    x = inputs_of(block, size=4)(0)[0][:2].double().requires_grad_()
    names, leaves = zip(*((n, p.detach().requires_grad_()) for n, p in block.named_parameters()))

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(block, dict(zip(names, parameters)), (x,))

    assert torch.autograd.gradcheck(function, (x, *leaves), fast_mode=True)


@pytest.mark.parametrize("name", BLOCKS)
def test_reference_backend(name):
    with use_backend("reference"):
        check(BLOCKS[name]().train())
        check(BLOCKS[name]().eval(), backward=False)


# ---------------------------------------------------------------------------------------------------------------------
# Dtypes under autocast
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", [True, False])
def test_result_has_stocks_dtype_under_autocast(in_place, dtype, grad):
    conv, norm = basic().branch[:2]
    described = Described([conv, norm], [], in_place=in_place).train(grad)
    x = channels_last((2, 24, 6, 6), dtype)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
        stock = described(x)
        fuse(described)
        assert described(x).dtype == stock.dtype


# ---------------------------------------------------------------------------------------------------------------------
# What autograd keeps
# ---------------------------------------------------------------------------------------------------------------------


def saved_bytes(block: Described, x: Tensor) -> int:
    """Bytes that a forward keeps for backward, counted once per storage, without the parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in block.parameters()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = block(x)
    assert out.requires_grad
    return sum(size for pointer, size in kept.items() if pointer not in parameters)


@pytest.mark.parametrize("memory", ["auto", "low"])
def test_only_the_input_and_raw_outputs_are_kept(memory):
    block = bottleneck(32, memory=memory).train()
    fuse(block)
    pixel = 4 * 4 * 14 * 14
    rows = 4 * 4 * (16 + 16 + 32)
    raw = 16 + 16 + (0 if memory == "low" else 32)
    assert saved_bytes(block, channels_last((4, 32, 14, 14))) == pixel * (32 + raw) + rows


@pytest.mark.parametrize("name", BLOCKS)
def test_never_more_is_kept_than_by_stock(name):
    block = BLOCKS[name]().train()
    x = inputs_of(block)(0)[0].requires_grad_()
    stock = saved_bytes(block, x)
    fuse(block)
    assert saved_bytes(block, x) <= stock


@pytest.mark.parametrize("name", ["bottleneck", "bottleneck, projection"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_memory_gives_the_same_bits(name, dtype):
    block = BLOCKS[name]().to(dtype).train()
    x = inputs_of(block)(0)[0].to(dtype)
    auto = gradients(block, x)
    block.options = {"memory": "low"}
    assert all(torch.equal(a, b) for a, b in zip(auto, gradients(block, x)))


# ---------------------------------------------------------------------------------------------------------------------
# Order of calls
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BLOCKS)
def test_the_gradient_that_comes_in_is_not_written_to(name):
    block = BLOCKS[name]().train()
    fuse(block)
    out = block(inputs_of(block)(0)[0].requires_grad_())
    cotangent = torch.randn_like(out)
    before = cotangent.clone()
    out.backward(cotangent)
    assert torch.equal(cotangent, before)


def test_writes_to_the_running_statistics_are_counted():
    block = basic().train()
    fuse(block)
    before = [buffer._version for buffer in block.buffers()]
    block(channels_last((2, 24, 6, 6)))
    assert all(buffer._version > count for buffer, count in zip(block.buffers(), before))


@pytest.mark.parametrize("training", [True, False])
def test_two_forwards_before_a_backward(training):
    block = bottleneck(24, 48, 2).train(training)
    fuse(block)
    first, second = (channels_last((2, 24, 8, 8), seed=seed).requires_grad_() for seed in (0, 1))
    expected = gradients(block, first)[1]
    outs = block(first), block(second)
    cotangent = torch.randn(outs[0].shape, generator=torch.Generator().manual_seed(9))
    (found,) = torch.autograd.grad(outs[0], first, cotangent)
    assert torch.equal(found, expected)


def test_second_derivatives_raise_rather_than_vanish():
    block = basic().train()
    fuse(block)
    x = channels_last((2, 24, 6, 6)).requires_grad_()
    with pytest.raises(RuntimeError, match=r"differentiable once.*use_backend\('stock'\)"):
        torch.autograd.grad(block(x).sum(), x, create_graph=True)
    with use_backend("stock"):
        (grad,) = torch.autograd.grad(block(x).sum(), x, create_graph=True)
    grad.sum().backward()


def test_batched_gradients_say_what_to_do():
    block = basic().train()
    fuse(block)
    x = channels_last((2, 24, 6, 6)).requires_grad_()
    out = block(x)
    several = torch.ones(3, *out.shape)
    with pytest.raises(RuntimeError, match=r"one gradient at a time.*use_backend\('stock'\)"):
        torch.autograd.grad(out, x, several, is_grads_batched=True)
    with use_backend("stock"):
        torch.autograd.grad(block(x), x, several, is_grads_batched=True)


def test_parameter_changed_between_forward_and_backward_raises():
    block = basic().train()
    fuse(block)
    out = block(channels_last((2, 24, 6, 6)))
    with torch.no_grad():
        block.branch[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_same_bits_in_every_run_and_for_any_number_of_threads(threads):
    block, x = bottleneck(24, 48, 2).train(), channels_last((4, 24, 28, 28))
    first = threads(2, gradients, block, x)
    assert all(torch.equal(a, b) for a, b in zip(first, threads(2, gradients, block, x)))
    fused_passes_only = Described([nn.BatchNorm2d(24)], []).train()
    one, two = (threads(n, gradients, fused_passes_only, x) for n in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, two))


# ---------------------------------------------------------------------------------------------------------------------
# Unusual numbers and shapes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("training", [True, False])
def test_zero_size_batches(name, training):
    check_empty = BLOCKS[name]().train(training)
    shape = inputs_of(check_empty)(0)[0].shape
    compare(check_empty, fuse, lambda _: [torch.zeros(0, *shape[1:])]).check()


def test_one_value_per_channel_raises_as_stock_does():
    block, messages = basic().train(), []
    for fuses in (False, True):
        block.fuses = fuses
        with pytest.raises(ValueError) as error:
            block(torch.zeros(1, 24, 1, 1))
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("mode", ["train", "frozen", "infer"])
@pytest.mark.parametrize("name", ["basic", "bottleneck, projection"])
def test_non_finite_inputs_travel_as_in_stock(name, mode, value):
    block = BLOCKS[name]().train(mode == "train")
    x = inputs_of(block)(0)[0]
    x[1, 3, 4, 4] = value
    found = []
    for fuses in (False, True):
        block.fuses, leaf = fuses, x.clone().requires_grad_()
        with torch.set_grad_enabled(mode != "infer"):
            out = block(leaf)
        found.append([out] if mode == "infer" else [out, torch.autograd.grad(out.sum(), leaf)[0]])
    for stock, ours in zip(*found):
        assert torch.equal(ours.isnan(), stock.isnan())
        assert torch.equal(ours.isinf(), stock.isinf())


def test_large_mean_and_small_variance():
    block = Described([nn.BatchNorm2d(24)], []).train()
    compare(block, fuse, lambda seed: [channels_last((4, 24, 20, 20), seed=seed) * 1e-2 + 1e2]).check()
