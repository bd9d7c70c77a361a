"""The two networks of the survey of residual networks, as written there, from the blocks of ``fusedres.nn``.

Their keys are those of the survey's code. The blocks and the stem are fused as they are; there is nothing to patch.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..block import Act, Block, Conv, Norm, run
from ..nn.residual import BottleneckBlock, ResidualBlock
from ..ops.activations import RELU

__all__ = ["MyResNet", "SurveyResNet"]

_STEM = Block((Conv("0"), Norm("1"), Act(RELU)))


class MyResNet(nn.Module):
    """A stem and residual blocks, all of the same width; returns features ``[N, hidden_channels, H, W]``.

    Keys: ``stem.0 stem.1 layers.i`` with those of :class:`fusedres.nn.ResidualBlock`.

    Args:
        in_channels: of the images.
        hidden_channels: of the blocks.
        num_blocks: how many there are.
    """

    def __init__(self, in_channels: int, hidden_channels: int, num_blocks: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, hidden_channels, 3, padding=1), nn.BatchNorm2d(hidden_channels), nn.ReLU()
        )
        self.layers = nn.ModuleList(ResidualBlock(hidden_channels) for _ in range(num_blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = run(_STEM, self.stem, x)
        for layer in self.layers:
            x = layer(x)
        return x


class SurveyResNet(nn.Module):
    """The survey's ``ResNet``: bottlenecks in four stages, of 3, 4, 6 and 3.

    It differs from ResNet-50: convolutions have biases, and the first stage halves the image too, so that its last
    features are 4 x 4 for an image of 224 x 224, not 7 x 7. Keys: ``stem.0 stem.1 layer1.i`` to ``layer4.i`` with
    those of :class:`fusedres.nn.BottleneckBlock`, ``fc``.

    Args:
        num_classes: of the classifier.
        channels: of the stem and of the four stages; the survey's by default.
        blocks: how many each stage has.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        channels: tuple[int, int, int, int, int] = (64, 256, 512, 1024, 2048),
        blocks: tuple[int, int, int, int] = (3, 4, 6, 3),
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels[0], 7, stride=2, padding=3),
            nn.BatchNorm2d(channels[0]),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        self.layer1 = _stage(channels[0], channels[1], blocks[0])
        self.layer2 = _stage(channels[1], channels[2], blocks[1])
        self.layer3 = _stage(channels[2], channels[3], blocks[2])
        self.layer4 = _stage(channels[3], channels[4], blocks[3])
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(channels[4], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem[3](run(_STEM, self.stem, x))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


def _stage(in_channels: int, out_channels: int, count: int) -> nn.Sequential:
    first = BottleneckBlock(in_channels, out_channels, stride=2)
    return nn.Sequential(first, *(BottleneckBlock(out_channels, out_channels) for _ in range(1, count)))
