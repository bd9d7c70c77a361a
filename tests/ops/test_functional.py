"""The public functions: values and gradients against stock PyTorch, and what they say about bad arguments."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fusedres import ops, use_backend
from fusedres.ops import ConvParams, NormParams
from fusedres.ops.activations import ACTIVATIONS, activation
from fusedres.testing import channels_last, compare, contiguous, expanded, sliced, transposed

# Narrow dtypes with a smooth activation: for a kink they need more values than these (tests/test_engine.py has them).
RUNS = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "autocast": {"autocast": torch.bfloat16},
}
C, K = 24, 32


class Operands(nn.Module):
    """A function of an input and, by name, of parameters and buffers, with a stock and a fused form."""

    def __init__(self, stock: Callable, fused: Callable, in_channels: int = C, out_channels: int = K, **kwargs) -> None:
        super().__init__()
        self.stock, self.fused, self.kwargs, self.fuses = stock, fused, kwargs, False
        normed = kwargs.pop("normed", out_channels)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels // kwargs.get("groups", 1), 3, 3) / 15)
        self.bias = nn.Parameter(torch.randn(out_channels))
        self.gamma, self.beta = nn.Parameter(torch.rand(normed) + 0.5), nn.Parameter(torch.randn(normed))
        self.register_buffer("running_mean", torch.randn(normed) / 4)
        self.register_buffer("running_var", torch.rand(normed) + 0.5)

    def forward(self, *inputs: Tensor) -> Tensor:
        return (self.fused if self.fuses else self.stock)(self, *inputs, training=self.training, **self.kwargs)

    @property
    def norm(self) -> tuple[Tensor, ...]:
        return self.gamma, self.beta, self.running_mean, self.running_var


def fuse(module: Operands) -> None:
    module.fuses = True


def batch_norm(m: Operands, x: Tensor, training: bool) -> Tensor:
    return F.batch_norm(x, m.running_mean, m.running_var, m.gamma, m.beta, training, 0.1, 1e-5)


def added(x: Tensor, residual: Tensor | None) -> Tensor:
    return x if residual is None else x + residual


def stock_conv_bn_act(m, x, residual=None, *, training, act="relu", **conv):
    return activation(act)(added(batch_norm(m, F.conv2d(x, m.weight, m.bias, **conv), training), residual))


def fused_conv_bn_act(m, x, residual=None, *, training, **kwargs):
    return ops.conv_bn_act(x, m.weight, m.bias, *m.norm, residual=residual, training=training, **kwargs)


def stock_bn_act_conv(m, x, residual=None, *, training, act="relu", **conv):
    return added(F.conv2d(activation(act)(batch_norm(m, x, training)), m.weight, m.bias, **conv), residual)


def fused_bn_act_conv(m, x, residual=None, *, training, **kwargs):
    return ops.bn_act_conv(x, *m.norm, m.weight, m.bias, residual=residual, training=training, **kwargs)


def stock_bn_act(m, x, residual=None, *, training, act="relu"):
    return activation(act)(added(batch_norm(m, x, training), residual))


def fused_bn_act(m, x, residual=None, *, training, act="relu"):
    return ops.bn_act(x, *m.norm, residual=residual, training=training, act=act)


def per_channel(v: Tensor) -> Tensor:
    return v[:, None, None]


def stock_conv_affine_act(m, x, residual=None, *, training, act="relu", **conv):
    y = F.conv2d(x, m.weight, None, **conv)
    y = (per_channel(m.gamma) * y + per_channel(m.beta)).to(y.dtype)
    return activation(act)(added(y, residual))


def fused_conv_affine_act(m, x, residual=None, *, training, **kwargs):
    return ops.conv_affine_act(x, m.weight, m.gamma, m.beta, residual=residual, **kwargs)


def stock_join(m, y, residual=None, *, training, act="relu"):
    return activation(act)(added(per_channel(m.gamma) * y + per_channel(m.beta), residual))


def fused_join(m, y, residual=None, *, training, act="relu"):
    return ops.join(y, residual, scale=m.gamma, shift=m.beta, act=act)


def module(name: str, **kwargs) -> Operands:
    """The stock and the fused form of a function; kwargs go to both."""
    if name in ("bn_act", "join"):
        kwargs.setdefault("out_channels", C)
    elif "padding" not in kwargs:
        kwargs["padding"] = 1
    if name == "bn_act_conv":
        kwargs.setdefault("normed", kwargs.get("in_channels", C))
    return Operands(globals()[f"stock_{name}"], globals()[f"fused_{name}"], **kwargs)


FUNCTIONS = ("conv_bn_act", "bn_act_conv", "bn_act", "conv_affine_act", "join")


def inputs_of(name: str, residual: bool, make=channels_last, size: int = 12) -> Callable[[int], list[Tensor]]:
    out = C if name in ("bn_act", "join") else K
    shapes = [(4, C, size, size), (4, out, size, size)]
    return lambda seed: [make(shape, seed=10 * seed + i) for i, shape in enumerate(shapes[: 1 + residual])]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("mode", ["train", "eval", "infer"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_against_float64(name, residual, mode, run):
    stock = module(name, act="relu" if run == "float32" else "silu").train(mode == "train")
    compare(stock, fuse, inputs_of(name, residual), backward=mode != "infer", **RUNS[run]).check()


@pytest.mark.parametrize("make", [contiguous, sliced, transposed, expanded])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_inputs_of_any_layout(name, make):
    compare(module(name).eval(), fuse, inputs_of(name, True, make)).check()


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("training", [True, False])
def test_every_activation(name, act, training):
    for backward in (True, False):
        inputs = inputs_of(name, name != "bn_act_conv", size=8)
        compare(module(name, act=act).train(training), fuse, inputs, backward=backward).check()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradcheck_in_float64(name):
    stock = module(name, act="silu").double().train()
    x, residual = inputs_of(name, True, size=3)(0)
    x, residual = x[:2].double().requires_grad_(), residual[:2].double().requires_grad_()
    parameters = dict(stock.named_parameters())
    names = ["gamma", "beta", *(["weight", "bias"] if name in ("conv_bn_act", "bn_act_conv") else [])]
    stock.fuses = True

    def function(x: Tensor, residual: Tensor, *vectors: Tensor) -> Tensor:
        return torch.func.functional_call(stock, dict(zip(names, vectors)), (x, residual))

    leaves = [parameters[n].detach().requires_grad_() for n in names]
    assert torch.autograd.gradcheck(function, (x, residual, *leaves), fast_mode=True)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("training", [True, False])
def test_zero_size_batches(name, training):
    m = module(name).train(training)
    for backward in (True, False):
        for fuses in (False, True):
            m.fuses, x = fuses, torch.zeros(0, C, 12, 12, requires_grad=backward)
            with torch.set_grad_enabled(backward):
                out = m(x)
            assert out.shape == (0, C if name in ("bn_act", "join") else K, 12, 12)
            if backward:
                out.sum().backward()
                assert x.grad.shape == x.shape


def test_one_autograd_node_per_call():
    for name in FUNCTIONS:
        m = module(name)
        m.fuses = True
        out = m(channels_last((2, C, 6, 6)).requires_grad_())
        leaves = {type(node).__name__ for node, _ in out.grad_fn.next_functions if node is not None}
        assert leaves == {"AccumulateGrad"}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_reference_backend(name):
    with use_backend("reference"):
        compare(module(name).train(), fuse, inputs_of(name, True)).check()


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(1, 3),
    channels=st.integers(1, 9),
    filters=st.integers(1, 9),
    size=st.tuples(st.integers(2, 9), st.integers(2, 9)),
    stride=st.integers(1, 3),
    padding=st.sampled_from([0, 1, 2, "same", (1, 0)]),
    dilation=st.integers(1, 2),
    groups=st.integers(1, 3),
    training=st.booleans(),
    backward=st.booleans(),
)
def test_any_convolution(n, channels, filters, size, stride, padding, dilation, groups, training, backward):
    reach = 2 * dilation
    assume(padding != "same" or stride == 1)
    assume(
        min(size) + 2 * (min(padding) if isinstance(padding, tuple) else reach if padding == "same" else padding)
        > reach
    )
    conv = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    m = module("conv_bn_act", in_channels=channels * groups, out_channels=filters * groups, act="silu", **conv)
    m = m.double().train(training)
    x = channels_last((n, channels * groups, *size), torch.float64).requires_grad_(backward)
    results = []
    for fuses in (False, True):
        m.fuses, m.running_mean = fuses, torch.zeros_like(m.running_mean)
        with torch.set_grad_enabled(backward):
            try:
                out = m(x)
            except ValueError as error:
                results.append(str(error))
                continue
        results.append([out, *(torch.autograd.grad(out.square().sum(), [x, *m.parameters()]) if backward else [])])
    if isinstance(results[0], str):
        assert results[0] == results[1]
        return
    for stock, ours in zip(*results):
        torch.testing.assert_close(ours, stock, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# join and residual_block
# ---------------------------------------------------------------------------------------------------------------------


class DualJoin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vectors = nn.ParameterList(torch.randn(C) for _ in range(4))
        self.fuses = False

    def forward(self, y: Tensor, residual: Tensor) -> Tensor:
        scale, shift, residual_scale, residual_shift = self.vectors
        if self.fuses:
            return ops.join(
                y, residual, scale=scale, shift=shift, residual_scale=residual_scale, residual_shift=residual_shift
            )
        side = per_channel(residual_scale) * residual + per_channel(residual_shift)
        return torch.relu(per_channel(scale) * y + per_channel(shift) + side)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("backward", [True, False])
def test_join_with_two_affines(run, backward):
    compare(DualJoin(), fuse, inputs_of("join", True), backward=backward, **RUNS[run]).check()


@pytest.mark.parametrize("given", ["scale", "shift", "residual_scale", "residual_shift"])
@pytest.mark.parametrize("backward", [True, False])
def test_join_with_one_vector(given, backward):
    y, r, v = (
        t.requires_grad_(backward) for t in (channels_last((2, C, 3, 3)), channels_last((2, C, 3, 3)), torch.randn(C))
    )
    of_y, of_r = (given == "scale", given == "shift"), (given == "residual_scale", given == "residual_shift")
    stock = F.silu(
        sum(t * (per_channel(v) if s else 1) + (per_channel(v) if b else 0) for t, (s, b) in ((y, of_y), (r, of_r)))
    )
    ours = ops.join(y, r, act="silu", **{given: v})
    torch.testing.assert_close(ours, stock)
    if backward:
        for a, b in zip(torch.autograd.grad(ours.sum(), (y, r, v)), torch.autograd.grad(stock.sum(), (y, r, v))):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_join_of_nothing_is_the_activation():
    y = channels_last((2, C, 3, 3))
    assert torch.equal(ops.join(y), torch.relu(y))
    assert torch.equal(ops.join(y, act="identity"), y)


class TwoConvolutions(nn.Module):
    """A bottleneck's three convolutions less one, with a projection."""

    def __init__(self, memory: str = "auto") -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(C, 8, 3, 2, 1), nn.Conv2d(8, K, 1, bias=False)
        self.norm1, self.norm2, self.norm3 = nn.BatchNorm2d(8), nn.BatchNorm2d(K), nn.BatchNorm2d(K)
        self.shortcut = nn.Conv2d(C, K, 1, 2)
        self.memory, self.fuses = memory, False

    def forward(self, x: Tensor) -> Tensor:
        if self.fuses:
            branch = (
                self._conv(self.conv1),
                self._norm(self.norm1),
                "silu",
                self._conv(self.conv2),
                self._norm(self.norm2),
            )
            return ops.residual_block(
                x, branch, (self._conv(self.shortcut), self._norm(self.norm3)), memory=self.memory
            )
        return torch.relu(self.norm2(self.conv2(F.silu(self.norm1(self.conv1(x))))) + self.norm3(self.shortcut(x)))

    def _conv(self, conv: nn.Conv2d) -> ConvParams:
        return ConvParams(conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)

    def _norm(self, norm: nn.BatchNorm2d) -> NormParams:
        if norm.training and not self.fuses:
            norm.num_batches_tracked += 1
        return NormParams(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.training)


