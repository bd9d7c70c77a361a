"""Residual blocks whose forward and backward are one fused call, with the parameters and keys of the plain ones."""

from .dense import DenseBlock, DenseBottleneckBlock, DenseBottleneckLayer, Transition
from .gated import HighwaySkip, IdentitySkip, ProjectionSkip, SparseSkip
from .init import init_weights
from .ode import ODEBlock
from .preact import PreActBottleneckBlock, PreActResidualBlock
from .residual import BottleneckBlock, ResidualBlock
from .resnext import ResNeXtBlock, ResNeXtBottleneckBlock
from .se import SEBlock, SEBottleneckBlock
from .stochastic_depth import StochasticDepth
from .wide import WideResidualBlock

__all__ = [
    "BottleneckBlock",
    "DenseBlock",
    "DenseBottleneckBlock",
    "DenseBottleneckLayer",
    "HighwaySkip",
    "IdentitySkip",
    "ODEBlock",
    "PreActBottleneckBlock",
    "PreActResidualBlock",
    "ProjectionSkip",
    "ResNeXtBlock",
    "ResNeXtBottleneckBlock",
    "ResidualBlock",
    "SEBlock",
    "SEBottleneckBlock",
    "SparseSkip",
    "StochasticDepth",
    "Transition",
    "WideResidualBlock",
    "init_weights",
]
