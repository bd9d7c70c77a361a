"""Squeeze-excitation, however it is written, and what only looks like it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision_shim import torchvision_models

from fusedres.patch import explain, patch

from .blocks import check_patched, images, settled

C, HIDDEN = 6, 3


class Gated(nn.Module):
    """A convolution and the layers of a gate that a test writes."""

    def __init__(self, linear: bool = False) -> None:
        super().__init__()
        make = nn.Linear if linear else lambda c, k: nn.Conv2d(c, k, 1)
        self.conv = nn.Conv2d(4, C, 3)
        self.fc1, self.fc2 = make(C, HIDDEN), make(HIDDEN, C)
        self.pool, self.relu, self.idle = nn.AdaptiveAvgPool2d((1, 1)), nn.ReLU(inplace=True), nn.Identity()
        self.flatten = nn.Flatten()

    def excite(self, squeezed: Tensor) -> Tensor:
        return torch.sigmoid(self.fc2(self.relu(self.fc1(squeezed))))

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(self.conv(x))


def gated(gate, linear: bool = False) -> nn.Module:
    return type("Gate", (Gated,), {"gate": gate})(linear)


def timm(self, x):
    s = x.mean((2, 3), keepdim=True)
    s = self.fc2(self.relu(self.idle(self.fc1(s))))
    return x * s.sigmoid()


def torchvision(self, x):
    return F.hardsigmoid(self.fc2(F.silu(self.fc1(self.pool(x))))) * x


def functional(self, x):
    w = F.adaptive_avg_pool2d(x, 1)
    w = F.relu(self.fc1(w))
    w = F.sigmoid(self.fc2(w))
    return x * w


def by_name(self, x):
    w = torch.mean(x, dim=[-2, -1], keepdim=True)
    return torch.mul(x, torch.sigmoid(self.fc2(F.relu(self.fc1(w), inplace=True))))


def expanded(self, x):
    return x * torch.sigmoid(self.fc2(self.fc1(self.pool(x)))).expand_as(x)


def one_after_the_other(self, x):
    return x * torch.sigmoid(self.fc2(self.fc1(x.mean(3, keepdim=True).mean(2, keepdim=True))))


CONVOLUTIONS = [one_after_the_other, timm, torchvision, functional, by_name, expanded]


def unpacked_sizes(self, x):
    b, c, _, _ = x.size()
    y = self.pool(x).view(b, c)
    y = self.excite(y).view(b, c, 1, 1)
    return x * y.expand_as(x)


def sizes_one_by_one(self, x):
    y = F.adaptive_avg_pool2d(x, (1, 1)).view(x.size(0), x.size(1))
    return self.excite(y).reshape(x.shape[0], x.shape[1], 1, 1) * x


def wildcards(self, x):
    y = self.pool(x).view(x.size(0), -1)
    return x * self.excite(y).view(-1, C, 1, 1)


def flattened(self, x):
    return x * self.excite(torch.flatten(self.pool(x), 1)).unsqueeze(-1).unsqueeze(-1)


def flattened_by_module(self, x):
    return x * self.excite(self.flatten(self.pool(x)))[:, :, None, None]


def means(self, x):
    return x * self.excite(x.mean([2, 3])).unsqueeze(2).unsqueeze(3)


def squeezed(self, x):
    return x * self.excite(self.pool(x).squeeze(-1).squeeze(-1)).view(x.size(0), -1, 1, 1)


def rows_then_columns(self, x):
    return x * self.excite(x.mean(2).mean(dim=2)).view(x.size(0), x.size(1), 1, 1)


def of_one_dimension(self, x):
    b, c, _, _ = x.size()
    return x * self.excite(x.view(b, c, -1).mean(2)).view(b, c, 1, 1)


def flattened_first(self, x):
    return x * self.excite(torch.mean(x.flatten(2), -1))[:, :, None, None]


LINEARS = [
    rows_then_columns,
    of_one_dimension,
    flattened_first,
    unpacked_sizes,
    sizes_one_by_one,
    wildcards,
    flattened,
    flattened_by_module,
    means,
    squeezed,
]


@pytest.mark.parametrize(("forward", "linear"), [(f, False) for f in CONVOLUTIONS] + [(f, True) for f in LINEARS])
def test_forms(forward, linear):
    report = check_patched(gated(forward, linear))
    assert [site.pattern for site in report.fused] == ["conv-se"]
    assert "    return fusedres_block.run(block_0, self, x)\n" in report.source("")
    assert report.coverage == 1.0


def test_a_sequential_and_a_product_in_place():
    """Stock PyTorch itself refuses to differentiate such a product."""

    def forward(self, x):
        x = self.conv(x)
        x *= self.all(x)
        return x

    layers = nn.AdaptiveAvgPool2d(1), nn.Conv2d(C, HIDDEN, 1), nn.ReLU(), nn.Conv2d(HIDDEN, C, 1), nn.Sigmoid()
    model = type("Gate", (Gated,), {"forward": forward})()
    model.all = nn.Sequential(*layers)
    settled(model).eval()
    with torch.no_grad():
        expected = model(images())
        report = patch(model)
        torch.testing.assert_close(model(images()), expected)
    assert [site.pattern for site in report.fused] == ["conv-se"]


def only_one_layer(self, x):
    return x * torch.sigmoid(self.fc2(self.fc1(x)[:, :HIDDEN].mean((2, 3), keepdim=True)))


def of_another_tensor(self, x):
    return torch.relu(x) * torch.sigmoid(self.fc2(self.fc1(x.mean((2, 3), keepdim=True))))


def over_rows_alone(self, x):
    return x * torch.sigmoid(self.fc2(self.fc1(x.mean(2, keepdim=True))))


def over_channels_in_the_end(self, x):
    return x * torch.sigmoid(self.fc2(self.fc1(x.flatten(2).mean(1, keepdim=True)[:, :, :C, None].transpose(1, 2))))


def with_a_maximum(self, x):
    return x * torch.sigmoid(self.fc2(self.fc1(x.mean((2, 3), keepdim=True) + x.amax((2, 3), keepdim=True))))


def without_a_gate(self, x):
    return x * self.fc2(self.fc1(self.pool(x)))


def two_gates(self, x):
    return x * torch.sigmoid(torch.sigmoid(self.fc2(self.fc1(self.pool(x)))))


def activation_behind(self, x):
    return x * torch.sigmoid(torch.relu(self.fc2(self.fc1(self.pool(x)))))


def pooled_to_two(self, x):
    return x[:, :, :2, :2] * torch.sigmoid(self.fc2(self.fc1(F.adaptive_avg_pool2d(x, 2))))


def shown_squeeze(self, x):
    s = self.pool(x)
    return x * torch.sigmoid(self.fc2(self.fc1(s))), s


def transposed_view(self, x):
    """Batch and channels are mixed up, which runs where they agree."""
    return x * self.excite(self.pool(x)).view(x.size(1), x.size(0), 1, 1)


@pytest.mark.parametrize(
    "forward",
    [
        *[
            only_one_layer,
            of_another_tensor,
            over_rows_alone,
            over_channels_in_the_end,
            with_a_maximum,
            without_a_gate,
            two_gates,
        ],
        *[activation_behind, pooled_to_two, shown_squeeze, transposed_view],
    ],
)
def test_what_only_looks_like_it(forward):
    report = check_patched(gated(forward), torch.cat([images()] * 3))  # as many images as channels
    assert not any("se" in site.pattern.split("-") for site in report.fused)


def test_layers_that_do_more_than_multiply():
    for spoil in (
        lambda m: m.fc1.register_forward_hook(lambda *_: None),
        lambda m: m.pool.register_forward_hook(lambda *_: None),
        lambda m: setattr(m, "fc1", nn.Conv2d(C, HIDDEN, 1, groups=3)),
        lambda m: setattr(m, "fc1", nn.Conv2d(C, HIDDEN, 1, padding=1)),
        lambda m: setattr(m, "fc2", nn.Conv2d(HIDDEN, 1, 1)),
        lambda m: setattr(m, "fc2", m.fc1),
    ):
        model = gated(torchvision)
        spoil(model)
        assert not any("se" in site.pattern.split("-") for site in explain(model).fused)


def test_a_size_that_is_used_elsewhere_stays():
    def forward(self, x):
        b, c, _, _ = x.size()
        out = x * self.excite(self.pool(x)).view(b, c, 1, 1)
        return out.view(b * c, -1)

    report = check_patched(gated(forward))
    assert [site.pattern for site in report.fused] == ["squeeze-excitation"]
    assert ".size()" in report.source("")


def test_in_a_module_of_its_own():
    torchvision_models()
    from torchvision.ops.misc import SqueezeExcitation

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.se = nn.Conv2d(4, C, 3), nn.BatchNorm2d(C), SqueezeExcitation(C, HIDDEN)

        def forward(self, x):
            return F.relu(self.se(self.bn(self.conv(x))))

    report = check_patched(Block())
    assert [(site.path, site.pattern) for site in report.fused] == [("", "conv-bn-se-relu")]
    assert report.coverage == 1.0
    alone = check_patched(nn.Sequential(nn.ReLU(), SqueezeExcitation(4, 2, nn.SiLU, nn.Hardsigmoid)))
    assert [(site.path, site.pattern) for site in alone.fused] == [("1", "squeeze-excitation")]
