"""Blocks in the graphs of ``torch.compile``: the engine's own ops, which a compiler places among those that it makes.

The compiler follows how a block is bound to its modules, and guards its graph by what is read on the way: modes and
settings, and that modules are what they were. What the engine then makes of the program it does not follow but record,
op by op, forward and backward. So training has the engine's ops in the compiler's graph, with its memory planned; in
inference a block is one op, see :mod:`fusedres.engine.graph`.

Export keeps stock PyTorch's ops.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from .binding import FollowedBinder, NotOurs, module_at
from .engine import DenseProgram, execute, execute_dense
from .engine.graph import as_constants, from_constants
from .engine.program import is_synchronised

if TYPE_CHECKING:
    from .block import Block, Dense

__all__ = ["is_compiled", "is_transformed", "run"]


def is_compiled() -> bool:
    """Whether ``torch.compile`` traces this call, for itself."""
    return torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()


def is_transformed() -> bool:
    """Whether ops are differentiated by more than autograd's backward: by ``torch.func``, or in forward mode."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def run(
    block: Block | Dense, root: nn.Module, x: Tensor, residual: Tensor | None, backend: str, memory: str
) -> Tensor | None:
    """The block's result in the graph that is being traced; ``None`` where its modules are to be called instead.

    Compilers trace this.
    """
    if not _record_in_graphs() or not all(_is_image(t) for t in (x, residual) if t is not None):
        return None
    if any(_averages(root, link.norm) or link.mask is not None for link in block.plans):
        return None
    binder = FollowedBinder(root)
    try:
        program = block.bound(binder, memory, backend)
    except NotOurs:
        return None
    # Statistics that processes share are for them to exchange.
    if is_synchronised(program.links) or not binder.suits(x.device, x.dtype):
        return None
    binder.count_batch()
    return _recorded(as_constants(program), x, residual, *binder.tensors)


def _record_in_graphs() -> bool:
    """Has the compiler record what :func:`_recorded` calls, not follow it; ``False`` where others want to see modules.

    The compiler calls this while it traces; by then it is loaded, which takes a second.
    """
    torch.compiler.allow_in_graph(_recorded)
    return not (_has_any_global_hook() or is_transformed())


_record_in_graphs._dynamo_marked_constant = True  # as torch.compiler.assume_constant_result does, which loads it


def _is_image(x: Tensor) -> bool:
    return type(x) is Tensor and x.dim() == 4 and x.is_floating_point() and not x.is_meta


def _averages(root: nn.Module, norm: tuple[str, ...] | None) -> bool:
    """Whether a norm's momentum is ``None``: then it is another number in every batch, and here it would be one.

    What has been put in the norm's place since may have none.
    """
    return norm is not None and getattr(module_at(root, norm), "momentum", 0.0) is None


def _recorded(constants: tuple[Any, ...], x: Tensor, residual: Tensor | None, *tensors: Tensor | None) -> Tensor:
    """The engine on what the compiler has in the place of tensors."""
    program = from_constants(constants)
    if isinstance(program, DenseProgram):
        return execute_dense(program, x, tensors)
    return execute(program, x, residual, tensors)
