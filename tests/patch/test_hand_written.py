"""Networks in the styles in which people write them for themselves: what is found in them, and the same numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import check_patched, images
from .chance import check_seeded


def conv3x3(c_in: int, c_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)


class Lambda(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x)


class PaddedShortcut(nn.Module):
    """He et al.'s option A: the shortcut skips pixels and pads channels."""

    def __init__(self, c_in: int = 4, c_out: int = 8, stride: int = 2) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(c_in, c_out, stride), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = conv3x3(c_out, c_out), nn.BatchNorm2d(c_out)
        pad = (c_out - c_in) // 2
        self.shortcut = Lambda(lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, pad, pad), "constant", 0))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class PooledPadding(PaddedShortcut):
    """The same with pooling, and zeros that are made and concatenated."""

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        side = F.avg_pool2d(x, 2)
        side = torch.cat((side, torch.zeros_like(side)), 1)
        return F.relu(out + side)


class Expanding(nn.Module):
    """A bottleneck whose shortcut is empty unless it must not be, and whose class has the expansion."""

    expansion = 2

    def __init__(self, c_in: int = 4, planes: int = 4, stride: int = 2) -> None:
        super().__init__()
        c_out = planes * self.expansion
        self.residual_function = nn.Sequential(
            nn.Conv2d(c_in, planes, 1, bias=False),
            nn.BatchNorm2d(planes),
            nn.ReLU(inplace=True),
            conv3x3(planes, planes, stride),
            nn.BatchNorm2d(planes),
            nn.ReLU(inplace=True),
            nn.Conv2d(planes, c_out, 1, bias=False),
            nn.BatchNorm2d(c_out),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x):
        return nn.ReLU(inplace=True)(self.residual_function(x) + self.shortcut(x))


class PreActivation(nn.Module):
    """The shortcut is there or not, and reads the activated input."""

    def __init__(self, c_in: int = 4, c_out: int = 8, stride: int = 2) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(c_in), conv3x3(c_in, c_out, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(c_out), conv3x3(c_out, c_out)
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False))

    def forward(self, x):
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        out += shortcut
        return out


class Wide(nn.Module):
    """Dropout as a function, and the convolution of the shortcut under a condition in one expression."""

    def __init__(self, c_in: int = 4, c_out: int = 8, stride: int = 2, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.bn1, self.relu1, self.conv1 = nn.BatchNorm2d(c_in), nn.ReLU(inplace=True), conv3x3(c_in, c_out, stride)
        self.bn2, self.relu2, self.conv2 = nn.BatchNorm2d(c_out), nn.ReLU(inplace=True), conv3x3(c_out, c_out)
        self.drop_rate, self.equal = drop_rate, c_in == c_out
        self.conv_shortcut = ((not self.equal) and nn.Conv2d(c_in, c_out, 1, stride, bias=False)) or None

    def forward(self, x):
        if not self.equal:
            x = self.relu1(self.bn1(x))
        else:
            out = self.relu1(self.bn1(x))
        out = self.relu2(self.bn2(self.conv1(out if self.equal else x)))
        if self.drop_rate > 0:
            out = F.dropout(out, p=self.drop_rate, training=self.training)
        out = self.conv2(out)
        return torch.add(x if self.equal else self.conv_shortcut(x), out)


class Excited(nn.Module):
    """Squeeze-and-excitation inline, with a mean that is one on square images alone, so that its sum stays as it is."""

    def __init__(self, c: int = 8) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(c, c), nn.BatchNorm2d(c)
        self.conv2, self.bn2 = conv3x3(c, c), nn.BatchNorm2d(c)
        self.fc1, self.fc2 = nn.Conv2d(c, c // 4, 1), nn.Conv2d(c // 4, c, 1)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        w = F.avg_pool2d(out, out.size(2))
        w = F.relu(self.fc1(w))
        w = F.sigmoid(self.fc2(w))
        out = out * w
        out += x
        return F.relu(out)


def shuffle(x: Tensor, groups: int) -> Tensor:
    n, c, h, w = x.size()
    return x.view(n, groups, c // groups, h, w).permute(0, 2, 1, 3, 4).reshape(n, c, h, w)


class Shuffled(nn.Module):
    """Half of the channels goes through, the channels are shuffled."""

    def __init__(self, c: int = 8) -> None:
        super().__init__()
        half = c // 2
        self.conv1, self.bn1 = nn.Conv2d(half, half, 1, bias=False), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = nn.Conv2d(half, half, 3, 1, 1, groups=half, bias=False), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = nn.Conv2d(half, half, 1, bias=False), nn.BatchNorm2d(half)

    def forward(self, x):
        x1, x2 = x.chunk(2, dim=1)
        out = F.relu(self.bn1(self.conv1(x2)))
        out = self.bn2(self.conv2(out))
        out = F.relu(self.bn3(self.conv3(out)))
        return shuffle(torch.cat([x1, out], 1), 2)


class Inverted(nn.Module):
    """Three attributes called conv, branches chosen by the stride."""

    def __init__(self, c: int = 8, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.conv1, self.bn1 = nn.Conv2d(c, 2 * c, 1, bias=False), nn.BatchNorm2d(2 * c)
        self.conv2 = nn.Conv2d(2 * c, 2 * c, 3, stride, 1, groups=2 * c, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * c)
        self.conv3, self.bn3 = nn.Conv2d(2 * c, c, 1, bias=False), nn.BatchNorm2d(c)

    def forward(self, x):
        out = F.relu6(self.bn1(self.conv1(x)))
        out = F.relu6(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return out + x if self.stride == 1 else out


class Aggregated(nn.Module):
    """ResNeXt as it was first drawn: a list of branches that are added up."""

    def __init__(self, c: int = 8, branches: int = 3) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), conv3x3(4, c), nn.BatchNorm2d(c))
            for _ in range(branches)
        )

    def forward(self, x):
        return F.relu(x + sum(branch(x) for branch in self.branches))


class ZeroPadded(nn.Module):
    """PyramidNet: the shortcut gets channels of zeros; a batch norm comes last."""

    def __init__(self, c_in: int = 4, c_out: int = 6) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(c_in), conv3x3(c_in, c_out)
        self.bn2, self.conv2, self.bn3 = nn.BatchNorm2d(c_out), conv3x3(c_out, c_out), nn.BatchNorm2d(c_out)

    def forward(self, x):
        out = self.bn3(self.conv2(F.relu(self.bn2(self.conv1(self.bn1(x))))))
        if out.shape[1] != x.shape[1]:
            zeros = torch.zeros(x.size(0), out.size(1) - x.size(1), x.size(2), x.size(3), dtype=x.dtype)
            x = torch.cat((x, zeros), 1)
        return out + x


class Dropping(nn.Module):
    """Stochastic depth that flips one coin for the whole batch, by Python's own choice in training."""

    def __init__(self, c: int = 8) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(c, c), nn.BatchNorm2d(c)
        self.conv2, self.bn2 = conv3x3(c, c), nn.BatchNorm2d(c)

    def branch(self, x):
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))

    def forward(self, x):
        if self.training:
            if torch.rand(1).item() < 0.5:
                return F.relu(x)
            return F.relu(x + self.branch(x))
        return F.relu(x + 0.5 * self.branch(x))


