"""Residual blocks with squeeze-excitation and stochastic depth before the join."""

from __future__ import annotations

import copy
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision_shim import torchvision_models

from fusedres.engine.pending import _rounded
from fusedres.patch import explain, patch, unpatch
from fusedres.testing import channels_last, compare

from ..blocks import assert_same, check_patched, images, settled
from ..chance import check_seeded, counter_dropout
from .test_residual import block, only_site


class SEBlock(nn.Module):
    def __init__(self, channels: int = 4, reduction: int = 2) -> None:
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(channels, channels // reduction, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(channels // reduction, channels, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x):
        b, c, _, _ = x.size()
        return x * self.fc(x.mean((2, 3))).view(b, c, 1, 1).expand_as(x)


def in_place(self, x):
    out = self.se(self.branch(x))
    out += x
    return torch.relu(out)


@pytest.mark.parametrize(
    ("forward", "pattern"),
    [
        (in_place, "post-activation residual (identity, squeeze-excitation)"),
        (lambda self, x: self.se(self.branch(x)) + x, "linear residual (identity, squeeze-excitation)"),
        (
            lambda self, x: F.relu(self.skip(x) + self.se(self.branch(x))),
            "post-activation residual (projection, squeeze-excitation)",
        ),
        (
            lambda self, x: self.se(self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))) + x,
            "pre-activation residual (identity, squeeze-excitation)",
        ),
        (
            lambda self, x: self.bn2(self.conv2(self.se(F.silu(self.bn1(self.conv1(x)))))) + x,
            "linear residual (identity, squeeze-excitation)",
        ),
    ],
)
def test_squeeze_excitation(forward, pattern):
    report = check_patched(block(forward, se=SEBlock(), skip=nn.Conv2d(4, 4, 1)))
    assert only_site(report).pattern == pattern
    assert "se.fc.0 -> relu -> se.fc.2 -> sigmoid" in report.source("")


def test_a_shortcut_with_a_gate_is_the_second_input():
    report = check_patched(block(lambda self, x: self.branch(x) + self.se(x), se=SEBlock()))
    assert only_site(report).pattern == "linear residual (second input)"


# -- stochastic depth -------------------------------------------------------------------------------------------------


def stochastic_depth(package: str, **options) -> nn.Module:
    place, name, defaults = {
        "torchvision": ("torchvision.ops.stochastic_depth", "StochasticDepth", {"p": 0.5, "mode": "row"}),
        "timm": ("timm.layers.drop", "DropPath", {"drop_prob": 0.5}),
        "fusedres": ("fusedres.nn.stochastic_depth", "StochasticDepth", {"p": 0.5}),
    }[package]
    if package != "fusedres":
        torchvision_models()  # timm imports it
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    return getattr(import_module(place), name)(**defaults | options)


PACKAGES = ["torchvision", "timm", "fusedres"]


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize(
    ("forward", "pattern"),
    [
        (
            lambda self, x: F.relu(self.drop(self.branch(x)) + x),
            "post-activation residual (identity, stochastic depth)",
        ),
        (
            lambda self, x: x + self.drop(self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))),
            "pre-activation residual (identity, stochastic depth)",
        ),
        (
            lambda self, x: self.drop(self.se(self.branch(x))) + x,
            "linear residual (identity, squeeze-excitation, stochastic depth)",
        ),
    ],
)
def test_stochastic_depth(package, forward, pattern):
    report = check_seeded(block(forward, drop=stochastic_depth(package), se=SEBlock()))
    assert only_site(report).pattern == pattern
    assert "drop (stochastic depth)" in report.source("")


@pytest.mark.parametrize("package", PACKAGES)
def test_the_probability_is_the_modules_at_every_call(package):
    model = block(lambda self, x: F.relu(self.drop(self.branch(x)) + x), drop=stochastic_depth(package))
    check_seeded(model)
    name = "drop_prob" if package == "timm" else "p"
    x = torch.randn(64, 4, 3, 3, dtype=torch.float64)
    for p in (1.0, 0.0):
        setattr(model.drop, name, p)
        assert torch.equal(model.train()(x), torch.relu(x)) == (p == 1.0)


