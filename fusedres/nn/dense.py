"""Dense blocks (Huang et al. 2017, "Densely Connected Convolutional Networks", figure 1).

Every layer reads what all layers before it made: ``x_i = H_i([x_0, x_1, ..., x_{i-1}])`` (their eq. 2), the brackets
being a concatenation along the channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..block import Act, Block, Conv, Dense, Dropout, Norm, Step, run_dense
from ..ops.activations import RELU
from .base import FusedBlock, conv1x1, conv3x3

__all__ = ["DenseBlock", "DenseBottleneckBlock", "DenseBottleneckLayer", "Transition"]


class _DenseBlock(FusedBlock):
    """A block of dense layers, one autograd node."""

    _block: Dense

    def forward(self, x: Tensor) -> Tensor:
        return run_dense(self._block, self, x, memory=self.memory)


class DenseBlock(_DenseBlock):
    """A dense block of plain layers::

        x_i = conv3x3(relu(bn([x_0, x_1, ..., x_{i-1}]))),  i = 1 ... num_layers

    with ``x_0`` the input and ``[...]`` the concatenation along the channels. The output is the concatenation of the
    input and of all layers: ``in_channels + num_layers * growth_rate`` channels. Keys: ``layers.i.0`` (norm) and
    ``layers.i.2`` (convolution); ``layers.i.1`` is the activation.

    There is no addition here, and so no ``drop_path``.

    Args:
        num_layers: how many layers.
        in_channels: channels of the input.
        growth_rate: channels that a layer adds.
        bias: whether the convolutions have one.
        memory: ``"low"`` recomputes in backward what is cheap to recompute.
    """

    def __init__(
        self, num_layers: int, in_channels: int, growth_rate: int, *, bias: bool = True, memory: str = "auto"
    ) -> None:
        super().__init__(memory)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), conv3x3(channels, growth_rate, bias=bias))
            for channels in _inputs(num_layers, in_channels, growth_rate)
        )
        self._block = Dense(tuple((Norm(f"layers.{i}.0"), Act(RELU), Conv(f"layers.{i}.2")) for i in range(num_layers)))


class DenseBottleneckLayer(FusedBlock):
    """One layer of a DenseNet-B (Huang et al. 2017, section 3, "Bottleneck layers")::

        dropout(conv2(relu(norm2(conv1(relu(norm1(x)))))))

    with a 1x1 convolution to ``bn_size * growth_rate`` channels and a 3x3 convolution to ``growth_rate``. Returns the
    new channels alone. Keys, those of torchvision's ``denselayer``: ``norm1 conv1 norm2 conv2``; its convolutions have
    no bias.

    Args:
        in_channels: channels of the input.
        growth_rate: channels of the output.
        bn_size: the bottleneck's channels over those of the output.
        dropout: the probability with which an element of the output is dropped in training.
        bias: whether the convolutions have one.
        memory: ``"low"`` recomputes in backward what is cheap to recompute.
    """

    def __init__(
        self,
        in_channels: int,
        growth_rate: int,
        bn_size: int = 4,
        dropout: float = 0.0,
        *,
        bias: bool = True,
        memory: str = "auto",
    ) -> None:
        super().__init__(memory)
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv1x1(in_channels, bn_size * growth_rate, bias=bias)
        self.norm2 = nn.BatchNorm2d(bn_size * growth_rate)
        self.conv2 = conv3x3(bn_size * growth_rate, growth_rate, bias=bias)
        self.dropout = nn.Dropout(dropout)
        self._block = Block(self.steps())

    @staticmethod
    def steps(prefix: str = "") -> tuple[Step, ...]:
        """The layer as a chain, its paths behind ``prefix``."""
        return (
            Norm(f"{prefix}norm1"),
            Act(RELU),
            Conv(f"{prefix}conv1"),
            Norm(f"{prefix}norm2"),
            Act(RELU),
            Conv(f"{prefix}conv2"),
            Dropout(f"{prefix}dropout"),
        )

    def forward(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        """The new channels, from one tensor or from several that are concatenated."""
        return super().forward(x if isinstance(x, Tensor) else torch.cat(tuple(x), 1))


class DenseBottleneckBlock(_DenseBlock):
    """A dense block of bottleneck layers, the block of DenseNet-121 and its like::

        x_i = layer_i([x_0, x_1, ..., x_{i-1}]),  i = 1 ... num_layers

    with :class:`DenseBottleneckLayer`; the output is the concatenation of the input and of all layers. Keys, those of
    torchvision's ``denseblock``: ``denselayer1.norm1``, ``denselayer1.conv1``, ... counted from 1.

    There is no addition here, and so no ``drop_path``.

    Args:
        num_layers: how many layers.
        in_channels: channels of the input.
        growth_rate: channels that a layer adds.
        bn_size, dropout, bias: of :class:`DenseBottleneckLayer`.
        memory: ``"low"`` recomputes in backward what is cheap to recompute.
    """

    def __init__(
        self,
        num_layers: int,
        in_channels: int,
        growth_rate: int,
        bn_size: int = 4,
        dropout: float = 0.0,
        *,
        bias: bool = True,
        memory: str = "auto",
    ) -> None:
        super().__init__(memory)
        names = [f"denselayer{i + 1}" for i in range(num_layers)]
        for name, channels in zip(names, _inputs(num_layers, in_channels, growth_rate)):
            self.add_module(name, DenseBottleneckLayer(channels, growth_rate, bn_size, dropout, bias=bias))
        self._block = Dense(tuple(DenseBottleneckLayer.steps(f"{name}.") for name in names))


class Transition(FusedBlock):
    """Between two dense blocks: fewer channels, and half the height and width::

        avg_pool2d(conv(relu(norm(x))), 2)

    with a 1x1 convolution (Huang et al. 2017, section 3, "Pooling layers" and "Compression"). Keys, those of
    torchvision's ``transition``: ``norm conv``; its convolution has no bias.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output; half of the input's if left out, as in a DenseNet-C.
        bias: whether the convolution has one.
        memory: ``"low"`` recomputes in backward what is cheap to recompute.
    """

    def __init__(
        self, in_channels: int, out_channels: int | None = None, *, bias: bool = True, memory: str = "auto"
    ) -> None:
        super().__init__(memory)
        out_channels = in_channels // 2 if out_channels is None else out_channels
        self.norm = nn.BatchNorm2d(in_channels)
        self.conv = conv1x1(in_channels, out_channels, bias=bias)
        self._block = Block((Norm("norm"), Act(RELU), Conv("conv")))

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(super().forward(x), 2)


def _inputs(num_layers: int, in_channels: int, growth_rate: int) -> range:
    """The channels that each layer reads."""
    for name, value in (("num_layers", num_layers), ("growth_rate", growth_rate)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    return range(in_channels, in_channels + num_layers * growth_rate, growth_rate)
