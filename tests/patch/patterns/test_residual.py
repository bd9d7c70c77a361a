"""Every way to write a residual sum, and the ones that must stay as they are."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fusedres.patch import explain, patch

from ..blocks import Layers, check_patched, images

PREFIX, LINEAR = "post-activation residual ", "linear residual "


def block(forward, **layers) -> nn.Module:
    """A module with the layers of :class:`Layers`, more ``layers``, and this forward."""
    model = type("Block", (Layers,), {"forward": forward})()
    for name, layer in layers.items():
        setattr(model, name, layer)
    return model


def only_site(report):
    assert len(report.fused) == 1, str(report)
    return report.fused[0]


def inplace_sum(self, x):
    out = self.branch(x)
    out += x
    return out


def relu_method(self, x):
    return (self.branch(x) + x).relu_()


@pytest.mark.parametrize(
    "forward",
    [
        inplace_sum,
        relu_method,
        lambda self, x: x + self.branch(x),
        lambda self, x: torch.add(self.branch(x), x),
        lambda self, x: torch.add(x, other=self.branch(x), alpha=1),
        lambda self, x: operator.add(self.branch(x), x),
        lambda self, x: operator.iadd(self.branch(x), x),
        lambda self, x: self.branch(x).add(x),
        lambda self, x: self.branch(x).add_(x).relu(),
        lambda self, x: self.relu(self.branch(x) + x),
        lambda self, x: F.relu(self.branch(x) + x, inplace=True),
        lambda self, x: F.relu(self.branch(x) + x, True),
        lambda self, x: F.leaky_relu(self.branch(x) + x, 0.2),
        lambda self, x: F.silu(self.branch(x) + x.clone()),
        lambda self, x: F.gelu(self.branch(x) + x),
        lambda self, x: self.bn1(self.conv1(x)) + x,
        lambda self, x: self.conv1(x) + x,
    ],
)
def test_identity(forward):
    report = check_patched(block(forward))
    activated = "# block_0: x" not in report.source("")
    assert only_site(report).pattern == (PREFIX if activated else LINEAR) + "(identity)"


@pytest.mark.parametrize(
    "act",
    [nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.LeakyReLU(0.3), nn.SiLU(), nn.Hardswish(inplace=True), nn.GELU()],
    ids=repr,
)
def test_activations(act):
    model = block(lambda self, x: self.act(self.bn2(self.conv2(self.act2(self.bn1(self.conv1(x))))) + x))
    model.act, model.act2 = act, type(act)() if not isinstance(act, nn.LeakyReLU) else nn.LeakyReLU(0.1)
    report = check_patched(model)
    assert report.coverage == 1.0
    assert "self.act" not in report.source("")


def test_activation_that_no_block_has_stays_outside():
    report = check_patched(block(lambda self, x: self.act(self.branch(x) + x), act=nn.GELU(approximate="tanh")))
    assert report.coverage == 1.0
    assert "self.act(" in report.source("")


def test_identity_modules_disappear():
    idle = {"a": nn.Identity(), "b": nn.Sequential(), "c": nn.Dropout(0.0)}
    report = check_patched(block(lambda self, x: self.relu(self.a(self.b(self.c(self.branch(x)))) + self.b(x)), **idle))
    assert only_site(report).pattern == PREFIX + "(identity)"
    assert "return fusedres_block.run(block_0, self, x)\n" in report.source("")


def test_projection():
    def forward(self, x):
        return torch.relu(self.skip(x) + self.bn1(self.conv1(x)))

    report = check_patched(block(forward, skip=nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))))
    assert only_site(report).pattern == PREFIX + "(projection)"
    assert set(only_site(report).convolutions) == {"conv1", "skip.0"}


def test_other_tensor_is_the_second_input():
    report = check_patched(block(lambda self, x, y: torch.relu(self.branch(x) + y)), images(), images() * 2)
    assert only_site(report).pattern == PREFIX + "(second input)"
    assert "run(block_0, self, x, y)" in report.source("")


def test_two_runs_from_different_tensors():
    report = check_patched(
        block(lambda self, x, y: torch.relu(self.bn1(self.conv1(x)) + self.bn2(self.conv2(y)))), images(), images() * 2
    )
    assert only_site(report).pattern == PREFIX + "(projection of a second input)"
    assert "run(block_0, self, x, y)" in report.source("")
    assert report.coverage == 1.0


def test_a_projection_of_a_pooled_input():
    def forward(self, x):
        return torch.relu(self.branch(x) + self.bn3(self.conv3(self.pool(x))))

    extra = {"pool": nn.AvgPool2d(3, 1, 1), "conv3": nn.Conv2d(4, 4, 1), "bn3": nn.BatchNorm2d(4)}
    report = check_patched(block(forward, **extra))
    assert only_site(report).pattern == PREFIX + "(projection of a second input)"
    assert report.coverage == 1.0


def test_a_branch_that_ends_with_an_activation_keeps_its_sum():
    report = check_patched(block(lambda self, x: torch.relu(self.branch(x)) + x))
    assert [site.pattern for site in report.fused] == ["conv-bn-relu x 2"]
    assert " + x" in report.source("")


def test_sums_with_one_operand_twice_or_scaled_or_with_a_number_are_no_joins():
    for forward in (
        lambda self, x: (lambda y: y + y)(self.branch(x)),
        lambda self, x: torch.add(self.branch(x), x, alpha=2),
        lambda self, x: self.branch(x) + 1,
        lambda self, x: self.branch(x) + x.shape[1],
    ):
        report = check_patched(block(forward))
        assert [site.pattern for site in report.fused] == ["conv-bn-relu-conv-bn"]


def test_broadcast_sum():
    report = check_patched(block(lambda self, x, y: self.branch(x) + y), images(), images()[:, :1, :1, :1])
    assert report.coverage == 1.0


def test_chain_of_blocks_in_one_forward():
    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)) + x)
        return torch.relu(self.bn2(self.conv2(x)) + x)

    report = check_patched(block(forward))
    assert [site.pattern for site in report.fused] == [PREFIX + "(identity)"] * 2


# -- values that somebody else sees ----------------------------------------------------------------------------------


def test_a_value_used_twice_stays_visible():
    def forward(self, x):
        middle = self.bn1(self.conv1(x))
        return torch.relu(self.bn2(self.conv2(torch.relu(middle))) + x), middle

    report = check_patched(block(forward))
    patterns = {site.convolutions: site.pattern for site in report.fused}
    assert patterns == {("conv1",): "conv-bn", ("conv2",): PREFIX + "(second input)"}


def add_to_input(self, x):
    x += self.branch(x)
    return x


def activate_input(self, x):
    y = self.relu(x)
    return self.branch(y) + x


def activate_input_late(self, x):
    y = self.bn1(self.conv1(x))
    z = x.mul_(0.5)
    return (y + x) * z


def write_through_a_view(self, x):
    y = x.detach() * 1.0
    out = self.bn1(self.conv1(y))
    y.view(-1).mul_(3.0)
    return out + y + x


def shortcut_writes(self, x):
    return self.bn1(self.conv1(x.detach())) + x.relu_()


def activated_sum(self, x):
    a = torch.relu_(x * 1)
    b = a.view(a.shape)
    b += self.branch(x)
    return a + b


def chain_then_write(self, x):
    y = self.bn1(self.conv1(x))
    y += 1
    return y.relu_()


@pytest.mark.parametrize("forward", [activate_input, chain_then_write])
def test_in_place_writes_keep_their_meaning(forward):
    assert check_patched(block(forward)).coverage > 0


@pytest.mark.parametrize(
    "forward", [add_to_input, activate_input_late, write_through_a_view, shortcut_writes, activated_sum]
)
def test_in_place_writes_without_gradient_keep_their_meaning(forward):
    """Stock PyTorch itself refuses to differentiate these."""
    model = block(forward).double().eval()
    x, y = images(), images()
    with torch.no_grad():
        expected = model(x)
        report = patch(model)
        torch.testing.assert_close(model(y), expected)
    torch.testing.assert_close(y, x)
    assert report.coverage > 0


def test_sum_into_the_input_is_declined_in_words():
    report = explain(block(lambda self, x: operator.iadd(x, self.conv1(x))))
    reasons = {d.path: d.reason for d in report.declined}
    assert report.fused == ()
    assert "writes into x" in reasons["conv1"]