class UNet(nn.Module):
    """Double convolutions, concatenated skips, differences of sizes that are padded away."""

    def __init__(self, c: int = 4) -> None:
        super().__init__()
        self.inc, self.down = self.twice(c, c), self.twice(c, 2 * c)
        self.up, self.out = nn.ConvTranspose2d(2 * c, c, 2, 2), nn.Sequential(self.twice(2 * c, c), nn.Conv2d(c, 2, 1))

    @staticmethod
    def twice(c_in: int, c_out: int) -> nn.Sequential:
        half = (conv3x3(c_in, c_out), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))
        return nn.Sequential(*half, conv3x3(c_out, c_out), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))

    def forward(self, x):
        first = self.inc(x)
        up = self.up(self.down(F.max_pool2d(first, 2)))
        dy, dx = first.size()[2] - up.size()[2], first.size()[3] - up.size()[3]
        up = F.pad(up, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])
        return self.out(torch.cat([first, up], dim=1))


class Network(nn.Module):
    """The whole of it: a stem, stages made by a method, a head, blocks in a plain loop."""

    def __init__(self, block, blocks=(2, 2)) -> None:
        super().__init__()
        self.in_planes = 4
        self.conv1, self.bn1 = conv3x3(3, 4), nn.BatchNorm2d(4)
        self.layer1 = self._make_layer(block, 4, blocks[0], 1)
        self.layer2 = self._make_layer(block, 8, blocks[1], 2)
        self.linear = nn.Linear(8, 3)

    def _make_layer(self, block, planes, num_blocks, stride):
        layers = []
        for s in [stride] + [1] * (num_blocks - 1):
            layers.append(block(self.in_planes, planes, s))
            self.in_planes = planes
        return nn.Sequential(*layers)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        for layer in (self.layer1, self.layer2):
            for block in layer:
                out = block(out)
        out = F.avg_pool2d(out, out.size()[3])
        out = out.view(out.size(0), -1)
        return self.linear(out)


BLOCKS = {
    "option A": (PaddedShortcut, 4, "post-activation residual (second input)", 1.0),
    "option A, pooled": (PooledPadding, 4, "post-activation residual (second input)", 1.0),
    "expanding": (Expanding, 4, "post-activation residual (projection)", 1.0),
    "pre-activation": (PreActivation, 4, "pre-activation residual (projection of the activated input)", 1.0),
    "pre-activation, identity": (lambda: PreActivation(4, 4, 1), 4, "pre-activation residual (identity)", 1.0),
    "wide": (Wide, 4, "pre-activation residual (projection of the activated input)", 1.0),
    "wide, identity": (lambda: Wide(4, 4, 1), 4, "pre-activation residual (identity)", 1.0),
    "wide, dropout": (lambda: Wide(4, 4, 1, 0.0), 4, "pre-activation residual (identity)", 1.0),
    "excited": (Excited, 8, "conv-bn-relu-conv-bn", 1.0),
    "shuffled": (Shuffled, 8, "conv-bn-relu-conv-bn-conv-bn-relu", 1.0),
    "inverted": (Inverted, 8, "linear residual (identity)", 1.0),
    "inverted, strided": (lambda: Inverted(8, 2), 8, "conv-bn-relu6-conv-bn-relu6-conv-bn", 1.0),
    "aggregated": (Aggregated, 8, "residual", 1.0),
    "unet": (UNet, 4, "conv-bn-relu", 0.8),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_block(name):
    make, channels, pattern, coverage = BLOCKS[name]
    report = check_patched(make(), images(channels, 8))
    assert report.coverage >= coverage, str(report)
    assert any(pattern in site.pattern for site in report.fused), [site.pattern for site in report.fused]


@pytest.mark.parametrize("block", [ZeroPadded, Dropping])
def test_what_cannot_be_traced_keeps_its_numbers(block):
    report = check_seeded(block(), images(4 if block is ZeroPadded else 8, 8))
    assert report.fused == ()
    assert all(d.reason for d in report.declined)


@pytest.mark.parametrize("block", [Wide, PreActivation])
def test_network(block):
    report = check_patched(Network(block), images(3, 8))
    assert report.coverage == 1.0
