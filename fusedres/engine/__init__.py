"""The engine: runs any block, forward and backward, on any backend.

**A normalised tensor is never stored.** A batch norm followed by an activation is, per channel,
``z = act(scale[c] * y + shift[c])``, with ``y`` the raw output of a convolution. Between two convolutions the engine
carries a *pending* value: the raw tensor, its affine, its activation, none of it applied yet; whoever reads the value
next applies it. Autograd keeps the raw tensors and four numbers per channel, and backward recomputes the rest.

A chain is a tuple of :class:`Link`: pending value, convolution, pending value, convolution, ..., pending value. A block
is a chain, the branch; perhaps a second one, the shortcut, a single plain link where it is the identity; and an
activation behind their sum. What else a block may have is pending too: a *gain* per sample and channel, which is
squeeze-excitation's gate or stochastic depth's mask, between the norm and the activation, and a dropout behind the
activation. Every op here comes from :func:`fusedres.select.kernels`.
"""

from ..ops.excite import GATES
from .dense import DenseProgram
from .execution import execute, execute_dense
from .program import IDENTITY_SHORTCUT, ConvSlot, ExciteSlot, GainSlot, Link, MaskSlot, NormSlot, Program, is_constant
from .stock import execute_stock
from .synchronised import group_of

__all__ = [
    "GATES",
    "IDENTITY_SHORTCUT",
    "ConvSlot",
    "DenseProgram",
    "ExciteSlot",
    "GainSlot",
    "Link",
    "MaskSlot",
    "NormSlot",
    "Program",
    "execute",
    "execute_dense",
    "execute_stock",
    "group_of",
    "is_constant",
]
