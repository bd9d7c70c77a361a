"""Pre-activation residual blocks (He et al. 2016, "Identity Mappings in Deep Residual Networks"): norm and activation
come before each convolution, and nothing follows the sum.

======================================================  ===================================================
written, with ``p = act(norm(x))``                      name in the report
======================================================  ===================================================
``branch(p) + x``                                       identity
``branch(p) + projection(x)``                           projection
``branch(p) + projection(p)``                           projection of the activated input
``branch(p) + p``                                       activated identity
``branch(p) + projection(other)``                       projection of a second input
``branch(p) + other``                                   second input
======================================================  ===================================================

Preconditions: the whole branch is fused, from its first norm or activation on, and ``p`` is read by the block alone.
"""

from __future__ import annotations

from collections.abc import Iterator

from ...block import Act, Norm
from ..view import Chain, Region, View
from .sums import Sum, find_sums, with_argument, with_pending, with_shortcut

__all__ = ["find"]

_FAMILY = "pre-activation residual"


def find(view: View) -> Iterator[Region]:
    return find_sums(view, _candidates)


def _candidates(view: View, found: Sum) -> Iterator[tuple[Chain, Region]]:
    if found.tail.steps:
        return
    for branch, other in found.sides:
        if not branch.convolutions:
            continue
        nothing = Chain(branch.entry)
        for region in with_pending(_FAMILY, view, found, branch, other):
            yield nothing, region
        if isinstance(branch.steps[0], (Norm, Act)):
            for region in with_shortcut(_FAMILY, found, branch, other):
                yield nothing, region
            for region in with_argument(_FAMILY, found, branch, other):
                yield nothing, region
