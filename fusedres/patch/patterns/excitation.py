"""Squeeze-excitation on its own: ``x * gate(fc2(act(fc1(mean(x)))))`` where no residual block or chain holds it.

Becomes ``Block((SqueezeExcite(fc1, fc2),))``: a pass for the means, a pass for the product.
"""

from __future__ import annotations

from collections.abc import Iterator

from ...block import Block
from ..view import Region, View

__all__ = ["find"]


def find(view: View) -> Iterator[Region]:
    for product in view.gates():
        block = Block((view.reading(product),))
        region = Region("squeeze-excitation", block, (view.input_of(product),), view.nodes_of(product))
        reason = view.problem(region)
        if reason is None:
            yield region
        else:
            view.decline(region.nodes, reason)
