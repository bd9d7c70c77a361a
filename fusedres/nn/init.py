"""How convolutional residual networks are initialised."""

from __future__ import annotations

from torch import nn

__all__ = ["init_weights"]


def init_weights(module: nn.Module, *, mode: str = "fan_out", zero_last_gamma: bool = False) -> None:
    """Initialises ``module`` and everything below it, in place.

    Convolutions by He et al. (2015, "Delving Deep into Rectifiers", eq. 10 and 14), their biases by zero, batch norms
    by one and zero; whatever else there is keeps its initialisation.

    Args:
        mode: what the variance of a convolution's weights is ``2`` over: ``"fan_out"`` or ``"fan_in"``.
        zero_last_gamma: whether the last batch norm of every residual block starts from gamma = 0, so that the block
            starts as its shortcut (Goyal et al. 2017, "Accurate, Large Minibatch SGD", section 5.1). A residual block
            is a module with an attribute ``shortcut`` or ``downsample``, and its batch norms are its children.
    """
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode=mode, nonlinearity="relu")
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, nn.BatchNorm2d) and m.affine:
            nn.init.ones_(m.weight)
            nn.init.zeros_(m.bias)
    if zero_last_gamma:
        for m in module.modules():
            _zero_last_gamma(m)


def _zero_last_gamma(module: nn.Module) -> None:
    if not (hasattr(module, "shortcut") or hasattr(module, "downsample")):
        return
    norms = [child for child in module.children() if isinstance(child, nn.BatchNorm2d) and child.affine]
    if norms:
        nn.init.zeros_(norms[-1].weight)
