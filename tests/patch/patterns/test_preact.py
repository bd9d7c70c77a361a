"""Pre-activation residual blocks, and what a shortcut may read in them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ..blocks import check_patched, images
from ..chance import check_seeded
from .test_residual import block, only_site

PREFIX = "pre-activation residual "


def branch(self, x):
    """Everything behind the first norm and activation."""
    return self.conv2(F.relu(self.bn2(self.conv1(x))))


def in_place_sum(self, x):
    out = torch.relu(self.bn1(x))
    out = branch(self, out)
    out += x
    return out


def of_activated(self, x):
    out = self.relu(self.bn1(x))
    return branch(self, out) + self.skip(out)


def of_activated_in_place(self, x):
    out = torch.relu(self.bn1(x))
    side = self.skip(out)
    out = branch(self, out)
    out += side
    return out


def activated_identity(self, x):
    out = F.relu(self.bn1(x))
    return out + branch(self, out)


def without_norm(self, x):
    return self.conv2(F.relu(self.conv1(F.silu(x)))) + x


@pytest.mark.parametrize(
    ("forward", "kind"),
    [
        (in_place_sum, "identity"),
        (lambda self, x: x + branch(self, self.relu(self.bn1(x))), "identity"),
        (without_norm, "identity"),
        (lambda self, x: self.skip(x) + branch(self, F.relu(self.bn1(x))), "projection"),
        (of_activated, "projection of the activated input"),
        (of_activated_in_place, "projection of the activated input"),
        (activated_identity, "activated identity"),
    ],
)
def test_one_site_from_the_first_step(forward, kind):
    report = check_patched(block(forward, skip=nn.Conv2d(4, 4, 1)))
    site = only_site(report)
    assert site.pattern == f"{PREFIX}({kind})"
    assert report.source("").count("self.") == report.source("").count("self.skip(") == 0
    assert ("skip" in site.convolutions) == ("projection" in kind)


def test_other_tensor_is_the_second_input():
    def forward(self, x, y):
        return branch(self, F.relu(self.bn1(x))) + y

    report = check_patched(block(forward), images(), images() * 2)
    assert only_site(report).pattern == PREFIX + "(second input)"


def test_a_shortcut_that_leaves_before_the_activation():
    def forward(self, x):
        out = self.bn1(x)
        return branch(self, F.relu(out)) + self.skip(out)

    report = check_patched(block(forward, skip=nn.Conv2d(4, 4, 1)))
    assert only_site(report).pattern == PREFIX + "(projection)"
    assert "self.bn1(" in report.source("")


def test_an_activated_input_that_others_read_stays_visible():
    def forward(self, x):
        out = F.relu(self.bn1(x))
        return branch(self, out) + self.skip(out), out

    report = check_patched(block(forward, skip=nn.Conv2d(4, 4, 1)))
    assert [site.pattern for site in report.fused] == ["bn-relu", "linear residual (projection)"]


def test_the_stems_activation_is_not_taken_for_the_blocks():
    """``relu(bn1(conv1(x)))`` belongs to its convolution, though both sides of the next sum read it."""

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        return self.conv2(out) + self.skip(out)

    report = check_patched(block(forward, skip=nn.Conv2d(4, 4, 1)))
    assert sorted(site.pattern for site in report.fused) == ["conv-bn-relu", "linear residual (projection)"]


def test_an_activation_in_place_on_the_input_stays_outside():
    def forward(self, x):
        y = x * 1.0
        return self.conv1(F.relu_(y)) + y

    report = check_patched(block(forward))
    assert "relu_" in report.source("")


def test_dropout_between_the_convolutions():
    def forward(self, x):
        out = self.conv1(torch.relu(self.bn1(x)))
        out = self.dropout(torch.relu(self.bn2(out)))
        return self.conv2(out) + x

    site = only_site(check_seeded(block(forward, dropout=nn.Dropout(0.4))))
    assert site.pattern == PREFIX + "(identity, dropout)"


def test_dropout_before_the_sum_keeps_the_sum_outside():
    def forward(self, x):
        return self.dropout(branch(self, torch.relu(self.bn1(x)))) + x

    report = check_seeded(block(forward, dropout=nn.Dropout(0.4)))
    assert only_site(report).pattern == "bn-relu-conv-bn-relu-conv-dropout"
    assert " + x" in report.source("")


def test_a_convolution_that_is_not_plain_leaves_the_rest():
    def forward(self, x):
        return branch(self, torch.relu(self.bn1(x))) + x

    model = block(forward)
    model.conv1.padding_mode, model.conv1._reversed_padding_repeated_twice = "circular", [1, 1, 1, 1]
    around, site = check_patched(model).fused
    assert (around.pattern, around.norms) == ("bn-relu", ("bn1",))
    assert (site.pattern, site.convolutions) == (PREFIX + "(second input)", ("conv2",))
