"""Residual blocks: ``act(branch(x) + shortcut(x))``, however the sum is written, with or without the activation.

================================  ==================================================  ============================
written                           becomes                                             name in the report
================================  ==================================================  ============================
``branch(x) + x``                 ``Block(branch, shortcut=())``                      identity
``branch(x) + projection(x)``     ``Block(branch, shortcut=projection)``              projection
``branch(x) + projection(other)`` ``Block(branch, projection, residual="argument")``  projection of a second input
``branch(x) + other``             ``Block(branch, (), residual="argument")``          second input
================================  ==================================================  ============================

A branch may hold squeeze-excitation, stochastic depth and dropout where the engine has a place for them.

Preconditions: each value of the branch is read by the next step alone; an in-place sum writes into a value that the
block itself produced. Where the engine cannot run the whole branch, it runs the longest ending that it can, and the
steps before it are a chain; whatever the other operand is made of stays outside where it does not come from the
branch's own input.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..view import Chain, Region, View
from .sums import Sum, find_sums, with_argument, with_shortcut

__all__ = ["find"]


def find(view: View) -> Iterator[Region]:
    return find_sums(view, _candidates)


def _candidates(view: View, found: Sum) -> Iterator[tuple[Chain, Region]]:
    """Best first: the longer branch, the whole shortcut, the fewest tensors."""
    # MobileNetV2 calls its blocks without an activation behind the sum "linear bottlenecks".
    family = "post-activation residual" if found.tail.steps else "linear residual"
    for branch, other in found.sides:
        for before, part in branch.endings():
            if part.convolutions:
                for region in with_shortcut(family, found, part, other):
                    yield before, region
                for region in with_argument(family, found, part, other):
                    yield before, region
