"""A traced graph as the patterns see it: which nodes are which steps, and which runs of steps hang together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase

from ..block import Act, Block, Conv, Norm, Step
from .steps import PASS, Addition, Pass, Reading, Stop, addition, changes_in_place, read, tensor_input
from .trace import Traced

__all__ = ["Chain", "Region", "View"]


@dataclass(frozen=True)
class Chain:
    """A run of nodes, each the only reader of the one before it.

    Args:
        entry: the value that the run reads, itself outside.
        links: each node of the run with what it is to a block.
    """

    entry: fx.Node
    links: tuple[tuple[fx.Node, Step | Pass], ...] = ()

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        return tuple(node for node, _ in self.links)

    @property
    def steps(self) -> tuple[Step, ...]:
        return tuple(step for _, step in self.links if step is not PASS)

    @property
    def end(self) -> fx.Node:
        return self.links[-1][0] if self.links else self.entry

    @property
    def convolutions(self) -> int:
        return sum(isinstance(step, Conv) for step in self.steps)

    def from_each_convolution(self) -> Iterator[Chain]:
        """The parts of this run that begin with a convolution and reach to its end, longest first."""
        entry = self.entry
        for i, (node, step) in enumerate(self.links):
            if isinstance(step, Conv):
                yield Chain(entry, self.links[i:])
            entry = node


@dataclass(frozen=True)
class Region:
    """Nodes that one call of the engine replaces.

    Args:
        pattern: the name of what was found, for the report.
        nodes: every node that the call replaces; the last one's value is the call's.
        residual: the second tensor that the call takes, where ``block.residual`` is ``"argument"``.
    """

    pattern: str
    block: Block
    entry: fx.Node
    nodes: tuple[fx.Node, ...]
    residual: fx.Node | None = None

    @property
    def convolutions(self) -> tuple[str, ...]:
        return tuple(s.path for s in (*self.block.branch, *(self.block.shortcut or ())) if isinstance(s, Conv))


class View:
    """A traced graph, and what is already taken in it.

    Args:
        excluded: says why a convolution, norm or activation module may not be touched, or ``None``.
        unsupported: says why the engine cannot run a block, or ``None``.
    """

    def __init__(
        self,
        module: nn.Module,
        traced: Traced,
        excluded: Callable[[nn.Module], str | None],
        unsupported: Callable[[Block], str | None],
    ) -> None:
        self.nodes = list(traced.graph.nodes)
        self.unsupported = unsupported
        self.reasons: dict[fx.Node, str] = {}
        self._excluded = excluded
        self._order = {node: i for i, node in enumerate(self.nodes)}
        self._modules = {n.target: module.get_submodule(n.target) for n in self.nodes if n.op == "call_module"}
        self._calls = Counter(id(self._modules[n.target]) for n in self.nodes if n.op == "call_module")
        self._taken: set[fx.Node] = set()
        self._readings: dict[fx.Node, Reading] = {}
        self._writes = [(n, self.written_by(n)) for n in self.nodes if changes_in_place(n, self.module_of(n))]

    # -- reading ------------------------------------------------------------------------------------------------------

    def module_of(self, node: fx.Node) -> nn.Module | None:
        return self._modules[node.target] if node.op == "call_module" else None

    def reading(self, node: fx.Node) -> Reading:
        """What ``node`` is to a block; a stop once it is part of a region."""
        return Stop() if node in self._taken else self._read(node)

    def _read(self, node: fx.Node) -> Reading:
        if node not in self._readings:
            self._readings[node] = self._read_once(node)
        return self._readings[node]

    def _read_once(self, node: fx.Node) -> Reading:
        reading = read(node, self.module_of(node), self._excluded)
        if isinstance(reading, (Conv, Norm)) and self._calls[id(self.module_of(node))] > 1:
            return Stop(f"{node.target} is called more than once")
        return reading

    @property
    def convolutions(self) -> list[fx.Node]:
        """The calls of convolutions that no region has taken, in order."""
        return [n for n in self.nodes if n not in self._taken and isinstance(self.module_of(n), nn.Conv2d)]

    def additions(self) -> Iterator[tuple[fx.Node, Addition]]:
        """The sums of two tensors, in order."""
        for node in self.nodes:
            if (found := addition(node)) is not None:
                yield node, found

    # -- runs of steps ------------------------------------------------------------------------------------------------

    def chain_into(self, node: fx.Node) -> Chain:
        """The longest run that ends with ``node`` and is read by one node only."""
        links = []
        while len(node.users) == 1 and not isinstance(reading := self.reading(node), Stop):
            links.append((node, reading))
            node = tensor_input(node)
        return Chain(node, tuple(reversed(links)))

    def chain_from(self, start: fx.Node, through: Callable[[fx.Node, Step], bool]) -> Chain:
        """The run that begins with ``start`` and goes on for as long as ``through`` likes the next step."""
        links, node = [(start, self.reading(start))], start
        while (following := self.only_reader(node)) is not None:
            reading = self.reading(following)
            if isinstance(reading, Stop) or (reading is not PASS and not through(following, reading)):
                break
            links.append((following, reading))
            node = following
        while links[-1][1] is PASS:
            links.pop()
        return Chain(tensor_input(start), tuple(links))

    def activation_after(self, node: fx.Node) -> Chain:
        """The activation that alone reads ``node``, with the identities before it; an empty run where there is none."""
        links = []
        while (following := self.only_reader(node)) is not None:
            reading = self.reading(following)
            if reading is not PASS and not isinstance(reading, Act):
                break
            links.append((following, reading))
            if reading is not PASS:
                return Chain(node, tuple(links))
            node = following
        return Chain(node)

    @staticmethod
    def only_reader(node: fx.Node) -> fx.Node | None:
        """The one node that reads ``node``, where there is exactly one and it reads nothing else."""
        if len(node.users) != 1:
            return None
        reader = next(iter(node.users))
        return reader if tensor_input(reader) is node and reader.op != "output" else None

    # -- regions ------------------------------------------------------------------------------------------------------

    def problem(self, region: Region) -> str | None:
        """Why ``region`` may not become one call; ``None`` where it may."""
        return self.unsupported(region.block) or self._write_problem(region)

    def take(self, region: Region) -> None:
        self._taken.update(region.nodes)

    def decline(self, nodes: tuple[fx.Node, ...], reason: str) -> None:
        """Remembers ``reason`` for the convolutions among ``nodes``, unless they end up in another region."""
        for node in nodes:
            self.reasons.setdefault(node, reason)

    def why_not(self, conv: fx.Node) -> str:
        """Why a convolution is in no region."""
        reading = self.reading(conv)
        if isinstance(reading, Stop):
            return reading.reason
        if conv in self.reasons:
            return self.reasons[conv]
        reader = self.only_reader(conv)
        if reader is None and len(conv.users) > 1:
            return f"the output of {conv.target} is used in more than one place"
        after = reader and self.reading(reader)
        if isinstance(after, Stop) and after.reason:
            return f"nothing to fuse {conv.target} with: {after.reason}"
        return f"{conv.target} stands alone: no norm, activation or addition next to it"

    # -- writes in place ----------------------------------------------------------------------------------------------

    def written_by(self, node: fx.Node) -> set[fx.Node]:
        """The values that an in-place node may change: its target, and all that the target may be a view of."""
        return self._storage(node.kwargs.get("out") or tensor_input(node))

    def _storage(self, node: fx.Node | None) -> set[fx.Node]:
        """``node`` and the values before it whose memory it may share; two nodes may share where their sets meet."""
        shared = set()
        while node is not None:
            shared.add(node)
            node = None if self._is_fresh(node) else tensor_input(node)
        return shared

    def _is_fresh(self, node: fx.Node) -> bool:
        """Whether ``node`` surely made its tensor itself; a view, an in-place result and the unknown did not."""
        if changes_in_place(node, self.module_of(node)):
            return False
        known = isinstance(self.module_of(node), (nn.Conv2d, _NormBase)) or addition(node) is not None
        return known or isinstance(self._read(node), Act)

    def _write_problem(self, region: Region) -> str | None:
        """A call never changes its inputs, and reads them at its last node's turn; its nodes may do otherwise."""
        inside, inputs = set(region.nodes), self._storage(region.entry) | self._storage(region.residual)
        first, last = min(map(self._order.__getitem__, inside)), self._order[region.nodes[-1]]
        for write, written in self._writes:
            # The target of an in-place sum is for the pattern to judge, which knows what became of both operands.
            if write in inside and addition(write) is None and not self._made_inside(tensor_input(write), inside):
                return f"{write.name} changes a value in place that does not belong to the block"
            if write not in inside and first < self._order[write] < last and inputs & written:
                return f"its input is changed in place by {write.name} while it is still needed"
        return None

    def _made_inside(self, target: fx.Node, inside: set[fx.Node]) -> bool:
        while target in inside and not self._is_fresh(target) and addition(target) is None:
            target = tensor_input(target)
        return target in inside
