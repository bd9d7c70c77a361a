"""What all blocks of ``fusedres.nn`` share: they hold modules and a description; the engine runs it.

A block's parameters and ``state_dict`` keys are those of the plain PyTorch block that its docstring spells out, so that
a checkpoint of one loads into the other. Its forward is one call into the engine, its backward one autograd node; the
modules inside hold parameters and settings, and are not called.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..block import Block, Conv, Dense, DropPath, Norm, Step, run
from ..ops.activations import IDENTITY, Activation
from .stochastic_depth import StochasticDepth

__all__ = ["FusedBlock", "ResidualJoin", "conv1x1", "conv3x3", "middle_channels", "shortcut_of"]


def conv1x1(in_channels: int, out_channels: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 1, stride, bias=bias)


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, bias: bool = True, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, groups=groups, bias=bias)


def middle_channels(out_channels: int, expansion: int) -> int:
    """The channels in the middle of a bottleneck."""
    if out_channels < expansion:
        raise ValueError(f"out_channels must be at least {expansion}, the expansion, got {out_channels}")
    return out_channels // expansion


class FusedBlock(nn.Module):
    """A module that the engine runs by its description, which a subclass stores as ``_block`` when it is built.

    Args:
        memory: ``"low"`` recomputes in backward what is cheap to recompute.
    """

    _block: Block | Dense

    def __init__(self, memory: str) -> None:
        super().__init__()
        if memory not in ("auto", "low"):
            raise ValueError(f"memory must be 'auto' or 'low', got {memory!r}")
        self.memory = memory

    def forward(self, x: Tensor) -> Tensor:
        return run(self._block, self, x, memory=self.memory)


class ResidualJoin(FusedBlock):
    """A block that ends with ``act(branch(x) + shortcut(x))``."""

    def _join(
        self,
        branch: tuple[Step, ...],
        shortcut: str,
        act: Activation = IDENTITY,
        *,
        drop_path: float,
        residual: str = "input",
        in_place: bool = True,
    ) -> None:
        """Describes the block; the last thing that a constructor does.

        Args:
            branch: its steps, without the stochastic depth that ends it.
            shortcut: the name of the child that :func:`shortcut_of` made.
            act, in_place: as in :class:`fusedres.block.Block`.
            drop_path: the probability with which a sample's branch is dropped in training.
            residual: what a projection reads, as in :class:`fusedres.block.Block`; the identity reads the input.
        """
        if not 0 <= drop_path <= 1:
            raise ValueError(f"drop_path must be between 0 and 1, got {drop_path}")
        if drop_path:
            self.drop_path = StochasticDepth(drop_path)
            branch = (*branch, DropPath("drop_path"))
        projection = _steps(shortcut, getattr(self, shortcut))
        self._block = Block(branch, projection, act, residual if projection else "input", in_place)


def shortcut_of(in_channels: int, out_channels: int, stride: int, *, bias: bool, norm: bool = False) -> nn.Module:
    """An empty ``nn.Sequential``, the identity, where input and output agree in shape; otherwise a projection: a 1x1
    convolution, with a batch norm behind it if ``norm``."""
    if stride == 1 and in_channels == out_channels:
        return nn.Sequential()
    conv = conv1x1(in_channels, out_channels, stride, bias)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels)) if norm else conv


def _steps(path: str, shortcut: nn.Module) -> tuple[Step, ...]:
    if isinstance(shortcut, nn.Conv2d):
        return (Conv(path),)
    return (Conv(f"{path}.0"), Norm(f"{path}.1")) if len(shortcut) else ()