@pytest.mark.parametrize(
    ("package", "options", "words"),
    [("torchvision", {"mode": "batch"}, "mode='batch'"), ("timm", {"scale_by_keep": False}, "scale_by_keep=False")],
)
def test_other_modes_stay_outside(package, options, words):
    drop = stochastic_depth(package, **options)
    report = check_seeded(block(lambda self, x: F.relu(self.drop(self.branch(x)) + x), drop=drop))
    assert only_site(report).pattern == "conv-bn-relu-conv-bn"
    assert "self.drop(" in report.source("")
    alone = explain(block(lambda self, x: self.drop(self.conv1(x)) + x, drop=stochastic_depth(package, **options)))
    assert words in {d.path: d.reason for d in alone.declined}["conv1"]


@pytest.mark.parametrize(
    ("package", "option", "value"), [("torchvision", "mode", "batch"), ("timm", "scale_by_keep", False)]
)
def test_a_mode_that_changes_later_is_honoured(package, option, value):
    model = block(lambda self, x: F.relu(self.drop(self.branch(x)) + x), drop=stochastic_depth(package))
    check_seeded(model)
    setattr(model.drop, option, value)
    called = []
    model.drop.forward = lambda x: called.append(1) or x
    model(torch.randn(2, 4, 3, 3, dtype=torch.float64))
    assert called == [1]


def drop_path(x, drop_prob=0.0, training=False):
    """As most repositories write it."""
    if drop_prob == 0.0 or not training:
        return x
    keep_prob = 1 - drop_prob
    shape = (x.shape[0],) + (1,) * (x.ndim - 1)
    random_tensor = keep_prob + torch.rand(shape, dtype=x.dtype, device=x.device)
    random_tensor.floor_()
    return x.div(keep_prob) * random_tensor


class DropPath(nn.Module):
    def __init__(self, drop_prob=0.5):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        return drop_path(x, self.drop_prob, self.training)


class Bernoulli(nn.Module):
    def forward(self, x):
        if not self.training:
            return x
        return x * torch.empty((x.shape[0], 1, 1, 1), dtype=x.dtype).bernoulli_(0.5)


class DropPixels(nn.Module):
    """One mask for all channels, but another factor for every pixel."""

    def forward(self, x):
        return x * (torch.rand(x.shape[0], 1, *x.shape[2:], dtype=x.dtype) > 0.5) if self.training else x


@pytest.mark.parametrize("drop", [DropPath, Bernoulli])
@pytest.mark.parametrize(
    ("forward", "pattern"),
    [
        (
            lambda self, x: F.relu(self.drop(self.branch(x)) + x),
            "post-activation residual (identity, stochastic depth)",
        ),
        (
            lambda self, x: x + self.drop(self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))),
            "pre-activation residual (identity, stochastic depth)",
        ),
        (
            lambda self, x: self.drop(self.se(self.branch(x))) + x,
            "linear residual (identity, squeeze-excitation, stochastic depth)",
        ),
    ],
)
def test_stochastic_depth_of_the_users(drop, forward, pattern):
    report = check_seeded(block(forward, drop=drop(), se=SEBlock()))
    assert only_site(report).pattern == pattern
    assert "drop (stochastic depth)" in report.source("")


def test_stochastic_depth_of_nothing_is_an_identity():
    report = check_patched(block(lambda self, x: F.relu(self.drop(self.branch(x)) + x), drop=DropPath(0.0)))
    assert only_site(report).pattern == "post-activation residual (identity)"


def test_the_users_probability_may_change():
    model = block(lambda self, x: F.relu(self.drop(self.branch(x)) + x), drop=DropPath())
    check_seeded(model)
    stock = copy.deepcopy(model)
    unpatch(stock)
    for p in (0.25, 0.0, 0.9):
        model.drop.drop_prob = stock.drop.drop_prob = p
        assert_same(model, stock, images())
    model.drop.forward = stock.drop.forward = lambda x: x * 3
    assert_same(model, stock, images())


