"""Convolutions with what follows them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fusedres.patch import explain, patch

from ..blocks import assert_same, check_patched, images, settled
from .test_residual import block


@pytest.mark.parametrize(
    ("forward", "pattern"),
    [
        (lambda self, x: self.bn1(self.conv1(x)), "conv-bn"),
        (lambda self, x: self.relu(self.bn1(self.conv1(x))), "conv-bn-relu"),
        (lambda self, x: F.relu6(self.conv1(x)), "conv-relu6"),
        (lambda self, x: F.hardtanh(self.conv1(x), 0, 6), "conv-relu6"),
        (lambda self, x: self.clipped(self.conv1(x)), "conv-relu6"),
        (lambda self, x: F.leaky_relu(self.conv1(x), negative_slope=0.2), "conv-leaky_relu(0.2)"),
        (lambda self, x: self.conv2(self.conv1(x)), "conv x 2"),
        (lambda self, x: F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))), "conv-bn-relu x 2"),
        (lambda self, x: self.conv2(F.relu(self.conv1(x))), "conv-relu-conv"),
        (lambda self, x: self.pool(F.relu(self.bn1(self.conv1(x)))), "conv-bn-relu-maxpool"),
        (lambda self, x: F.max_pool2d(self.bn1(self.conv1(x)), 3, stride=2, padding=1), "conv-bn-maxpool"),
        (lambda self, x: torch.max_pool2d(self.conv1(x), [2, 2], ceil_mode=True), "conv-maxpool"),
        (lambda self, x: F.max_pool2d(F.relu(self.conv2(F.relu(self.conv1(x)))), 2), "conv-relu-conv-relu-maxpool"),
    ],
)
def test_names(forward, pattern):
    report = check_patched(block(forward, clipped=nn.Hardtanh(0.0, 6.0), pool=nn.MaxPool2d(3, 2, 1)))
    assert [site.pattern for site in report.fused] == [pattern]


def test_the_longest_beginning_that_the_engine_runs():
    report = check_patched(block(lambda self, x: self.bn1(F.relu(self.conv1(x)))))
    assert [site.pattern for site in report.fused] == ["conv-relu"]
    assert "self.bn1(" in report.source("")


def test_a_lone_convolution_is_left_alone():
    report = explain(block(lambda self, x: self.conv1(x)))
    reasons = {d.path: d.reason for d in report.declined}
    assert report.fused == ()
    assert "stands alone" in reasons["conv1"]
    assert "does not call it" in reasons["conv2"]


@pytest.mark.parametrize("act", [nn.Hardtanh(), nn.Hardtanh(0.0, 5.0)])
def test_other_bounds_are_no_relu6(act):
    report = check_patched(block(lambda self, x: self.act(self.bn1(self.conv1(x))), act=act))
    assert [site.pattern for site in report.fused] == ["conv-bn"]


def test_clamp_has_another_gradient_at_zero_than_relu():
    report = check_patched(block(lambda self, x: self.bn1(self.conv1(x)).clamp(min=0)))
    assert [site.pattern for site in report.fused] == ["conv-bn"]


@pytest.mark.parametrize(
    ("forward", "words"),
    [
        (lambda self, x: torch.sigmoid(self.conv1(x)), "sigmoid is no step of a block"),
        (lambda self, x: self.conv1(x).flatten(1), "flatten is no step of a block"),
        (lambda self, x: self.conv1(x) * 2, "mul is no step of a block"),
        (lambda self, x: F.gelu(self.conv1(x), approximate="tanh"), "gelu with these arguments is no step of a block"),
        (lambda self, x: self.tanh_gelu(self.conv1(x)), "tanh_gelu is a GELU(approximate='tanh'), which no block has"),
    ],
)
def test_what_follows_is_named(forward, words):
    report = explain(block(forward, tanh_gelu=nn.GELU("tanh")))
    assert {d.path: d.reason for d in report.declined}["conv1"] == f"nothing to fuse conv1 with: {words}"


def test_stays_within_one_module():
    unit = lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())  # noqa: E731
    report = check_patched(nn.Sequential(unit(), unit()), images())
    assert {site.path: site.pattern for site in report.fused} == {"0": "conv-bn-relu", "1": "conv-bn-relu"}


def test_reaches_into_a_wrapped_pair():
    model = block(lambda self, x: F.relu(self.pair(x)), pair=nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    report = check_patched(model)
    assert [(site.path, site.pattern, site.convolutions) for site in report.fused] == [
        ("", "conv-bn-relu", ("pair.0",))
    ]


def test_what_the_model_does_around_it_stays():
    def forward(self, x):
        gate = torch.sigmoid(self.conv2(x.mean((2, 3), keepdim=True)))
        return gate * F.relu(self.bn1(self.conv1(x)))

    report = check_patched(block(forward))
    assert [site.convolutions for site in report.fused] == [("conv1",)]


def test_modules_that_begin_with_their_norm_are_one_run():
    """As in DPN, whose last convolution's output is sliced."""

    class Pre(nn.Sequential):
        def __init__(self):
            super().__init__(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = Pre(), Pre(), Pre()

        def forward(self, x):
            y = self.c(self.b(self.a(x)))
            return x[:, :2] + y[:, :2], torch.cat([x[:, 2:], y[:, 2:]], 1)

    report = check_patched(Block())
    assert [(site.path, site.pattern) for site in report.fused] == [("", "bn-relu-conv x 3")]


def test_a_convolution_and_an_activation_are_stock_in_training():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3), nn.ReLU(inplace=True))
    report = patch(model)
    assert report.coverage == 1.0
    assert "in training there is nothing to save" in report.fused[0].remark
    stock, patched = report.bytes_per_image((2, 3, 64, 64))
    assert patched == stock
    out = model(torch.randn(2, 3, 64, 64, requires_grad=True))
    assert "Relu" in type(out.grad_fn).__name__


