"""Comparing one of our networks with another implementation of it."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from fusedres.patch import patch
from fusedres.testing import channels_last, compare

__all__ = ["assert_agrees"]


def assert_agrees(
    theirs: nn.Module, ours: Callable[[], nn.Module], *, fused: bool, training: bool, size: int = 48, channels: int = 3
) -> None:
    """Outputs, gradients and buffers of ``ours()``, with the state of ``theirs``, are within the float64 budget.

    Args:
        theirs: a network with the same keys.
        ours: makes our network, not fused.
        fused: whether to patch it.
        size: height and width of the images.
    """

    def fuse(stock: nn.Module) -> nn.Module:
        model = ours().train(training)
        assert list(model.state_dict()) == list(stock.state_dict())
        model.load_state_dict(stock.state_dict())
        if fused:
            patch(model)
        return model.to(next(stock.parameters()).dtype)

    inputs = lambda seed: [channels_last((4, channels, size, size), seed=seed)]  # noqa: E731
    compare(theirs.train(training), fuse, inputs).check()