def test_somebody_elses_stays_outside():
    report = check_seeded(block(lambda self, x: F.relu(self.drop(self.branch(x)) + x), drop=DropPixels()))
    assert only_site(report).pattern == "conv-bn-relu-conv-bn"
    assert "self.drop(" in report.source("")


def test_a_function_that_drops_stays_outside_with_its_mode():
    model = block(lambda self, x: F.relu(drop_path(self.branch(x), self.p, self.training) + x))
    model.p = 0.5
    report = check_seeded(model)
    assert only_site(report).pattern == "conv-bn-relu-conv-bn"
    assert "drop_path(" in report.source("")
    stock = copy.deepcopy(model)
    unpatch(stock)
    model.p = stock.p = 0.1
    assert_same(model, stock, images())


@pytest.mark.parametrize(
    ("forward", "pattern"),
    [
        (
            lambda self, x: F.relu(self.drop(self.branch(x)) + x),
            "post-activation residual (identity, dropout of channels)",
        ),
        (
            lambda self, x: F.relu(self.bn2(self.conv2(self.drop(F.relu(self.bn1(self.conv1(x)))))) + x),
            "post-activation residual (identity, dropout of channels)",
        ),
        (
            lambda self, x: F.relu(F.dropout2d(self.branch(x), 0.3, self.training) + x),
            "post-activation residual (identity, dropout of channels)",
        ),
        (
            lambda self, x: self.conv2(self.drop(F.leaky_relu(self.bn1(self.conv1(x)), 0.1))),
            "conv-bn-leaky_relu(0.1)-dropout2d-conv",
        ),
        (lambda self, x: F.relu(self.drop(self.se(self.branch(x))) + x), "conv-bn-relu-conv-bn-se"),
        (lambda self, x: self.drop(F.silu(self.bn1(self.conv1(x)))), "conv-bn-silu"),
    ],
)
def test_dropout_of_channels(forward, pattern):
    report = check_seeded(block(forward, drop=nn.Dropout2d(0.4), se=SEBlock()))
    assert report.fused[0].pattern == pattern, str(report)


def test_dropout_of_channels_in_place():
    report = check_seeded(block(lambda self, x: self.drop(self.branch(x)) + x, drop=nn.Dropout2d(0.4, inplace=True)))
    assert only_site(report).pattern == "linear residual (identity, dropout of channels)"


