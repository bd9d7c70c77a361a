"""Sums of two tensors as the joins of residual blocks: what the families of residual blocks share.

A family says which blocks a sum may be, best first; the first that the engine can run is taken. What its branch leaves
of the run that leads to the sum is fused as a chain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import fx

from ...block import Act, Block, Conv, Dropout, DropPath, Mask, Norm, SqueezeExcite, Step
from ...ops.activations import IDENTITY, Activation
from ..steps import Addition
from ..view import Chain, Region, View
from .chain import longest

__all__ = ["Candidates", "Sum", "find_sums", "with_argument", "with_pending", "with_shortcut"]


@dataclass(frozen=True)
class Sum:
    """An addition with what leads to it and what follows.

    Args:
        left, right: the runs of steps that end with its operands.
        in_place: whether it is written ``left += right``.
        tail: the activation that alone reads it; empty where there is none.
    """

    node: fx.Node
    left: Chain
    right: Chain
    in_place: bool
    tail: Chain

    @property
    def sides(self) -> tuple[tuple[Chain, Chain], tuple[Chain, Chain]]:
        """The two runs as branch and shortcut and the other way round, the one with more convolutions first."""
        left, right = self.left, self.right
        return (
            ((left, right), (right, left))
            if left.convolutions >= right.convolutions
            else ((right, left), (left, right))
        )

    @property
    def act(self) -> Activation:
        return self.tail.steps[0].activation if self.tail.steps else IDENTITY


Candidates = Callable[[View, Sum], Iterator[tuple[Chain, Region]]]
"""The regions that a sum may be, best first, each with what is left of the run before it."""


def find_sums(view: View, candidates: Candidates, of: type[Step] = Conv) -> Iterator[Region]:
    """The regions of all sums for which there is a candidate that the engine can run.

    Args:
        of: the step that one of the runs to a sum has to have.
    """
    for node, addition in view.additions():
        left, right = view.chain_into(addition.left), view.chain_into(addition.right)
        if not any(isinstance(step, of) for step in (*left.steps, *right.steps)):
            continue
        found = Sum(node, left, right, addition.in_place, view.activation_after(node))
        before, region, reason = _first(view, addition, found, candidates)
        if region is not None:
            yield region
            yield from longest(view, before)
        elif reason:
            view.decline((*left.nodes, *right.nodes), f"the addition {node.name} is not fused: {reason}")


def _first(view: View, addition: Addition, found: Sum, candidates: Candidates) -> tuple[Chain, Region | None, str]:
    """The first candidate that the engine can run, or the reason why the best of them cannot be run."""
    if found.in_place and not view.written_by(found.node) <= set(found.left.nodes):
        return found.left, None, f"it writes into {addition.left.name}, which others may still see"
    for operand in (addition.left, addition.right):
        # The engine would leave such a sum, and the whole block with it, to stock PyTorch at every call.
        of_call = operand.op in ("call_function", "call_method")
        if operand.op == "get_attr" or (of_call and operand.target in ("mean", torch.mean)):
            return found.left, None, f"{operand.name} is broadcast"
    reasons = []
    for before, region in candidates(view, found):
        reason = view.problem(region)
        if reason is None:
            return before, region, ""
        reasons.append(reason)
    return found.left, None, reasons[0] if reasons else ""


def with_shortcut(family: str, found: Sum, branch: Chain, other: Chain) -> Iterator[Region]:
    """``branch(x) + other(x)``, where both read the same tensor."""
    if other.entry is branch.entry:
        kind = "projection" if other.steps else "identity"
        block = Block(branch.steps, other.steps, found.act, in_place=_keeps_dtype(found, branch))
        nodes = (*other.nodes, *branch.nodes, found.node, *found.tail.nodes)
        yield Region(_name(family, kind, block), block, (branch.entry,), nodes)


def with_pending(family: str, view: View, found: Sum, branch: Chain, other: Chain) -> Iterator[Region]:
    """``branch(p) + other(p)`` with ``p = act(norm(x))``, which nothing else reads."""
    if other.entry is not branch.entry or not isinstance(branch.steps[0], Conv):
        return
    head = view.chain_into(branch.entry, frozenset((*branch.nodes, *other.nodes, found.node)))
    if not head.steps or not all(isinstance(step, (Norm, Act)) for step in head.steps):
        return
    kind = "projection of the activated input" if other.steps else "activated identity"
    in_place = _keeps_dtype(found, branch)
    block = Block((*head.steps, *branch.steps), other.steps, found.act, residual="pending", in_place=in_place)
    nodes = (*head.nodes, *other.nodes, *branch.nodes, found.node, *found.tail.nodes)
    yield Region(_name(family, kind, block), block, (head.entry,), nodes)


def with_argument(family: str, found: Sum, branch: Chain, other: Chain) -> Iterator[Region]:
    """``branch(x) + other``, where the other operand is made elsewhere, with the convolutions at its end or without."""
    in_place = _keeps_dtype(found, branch)
    if other.convolutions:
        block = Block(branch.steps, other.steps, found.act, residual="argument", in_place=in_place)
        nodes = (*other.nodes, *branch.nodes, found.node, *found.tail.nodes)
        yield Region(_name(family, "projection of a second input", block), block, (branch.entry, other.entry), nodes)
    block = Block(branch.steps, (), found.act, residual="argument", in_place=in_place)
    nodes = (*branch.nodes, found.node, *found.tail.nodes)
    yield Region(_name(family, "second input", block), block, (branch.entry, other.end), nodes)


def _keeps_dtype(found: Sum, branch: Chain) -> bool:
    """``left += right`` keeps the dtype of its left side, which autocast may have made narrower."""
    return found.in_place and branch.end is found.left.end


_EXTRAS: tuple[tuple[Callable[[Step], bool], str], ...] = (
    (lambda s: isinstance(s, SqueezeExcite), "squeeze-excitation"),
    (lambda s: isinstance(s, DropPath) or (isinstance(s, Mask) and not s.channels), "stochastic depth"),
    (lambda s: isinstance(s, Mask) and s.channels, "dropout of channels"),
    (lambda s: isinstance(s, Dropout), "dropout"),
)


def _name(family: str, kind: str, block: Block) -> str:
    """``family (kind, what else is in the branch)``"""
    extras = [name for is_one, name in _EXTRAS if any(map(is_one, block.branch))]
    return f"{family} ({', '.join([kind, *extras])})"
