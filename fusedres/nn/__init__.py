"""Residual blocks whose forward and backward are one fused call, with the parameters and keys of the plain ones."""

from .gated import HighwaySkip, IdentitySkip, ProjectionSkip, SparseSkip
from .init import init_weights
from .ode import ODEBlock
from .residual import BottleneckBlock, ResidualBlock

__all__ = [
    "BottleneckBlock",
    "HighwaySkip",
    "IdentitySkip",
    "ODEBlock",
    "ProjectionSkip",
    "ResidualBlock",
    "SparseSkip",
    "init_weights",
]
