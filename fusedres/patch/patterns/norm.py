"""Norms whose convolution stays outside: one of another class, a transposed one, one that is hooked or reparametrized.

============================  ================================================  ============================
written                       becomes                                           name in the report
============================  ================================================  ============================
``act(norm(x) + other)``      ``Block((Norm,), (), act, residual="argument")``  norm and residual (second
                                                                                input)
``act(norm(x))``              ``Block((Norm, Act))``                            bn-relu
============================  ================================================  ============================

Of a residual block with such convolutions that is everything else: two passes instead of five, and one tensor kept for
backward where stock PyTorch keeps three. A norm with nothing behind it gains nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

from ...block import Act, Block, Norm, Step
from ...ops.activations import IDENTITY
from ..view import Chain, ChainLink, Region, View
from .chain import name_of
from .sums import Sum, find_sums, with_argument

__all__ = ["find"]


def find(view: View) -> Iterator[Region]:
    yield from find_sums(view, _candidates, Norm)
    for node in view.nodes:
        if isinstance(step := view.reading(node), Norm):
            run = Chain(
                view.input_of(node), (ChainLink(node, step, view.nodes_of(node)), *view.activation_after(node).links)
            )
            if _activates(run.steps):
                region = Region(name_of(run.steps), Block(run.steps), (run.entry,), run.nodes)
                reason = view.problem(region)
                if reason is None:
                    yield region
                else:
                    view.decline(region.nodes, reason)


def _candidates(view: View, found: Sum) -> Iterator[tuple[Chain, Region]]:
    for branch, other in found.sides:
        for before, part in branch.endings():
            if isinstance(part.steps[0], Norm):
                for region in with_argument("norm and residual", found, part, other):
                    yield before, region


def _activates(steps: tuple[Step, ...]) -> bool:
    return any(isinstance(step, Act) for step in steps) or steps[0].act != IDENTITY
