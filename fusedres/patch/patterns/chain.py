"""Convolutions with what is around them and no sum: ``conv-bn-relu``, ``bn-relu-conv``, also several in a row.

Becomes ``Block(branch, shortcut=None)``.

Preconditions: each value is read by the next step alone, and there are two steps or more, since a convolution on its
own gains nothing. A run begins with the norm or the squeeze-excitation before its first convolution, or with that
convolution. Both ways it stays within one module, as it does where it goes on into the next convolution, so that a
stack of conv-bn-relu *modules* stays a stack of modules, on which hooks and slices keep their meaning. Modules of
bn-relu-conv are another matter: the norm of one follows the convolution of the one before it, so that they are
entangled anyway, and the run goes on.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from ...block import Act, Block, Conv, Dropout, DropPath, Mask, Norm, Pool, SqueezeExcite, Step
from ...ops.activations import IDENTITY
from ..view import Chain, ChainLink, Region, View

__all__ = ["find", "longest", "name_of"]


def find(view: View) -> Iterator[Region]:
    gated = {node for product in view.gates() for node in view.nodes_of(product)}
    for start in view.convolutions:
        if start not in gated and isinstance(view.reading(start), Conv):
            yield from longest(view, _run(view, start))


def longest(view: View, run: Chain) -> Iterator[Region]:
    """The longest beginning of ``run`` that the engine can run; if there is none, of what follows its first step."""
    for _, part in run.endings():
        if isinstance(part.steps[0], (Norm, SqueezeExcite, Conv)):
            region = _beginning(view, part)
            if region is not None or isinstance(part.steps[0], Conv):
                return iter(()) if region is None else iter((region,))
    return iter(())


def _beginning(view: View, run: Chain) -> Region | None:
    for end in range(len(run.links), 1, -1):
        part = Chain(run.entry, run.links[:end])
        if len(part.steps) < 2 or not part.convolutions or part.steps[-1] is not run.links[end - 1].step:
            continue
        region = Region(name_of(part.steps), Block(part.steps), (part.entry,), part.nodes)
        reason = view.problem(region)
        if reason is None:
            return region
        view.decline(part.nodes, reason)
    return None


def _run(view: View, start: fx.Node) -> Chain:
    home = view.home(start)

    def goes_on(node: fx.Node, step: Step) -> bool:
        if not isinstance(step, Conv):
            return True
        place = view.home(node)
        return place in (home, view.home(view.input_of(node)))

    behind = view.chain_from(start, goes_on)
    before = view.chain_into(behind.entry, frozenset((start,)))
    links = []
    for link in reversed(before.links):
        if isinstance(link.step, Conv) or not _belongs(view, link, home):
            break
        links.append(link)
    entry = view.input_of(links[-1].node) if links else behind.entry
    return Chain(entry, (*reversed(links), *behind.links))


def _belongs(view: View, link: ChainLink, home: str) -> bool:
    """Whether a step is the work of the module at ``home``, or, for squeeze-excitation, of a child of it."""
    place = view.home(link.node)
    return place == home or (isinstance(link.step, SqueezeExcite) and place.rpartition(".")[0] == home)


def name_of(steps: tuple[Step, ...]) -> str:
    """``conv-bn-relu``, or ``conv-bn-relu x 3`` for a run that repeats itself."""
    words = [_word(step) for step in steps]
    period = next(p for p in range(1, len(words) + 1) if len(words) % p == 0 and words == words[:p] * (len(words) // p))
    times = len(words) // period
    return "-".join(words[:period]) + (f" x {times}" if times > 1 else "")


_WORDS = {
    Conv: "conv",
    Norm: "bn",
    Dropout: "dropout",
    SqueezeExcite: "se",
    DropPath: "stochastic depth",
    Pool: "maxpool",
}


def _word(step: Step) -> str:
    if isinstance(step, Act):
        return str(step.activation)
    if isinstance(step, Mask):
        return "dropout2d" if step.channels else "stochastic depth"
    act = f"-{step.act}" if isinstance(step, Norm) and step.act != IDENTITY else ""
    return _WORDS[type(step)] + act