@pytest.mark.parametrize("mode", ["train", "eval", "infer"])
@pytest.mark.parametrize("memory", ["auto", "low"])
@pytest.mark.parametrize("run", RUNS)
def test_residual_block(mode, memory, run):
    stock = TwoConvolutions(memory).train(mode == "train")
    for norm in (stock.norm1, stock.norm2, stock.norm3):
        norm.num_batches_tracked = None
    compare(stock, fuse, inputs_of("conv_bn_act", False), backward=mode != "infer", **RUNS[run]).check()


def test_residual_block_without_addition():
    x, m = channels_last((2, C, 6, 6)), module("conv_bn_act").eval()
    branch = (ConvParams(m.weight, m.bias, padding=1), NormParams(*m.norm))
    expected = m(x)
    torch.testing.assert_close(ops.residual_block(x, branch, None), expected)
    torch.testing.assert_close(ops.residual_block(x, (*branch, "relu"), None, act="identity"), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Bad arguments
# ---------------------------------------------------------------------------------------------------------------------


def good() -> dict[str, Tensor | None]:
    m = module("conv_bn_act")
    keys = ["x", "weight", "bias", "gamma", "beta", "running_mean", "running_var"]
    return dict(zip(keys, (channels_last((2, C, 6, 6)), m.weight, m.bias, *m.norm)))


BAD = {
    "x is no tensor": ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    "x has 3 dimensions": ({"x": torch.zeros(C, 6, 6)}, ValueError, r"x must have the 4 dimensions .*\(24, 6, 6\)"),
    "x of integers": (
        {"x": torch.zeros(2, C, 6, 6, dtype=torch.int64)},
        TypeError,
        "x must be of a dtype among .*int64",
    ),
    "channels": (
        {"x": torch.zeros(2, 3, 6, 6)},
        ValueError,
        r"weight of shape \(32, 24, 3, 3\) does not fit x of shape \(2, 3, 6, 6\): 24 channels in each of 1 groups",
    ),
    "groups": ({"groups": 5}, ValueError, "groups=5 must divide its 32"),
    "weight has 3 dimensions": (
        {"weight": torch.zeros(K, C, 3)},
        ValueError,
        r"weight of shape \(32, 24, 3\) does not fit x of shape \(2, 24, 6, 6\): it must have the 4 dimensions",
    ),
    "weight is none": ({"weight": None}, TypeError, "weight must be a tensor, got NoneType"),
    "kernel larger than the image": (
        {"x": torch.zeros(2, C, 2, 2), "padding": 0},
        ValueError,
        r"weight of shape .* does not fit x of shape \(2, 24, 2, 2\): the result would have the size \(0, 0\)",
    ),
    "weight of another dtype": (
        {"weight": torch.zeros(K, C, 3, 3, dtype=torch.bfloat16)},
        TypeError,
        r"weight of shape \(32, 24, 3, 3\) is torch.bfloat16, expected torch.float32 beside x of shape",
    ),
    "weight on another device": (
        {"weight": torch.zeros(K, C, 3, 3, device="meta")},
        ValueError,
        "weight is on meta, but x is on cpu",
    ),
    "bias": ({"bias": torch.zeros(7)}, ValueError, r"bias of shape \(7,\) does not fit x .*expected shape \(32,\)"),
    "gamma": ({"gamma": torch.zeros(7)}, ValueError, r"gamma of shape \(7,\) does not fit x of shape \(2, 24, 6, 6\)"),
    "beta": ({"beta": torch.zeros(1, K)}, ValueError, r"beta of shape \(1, 32\) does not fit x"),
    "running_mean": ({"running_mean": torch.zeros(C)}, ValueError, r"running_mean of shape \(24,\) does not fit"),
    "running_var is missing": ({"running_var": None}, ValueError, "running_var must be given when training=False"),
    "gamma in float64": (
        {"gamma": torch.zeros(K, dtype=torch.float64)},
        TypeError,
        "gamma .*float64, expected .*float32",
    ),
    "residual": (
        {"residual": torch.zeros(2, K, 6, 5)},
        ValueError,
        r"residual of shape \(2, 32, 6, 5\) does not fit x of shape \(2, 24, 6, 6\): .* of shape \(2, 32, 6, 6\)",
    ),
    "residual that would broadcast": ({"residual": torch.zeros(1, K, 6, 6)}, ValueError, "residual of shape"),
    "residual of another dtype": (
        {"residual": torch.zeros(2, K, 6, 6, dtype=torch.bfloat16)},
        TypeError,
        "residual .* is torch.bfloat16, expected torch.float32",
    ),
    "stride": ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
    "stride of three": ({"stride": (1, 1, 1)}, TypeError, r"stride must be an integer or two, got \(1, 1, 1\)"),
    "padding": ({"padding": -1}, ValueError, "padding must be at least 0, got -1"),
    "padding in words": ({"padding": "full"}, ValueError, "padding must be 'same', 'valid' or numbers, got 'full'"),
    "momentum": ({"momentum": None}, TypeError, "momentum must be a number, got NoneType"),
    "act": ({"act": "tanh"}, ValueError, "unknown activation 'tanh'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_raise(case):
    changes, error, message = BAD[case]
    with pytest.raises(error, match=message):
        ops.conv_bn_act(**{**good(), "padding": 1, **changes})


def test_bad_arguments_of_the_others():
    x, v = channels_last((2, C, 6, 6)), torch.zeros(C)
    with pytest.raises(ValueError, match=r"bn_act: gamma of shape \(32,\) does not fit x"):
        ops.bn_act(x, torch.zeros(K), v, v, v)
    with pytest.raises(ValueError, match=r"bn_act_conv: running_mean of shape \(32,\) does not fit x"):
        ops.bn_act_conv(x, v, v, torch.zeros(K), v, torch.zeros(K, C, 1, 1))
    with pytest.raises(ValueError, match=r"join: residual of shape \(2, 24, 6, 5\) does not fit y of shape"):
        ops.join(x, x[..., :5])
    with pytest.raises(ValueError, match="need a residual"):
        ops.join(x, residual_scale=v)
    with pytest.raises(ValueError, match=r"conv_affine_act: scale of shape \(24,\) does not fit x"):
        ops.conv_affine_act(x, torch.zeros(K, C, 1, 1), v)


def test_bad_residual_blocks_raise():
    x, conv = channels_last((2, C, 6, 6)), ConvParams(torch.zeros(K, C, 1, 1))
    with pytest.raises(
        ValueError, match=r"branch makes \(2, 32, 6, 6\) of x of shape \(2, 24, 6, 6\), the shortcut \(2, 24"
    ):
        ops.residual_block(x, (conv,))
    with pytest.raises(ValueError, match=r"branch\[1\].gamma of shape \(24,\) does not fit x"):
        ops.residual_block(x, (conv, NormParams(torch.zeros(C), None, training=True)), None)
    with pytest.raises(ValueError, match="two activations in a row"):
        ops.residual_block(x, (conv, "relu", "silu"), None)
    with pytest.raises(ValueError, match="ends with an activation before the addition"):
        ops.residual_block(x, (conv, "relu"))
    with pytest.raises(TypeError, match="a step must be ConvParams, NormParams or an activation, got Tensor"):
        ops.residual_block(x, (conv.weight,))
    with pytest.raises(ValueError, match="memory must be 'auto' or 'low', got 'lots'"):
        ops.residual_block(x, (conv,), None, memory="lots")


def test_nothing_is_updated_where_an_argument_is_bad():
    arguments = good()
    before = arguments["running_mean"].clone()
    with pytest.raises(ValueError):
        ops.conv_bn_act(**arguments, residual=torch.zeros(1), training=True)
    assert torch.equal(arguments["running_mean"], before)


@pytest.mark.parametrize("function", [fused_bn_act, fused_conv_bn_act])
def test_one_value_per_channel_raises_as_stock_does(function):
    m = Operands(None, None, C, C)
    with pytest.raises(ValueError) as stock:
        F.batch_norm(torch.zeros(1, C, 1, 1), None, None, training=True)
    conv = {"padding": 1} if function is fused_conv_bn_act else {}
    with pytest.raises(ValueError) as ours:
        function(m, torch.zeros(1, C, 1, 1), training=True, **conv)
    assert str(ours.value) == str(stock.value)


def test_result_of_a_plain_convolution_may_be_written_to():
    m = module("bn_act_conv")
    m.fuses = True
    out = m(channels_last((2, C, 6, 6)))
    out.relu_()
    out.sum().backward()
