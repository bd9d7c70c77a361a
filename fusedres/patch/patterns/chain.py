"""Convolutions with what follows them and no sum: ``conv-bn-relu``, ``conv-bn``, ``conv-relu``, also several in a row.

Becomes ``Block(branch, shortcut=None)``.

Preconditions: each value is read by the next step alone, and there are two steps or more, since a convolution on its
own gains nothing. A run goes on into the next convolution only where both sit in the same module, so that a stack of
conv-bn-relu *modules* stays a stack of modules, on which hooks and slices keep their meaning.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from ...block import Act, Block, Conv, Norm, Step
from ..view import Chain, Region, View

__all__ = ["find"]


def find(view: View) -> Iterator[Region]:
    for start in view.convolutions:
        if isinstance(view.reading(start), Conv):
            yield from _longest(view, _run(view, start))


def _run(view: View, start: fx.Node) -> Chain:
    home = _home(start)
    return view.chain_from(start, lambda node, step: not isinstance(step, Conv) or _home(node) == home)


def _longest(view: View, run: Chain) -> Iterator[Region]:
    """The longest beginning of ``run`` that the engine can run."""
    for end in range(len(run.links), 1, -1):
        links = run.links[:end]
        part = Chain(run.entry, links)
        if len(part.steps) < 2 or part.steps[-1] is not links[-1][1]:
            continue
        region = Region(_name(part.steps), Block(part.steps), part.entry, part.nodes)
        reason = view.problem(region)
        if reason is None:
            yield region
            return
        view.decline(part.nodes, reason)


def _home(node: fx.Node) -> str:
    return node.target.rpartition(".")[0]


def _name(steps: tuple[Step, ...]) -> str:
    """``conv-bn-relu``, or ``conv-bn-relu x 3`` for a run that repeats itself."""
    words = [_word(step) for step in steps]
    period = next(p for p in range(1, len(words) + 1) if len(words) % p == 0 and words == words[:p] * (len(words) // p))
    times = len(words) // period
    return "-".join(words[:period]) + (f" x {times}" if times > 1 else "")


def _word(step: Step) -> str:
    if isinstance(step, Act):
        return str(step.activation)
    return "bn" if isinstance(step, Norm) else "conv"