@pytest.mark.parametrize("drop", [DropPath(0.25), nn.Dropout2d(0.25)], ids=["depth", "channels"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_masks_within_the_budgets(drop, autocast):
    model = block(lambda self, x: F.relu(self.drop(self.branch(x)) + x), drop=drop)
    model.register_forward_pre_hook(lambda *_: torch.manual_seed(3) and None)
    compare(model.train(), patch, lambda seed: [channels_last((8, 4, 24, 24), seed=seed)], autocast=autocast).check()


# -- dropout as a function --------------------------------------------------------------------------------------------


def dropout_between(self, x):
    out = F.relu(self.bn1(self.conv1(x)))
    out = F.dropout(out, self.p, self.training)
    return F.relu(self.bn2(self.conv2(out)) + x)


def dropout_in_a_child(self, x):
    return F.relu(self.conv2(self.child(self.bn1(self.conv1(x)))) + x)


class Child(nn.Module):
    def forward(self, x):
        return F.dropout(F.relu(x), p=0.3, training=self.training)


@pytest.mark.parametrize("forward", [dropout_between, dropout_in_a_child])
def test_dropout_as_a_function(forward, monkeypatch):
    model = settled(block(forward, child=Child()))
    model.p = 0.3
    stock = copy.deepcopy(model)
    report = patch(model)
    assert [set(site.convolutions) for site in report.fused] == [{"conv1", "conv2"}]
    assert "dropout of 0.3" in report.source("")
    for m in (model, stock):
        m.register_forward_pre_hook(lambda *_: torch.manual_seed(3) and None)
    monkeypatch.setattr(F, "dropout", counter_dropout)  # stock's draws as ours
    assert_same(model, stock, images())


def test_the_probability_and_the_mode_of_a_function_may_change():
    model = settled(block(dropout_between))
    model.p = 0.3
    patch(model)
    model.p = 0.0
    stock = copy.deepcopy(model)
    unpatch(stock)
    assert_same(model, stock, images())
    assert torch.equal(model.eval()(images()), model(images()))


def test_a_dropout_that_is_always_on_or_off():
    report = check_patched(block(lambda self, x: F.dropout(self.branch(x), 0.5, False) + x))
    assert only_site(report).pattern == "linear residual (identity)"
    model = block(lambda self, x: torch.sigmoid(F.dropout(self.conv1(x), 0.5)))
    reasons = {d.path: d.reason for d in explain(model).declined}
    assert "is a dropout that is not switched by its module's mode" in reasons["conv1"]


@pytest.mark.parametrize(
    ("forward", "name"),
    [
        (lambda self, x: F.relu(self.branch(x) + x.mean((2, 3), keepdim=True)), "mean"),
        (lambda self, x: self.scale + self.branch(x), "scale"),
    ],
)
def test_a_sum_that_broadcasts_leaves_a_chain(forward, name):
    """As a whole it would be stock's at every call."""
    report = check_patched(block(forward, scale=nn.Parameter(torch.rand(1, 4, 1, 1))))
    assert only_site(report).pattern == "conv-bn-relu-conv-bn"
    assert only_site(report).remark == f"the addition add is not fused: {name} is broadcast"


def test_an_argument_of_any_name_is_a_second_input():
    report = check_patched(block(lambda self, x, mean: self.branch(x) + mean), images(), images() * 2)
    assert only_site(report).pattern == "linear residual (second input)"


@pytest.mark.parametrize(
    ("forward", "words"),
    [
        (lambda self, x: x + self.scale * self.branch(x), "mul is no step of a block"),
        (lambda self, x: F.relu(self.branch(x) * self.scale + x), "mul is no step of a block"),
        (lambda self, x: torch.add(x, self.branch(x), alpha=0.5), "add has alpha=0.5, which no block has"),
        (lambda self, x: x + drop_path(self.branch(x), 0.1, self.training), "drop_path is no step of a block"),
        (lambda self, x: sum([self.branch(x), x]), "add adds no second tensor (sum() begins with the number 0)"),
        (lambda self, x: self.branch(x) + x.split(4, 1)[0], "add is of what may be no tensor"),
        (
            lambda self, x: (lambda out: out * out.mean(1, keepdim=True))(self.branch(x)) + x,
            "the output of bn2 is used in more than one place",
        ),
    ],
)
def test_why_a_chain_has_no_sum(forward, words):
    report = explain(block(forward, scale=nn.Parameter(torch.rand(1, 4, 1, 1))))
    site = only_site(report)
    assert site.pattern == "conv-bn-relu-conv-bn"
    assert site.remark.startswith("the addition add")
    assert site.remark.endswith(f" is not fused: {words}")


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: torch.cat([self.branch(x), x], 1),
        lambda self, x: self.bn3(self.conv3(torch.sigmoid(self.branch(x)))) + x,
        lambda self, x: F.relu(self.bn3(self.conv3(x)) + torch.sigmoid(self.branch(x))),
    ],
    ids=["no sum", "the sum of another block", "a sum that is fused"],
)
def test_a_chain_without_a_sum_of_its_own_has_no_remark(forward):
    report = explain(block(forward, conv3=nn.Conv2d(4, 4, 1), bn3=nn.BatchNorm2d(4)))
    assert {site.remark for site in report.fused} == {""}


@pytest.mark.parametrize("drop", [DropPath(0.25), nn.Dropout2d(0.25)], ids=["depth", "channels"])
def test_bytes_of_masks_are_predicted(drop):
    model = block(lambda self, x: F.relu(self.drop(self.branch(x)) + x), drop=drop)
    stock, patched = patch(model).bytes_per_image((2, 4, 32, 32))
    assert patched < stock


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_number_is_rounded_as_a_tensor_is(dtype):
    for number in (1.0, 1 / 0.75, 1 / 0.9, 2.0, 1 / 0.3, 1 / 3, 0.0):
        assert _rounded(number, dtype) == torch.tensor(number, dtype=dtype).item()
