"""Post-activation residual blocks: ``act(branch(x) + shortcut(x))``, however the sum is written.

====================================  =========================================  ====================
written                               becomes                                    name in the report
====================================  =========================================  ====================
``branch(x) + x``                     ``Block(branch, shortcut=())``             identity
``branch(x) + projection(x)``         ``Block(branch, shortcut=projection)``     projection
``branch(x) + other``                 ``Block(branch, (), residual="argument")``  second input
====================================  =========================================  ====================

Preconditions: the branch begins with a convolution, and each of its values is read by the next step alone; an in-place
sum writes into a value that the block itself produced. Steps that precede the first convolution of the branch stay
outside, as does whatever the other operand is made of where it does not come from the branch's own input.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from ...block import Block
from ...ops.activations import IDENTITY
from ..steps import Addition
from ..view import Chain, Region, View

__all__ = ["find"]


def find(view: View) -> Iterator[Region]:
    for node, addition in view.additions():
        runs = view.chain_into(addition.left), view.chain_into(addition.right)
        if not any(run.convolutions for run in runs):
            continue
        region, reason = _fuse(view, node, addition, *runs)
        if region is not None:
            yield region
        else:
            view.decline((*runs[0].nodes, *runs[1].nodes), f"the addition {node.name} is not fused: {reason}")


def _fuse(view: View, node: fx.Node, addition: Addition, left: Chain, right: Chain) -> tuple[Region | None, str]:
    """The first of the possible regions that the engine can run, or the reason why the best of them cannot be."""
    if addition.in_place and not view.written_by(node) <= set(left.nodes):
        return None, f"it writes into {addition.left.name}, which others may still see"
    reasons = []
    for region in _candidates(view, node, left, right, addition.in_place):
        reason = view.problem(region)
        if reason is None:
            return region, ""
        reasons.append(reason)
    return None, reasons[0]


def _candidates(view: View, node: fx.Node, left: Chain, right: Chain, in_place: bool) -> Iterator[Region]:
    """The ways to see the sum as a block, best first: the longer branch, the whole shortcut, the fewest tensors."""
    tail = view.activation_after(node)
    longer, shorter = (left, right) if left.convolutions >= right.convolutions else (right, left)
    for branch, other in ((longer, shorter), (shorter, longer)):
        for part in branch.from_each_convolution():
            # ``left += right`` keeps the dtype of its left side, which autocast may have made narrower.
            keeps_dtype = in_place and branch is left
            yield from _with_shortcut(part, other, node, tail, keeps_dtype)
            yield _with_argument(part, other, node, tail, keeps_dtype)


def _with_shortcut(branch: Chain, other: Chain, node: fx.Node, tail: Chain, in_place: bool) -> Iterator[Region]:
    if other.entry is not branch.entry:
        return
    kind = "projection" if other.steps else "identity"
    block = Block(branch.steps, other.steps, _activation(tail), in_place=in_place)
    yield Region(_name(kind), block, branch.entry, (*other.nodes, *branch.nodes, node, *tail.nodes))


def _with_argument(branch: Chain, other: Chain, node: fx.Node, tail: Chain, in_place: bool) -> Region:
    block = Block(branch.steps, (), _activation(tail), residual="argument", in_place=in_place)
    return Region(_name("second input"), block, branch.entry, (*branch.nodes, node, *tail.nodes), residual=other.end)


def _activation(tail: Chain):
    return tail.steps[0].activation if tail.steps else IDENTITY


def _name(kind: str) -> str:
    return f"post-activation residual ({kind})"
