"""Stock: the same block from PyTorch's own ops."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules._functions import SyncBatchNorm

from ..ops.activations import IDENTITY
from ..ops.conv import conv_fprop
from .pending import excitation, survivors
from .program import GainSlot, Link, NormSlot, Operands, Program
from .training import BlockFunction


def execute_stock(program: Program, x: Tensor, residual: Tensor | None, tensors: Operands) -> Tensor:
    """The block in plain PyTorch, differentiated by autograd: what a block means, and what it falls back to."""
    branch = program.branch
    if program.shares:
        x = _stock_value(branch[0], x, tensors)
        branch = (Link(None, IDENTITY, branch[0].conv), *branch[1:])
    out = stock_chain(branch, x, tensors)
    if program.shortcut is None:
        return out
    side = stock_chain(program.shortcut, x if residual is None else residual, tensors)
    return program.act((out + side).to(out.dtype) if program.in_place else out + side)


def stock_dense(layers: tuple[tuple[Link, ...], ...], x: Tensor, tensors: Operands) -> Tensor:
    """A dense block by concatenation."""
    features = [x]
    for layer in layers:
        features.append(stock_chain(layer, torch.cat(features, 1), tensors))
    return torch.cat(features, 1)


def stock_chain(chain: tuple[Link, ...], x: Tensor, tensors: Operands) -> Tensor:
    for link in chain:
        x = _stock_value(link, x, tensors)
        if link.conv is not None:
            x = conv_fprop(x, tensors[link.conv.first], tensors[link.conv.first + 1], link.conv.geometry)
    return x


def _stock_value(link: Link, x: Tensor, tensors: Operands) -> Tensor:
    if link.norm is not None:
        x = _stock_norm(link.norm, x, tensors)
    if link.gain is not None:
        x = _stock_gain(link.gain, x, tensors)
    if link.act != IDENTITY:
        x = link.act(x)
    if link.dropout:
        x = F.dropout(x, link.dropout)
    if link.pool is not None:
        kernel, stride, padding, ceil = link.pool
        x = F.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil)
    return x


def _stock_gain(slot: GainSlot, x: Tensor, tensors: Operands) -> Tensor:
    if slot.excite is not None:
        gate = excitation(slot.excite, x.mean((2, 3)), tensors[slot.excite.first : slot.excite.first + 4])
        x = x * gate[:, :, None, None]
    if slot.mask is not None:
        return slot.mask.drawn(x)
    mask = survivors(x, slot)
    return x if mask is None else x * mask[:, :, None, None].to(x.dtype)


def _stock_norm(norm: NormSlot, x: Tensor, tensors: Operands) -> Tensor:
    gamma, beta, mean, var = tensors[norm.first : norm.first + 4]
    if norm.group is not None:
        return _stock_synchronised(norm, x, gamma, beta, mean, var)
    return F.batch_norm(x, mean, var, gamma, beta, norm.batch_statistics, norm.momentum, norm.eps)


def _stock_synchronised(norm: NormSlot, x: Tensor, *operands: Tensor | None) -> Tensor:
    """PyTorch's own, which is for accelerators alone; on the CPU the engine, for this one norm."""
    if x.device.type == "cpu":
        alone = Program((Link(norm._replace(first=0), IDENTITY, None),), None, IDENTITY, backend="reference")
        return BlockFunction.apply(alone, x, None, *operands)
    world_size = torch.distributed.get_world_size(norm.group)
    return SyncBatchNorm.apply(x, *operands, norm.eps, norm.momentum, norm.group, world_size)