# ---------------------------------------------------------------------------------------------------------------------
# Max pooling
# ---------------------------------------------------------------------------------------------------------------------


def test_a_max_pooling_ends_a_run():
    def forward(self, x):
        return self.bn2(self.conv2(self.pool(torch.relu(self.bn1(self.conv1(x))))))

    report = check_patched(block(forward, pool=nn.MaxPool2d(2)))
    assert [site.pattern for site in report.fused] == ["conv-bn-relu-maxpool", "conv-bn"]
    assert "pool (max pooling)" in report.source("")


def test_a_function_that_pools_is_named():
    report = explain(block(lambda self, x: F.max_pool2d(self.bn1(self.conv1(x)), (3, 2))))
    assert "max pooling of 3 x 2" in report.source("")


def test_a_max_pooling_that_others_share():
    """It has no parameters: each call of it is a step of its own."""

    def forward(self, x):
        return self.pool(self.relu(self.bn2(self.conv2(self.pool(self.relu(self.bn1(self.conv1(x))))))))

    report = check_patched(block(forward, pool=nn.MaxPool2d(2, 1)))
    assert [site.pattern for site in report.fused] == ["conv-bn-relu-maxpool"] * 2


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.dilated(self.bn1(self.conv1(x))),
        lambda self, x: self.indexed(self.bn1(self.conv1(x)))[0],
        lambda self, x: F.max_pool2d(self.bn1(self.conv1(x)), 2, dilation=2),
        lambda self, x: F.max_pool2d(self.bn1(self.conv1(x)), 2, return_indices=True)[0],
        lambda self, x: F.adaptive_max_pool2d(self.bn1(self.conv1(x)), 2),
        lambda self, x: self.own(self.bn1(self.conv1(x))),
    ],
)
def test_poolings_that_no_kernel_has_stay(forward):
    class Own(nn.MaxPool2d):
        def forward(self, x):
            return super().forward(x) + 1

    layers = {"dilated": nn.MaxPool2d(2, dilation=2), "indexed": nn.MaxPool2d(2, return_indices=True), "own": Own(2)}
    report = check_patched(block(forward, **layers))
    assert [site.pattern for site in report.fused] == ["conv-bn"]


def test_a_max_pooling_before_an_addition_stays():
    def forward(self, x):
        return self.pool(self.bn1(self.conv1(x))) + self.pool(x)

    report = check_patched(block(forward, pool=nn.MaxPool2d(2)))
    assert [site.pattern for site in report.fused] == ["conv-bn-maxpool"]


def test_a_hooked_max_pooling_is_called():
    model = block(lambda self, x: self.pool(self.bn1(self.conv1(x))), pool=nn.MaxPool2d(2))
    model.pool.register_forward_hook(lambda module, inputs, out: out * 2)
    report = check_patched(model)
    assert [site.pattern for site in report.fused] == ["conv-bn"]


@pytest.mark.parametrize(
    "change",
    [
        lambda pool: setattr(pool, "kernel_size", 3),
        lambda pool: setattr(pool, "ceil_mode", True),
        lambda pool: setattr(pool, "dilation", 2),
        lambda pool: setattr(pool, "stride", [1, 1]),
        lambda pool: pool.register_forward_hook(lambda module, inputs, out: out * 2),
        lambda pool: setattr(pool, "forward", lambda x: x[:, :, 1:, 1:]),
    ],
)
def test_a_max_pooling_changed_after_patching(change):
    stock = settled(block(lambda self, x: self.pool(F.relu(self.bn1(self.conv1(x)))), pool=nn.MaxPool2d(2)))
    patched = copy.deepcopy(stock)
    patch(patched)
    change(stock.pool), change(patched.pool)
    assert_same(patched, stock, images())
