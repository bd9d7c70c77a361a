"""Studies of residual networks: gradients, depth, Jacobians, cost, memory traffic, and the link to ODEs.

Each is a function that returns plain data, and a command of ``python -m fusedres`` that prints and plots it.
"""

from .blocks import blocks_of
from .degradation import degradation
from .depth import deep_training
from .devices import DEVICES, Device
from .gradient_flow import gradient_flow
from .jacobian_identity import jacobian_identity
from .memory import memory, saved_activations
from .networks import depth_network
from .params_flops import block_types, params_flops
from .residual_as_ode import residual_as_ode
from .traffic import traffic

__all__ = [
    "DEVICES",
    "Device",
    "block_types",
    "blocks_of",
    "deep_training",
    "degradation",
    "depth_network",
    "gradient_flow",
    "jacobian_identity",
    "memory",
    "params_flops",
    "residual_as_ode",
    "saved_activations",
    "traffic",
]
