"""Residual blocks whose forward and backward are one fused call, with the parameters and keys of the plain ones."""

from .init import init_weights
from .residual import BottleneckBlock, ResidualBlock

__all__ = ["BottleneckBlock", "ResidualBlock", "init_weights"]
