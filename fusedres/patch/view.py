"""A traced graph as the patterns see it: which nodes are which steps, and which runs of steps hang together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from torch import fx, nn

from ..block import Act, Block, Conv, Dense, Norm, Pool, SqueezeExcite, Step, idle_in_training
from .gated_join import GatedJoin
from .gates import Gate, find_gate
from .modules import class_name, has_own_conv_forward, layer_kind
from .products import Product, find_product
from .steps import (
    PASS,
    Addition,
    Pass,
    Reading,
    Stop,
    addition,
    calls_as_module_says,
    changes_in_place,
    conv_path,
    is_sum,
    makes_its_result,
    read,
    tensor_input,
)
from .trace import Traced, is_users_function

__all__ = ["Chain", "ChainLink", "Region", "View"]

_NEAR = 4  # nodes between a chain and the sum that it is told not to be fused with


class ChainLink(NamedTuple):
    """One step of a run.

    Attributes:
        node: whose value the next step reads.
        nodes: all that the step stands for, ``node`` last: more than one for a gate.
    """

    node: fx.Node
    step: Step | Pass
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Chain:
    """A run of steps, each the only reader of the one before it.

    Args:
        entry: the value that the run reads, itself outside.
        links: the steps.
    """

    entry: fx.Node
    links: tuple[ChainLink, ...] = ()

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        return tuple(node for link in self.links for node in link.nodes)

    @property
    def steps(self) -> tuple[Step, ...]:
        return tuple(link.step for link in self.links if link.step is not PASS)

    @property
    def end(self) -> fx.Node:
        return self.links[-1].node if self.links else self.entry

    @property
    def convolutions(self) -> int:
        return sum(isinstance(step, Conv) for step in self.steps)

    def endings(self) -> Iterator[tuple[Chain, Chain]]:
        """The run cut before each of its steps in turn, as what comes before the cut and what comes behind it."""
        for i, link in enumerate(self.links):
            if link.step is not PASS:
                before = Chain(self.entry, self.links[:i])
                yield before, Chain(before.end, self.links[i:])


@dataclass(frozen=True)
class Region:
    """Nodes that one call replaces.

    Args:
        pattern: the name of what was found, for the report.
        block: what the call runs.
        inputs: the tensors that the call takes: the block's input, and a second one where ``block.residual`` is
            ``"argument"``; or the branch, the logits and the skip of a gated sum.
        nodes: every node that the call replaces; the last one's value is the call's.
    """

    pattern: str
    block: Block | Dense | GatedJoin
    inputs: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]


class View:
    """A traced graph, and what is already taken in it.

    Args:
        excluded: says why a convolution, norm or activation module may not be touched, or ``None``; of a convolution
            with a forward of the user's own, with ``True`` behind it, whether the rest of it may.
        unsupported: says why the engine cannot run a block, or ``None``.
    """

    def __init__(
        self,
        module: nn.Module,
        traced: Traced,
        excluded: Callable[..., str | None],
        unsupported: Callable[[Block | Dense], str | None],
    ) -> None:
        self.nodes = list(traced.graph.nodes)
        self._root = module
        self.unsupported = unsupported
        self.reasons: dict[fx.Node, str] = {}
        self._excluded = excluded
        self._order = {node: i for i, node in enumerate(self.nodes)}
        self._modules = {n.target: module.get_submodule(n.target) for n in self.nodes if n.op == "call_module"}
        self._calls = Counter(id(self._modules[n.target]) for n in self.nodes if n.op == "call_module")
        self._taken: set[fx.Node] = set()
        self._readings: dict[fx.Node, Reading] = {}
        self._gates: dict[fx.Node, Gate | Product | None] = {}
        self._writes = [(n, self.written_by(n)) for n in self.nodes if changes_in_place(n, self.module_of(n))]

    # -- reading ------------------------------------------------------------------------------------------------------

    def module_of(self, node: fx.Node) -> nn.Module | None:
        return self._modules[node.target] if node.op == "call_module" else None

    def reading(self, node: fx.Node) -> Reading:
        """What ``node`` is to a block; a stop once it is part of a region."""
        return Stop() if not self._taken.isdisjoint(self.nodes_of(node)) else self._read(node)

    def _read(self, node: fx.Node) -> Reading:
        if node not in self._readings:
            self._readings[node] = self._read_once(node)
        return self._readings[node]

    def _read_once(self, node: fx.Node) -> Reading:
        if (gate := self._gate(node)) is not None:
            return gate.step
        if node.op == "call_function" and self.convolution(node) is not None:
            return self._read_bare(node)
        reading = read(node, self.module_of(node), self._excluded)
        if isinstance(reading, (Conv, Norm)) and self._calls[id(self.module_of(node))] > 1:
            return Stop(f"{node.target} is called more than once")
        return reading

    def _gate(self, node: fx.Node) -> Gate | Product | None:
        """The step of several nodes that ends with ``node``."""
        if node not in self._gates:
            position = self._order.__getitem__
            gate = find_gate(node, self.module_of, self._read, self._usable_in_gate, position)
            self._gates[node] = gate or find_product(node, self.module_of, self.untouched)
        return self._gates[node]

    def _usable_in_gate(self, node: fx.Node) -> bool:
        module = self.module_of(node)
        once = not isinstance(module, (nn.Conv2d, nn.Linear)) or self._calls[id(module)] == 1
        return once and self.untouched(node)

    def convolution(self, node: fx.Node) -> tuple[str, nn.Conv2d] | None:
        """The convolution that ``node`` runs, by calling it or by a function in its own forward, behind its path."""
        if node.op == "call_module":
            return (node.target, module) if isinstance(module := self.module_of(node), nn.Conv2d) else None
        path = conv_path(node)
        module = None if path is None else self._root.get_submodule(path)
        return (path, module) if module is not None and has_own_conv_forward(module) else None

    def layer(self, node: fx.Node) -> tuple[str, nn.Module] | None:
        """The convolution or norm, of any class, that ``node`` runs, behind its path."""
        if (found := self.convolution(node)) is not None:
            return found
        module = self.module_of(node)
        return (node.target, module) if module is not None and layer_kind(module) else None

    def _read_bare(self, node: fx.Node) -> Reading:
        """What a call of ``F.conv2d`` is to a block."""
        path, module = self.convolution(node)
        if not calls_as_module_says(node, module):
            return Stop(f"{path} is a {class_name(module)}, which has a forward of its own")
        problem = self._excluded(module, True)
        return Stop(f"{path} {problem}") if problem else Conv(path, bare=True)

    def untouched(self, node: fx.Node) -> bool:
        """Whether the module that ``node`` calls does nothing but its class's forward, and may be touched."""
        return self._excluded(self.module_of(node)) is None

    def input_of(self, node: fx.Node) -> fx.Node | None:
        """The tensor that the step at ``node`` reads."""
        gate = self._gate(node)
        return tensor_input(node) if gate is None else gate.input

    def nodes_of(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """The nodes that the step at ``node`` stands for."""
        gate = self._gate(node)
        return (node,) if gate is None else gate.nodes

    def gates(self) -> Iterator[fx.Node]:
        """The products of the squeeze-excitation gates that no region has taken, in order."""
        return (node for node in self.nodes if isinstance(self.reading(node), SqueezeExcite))

    def home(self, node: fx.Node) -> str:
        """The path of the module whose code ``node`` stems from."""
        if (found := self.convolution(node)) is not None:
            return found[0].rpartition(".")[0]
        if node.op == "call_module":
            return node.target.rpartition(".")[0]
        stack = node.meta.get("nn_module_stack")
        return list(stack.values())[-1][0] if stack else ""

    def is_free(self, node: fx.Node) -> bool:
        """Whether no region has taken ``node``."""
        return node not in self._taken

    def in_order(self, nodes: set[fx.Node]) -> tuple[fx.Node, ...]:
        return tuple(sorted(nodes, key=self._order.__getitem__))

    @property
    def convolutions(self) -> list[fx.Node]:
        """The calls of convolutions that no region has taken, in order."""
        return [n for n in self.nodes if n not in self._taken and self.convolution(n) is not None]

    @property
    def left(self) -> list[fx.Node]:
        """The calls of convolutions and norms, of any class, that no region has taken, in order."""
        return [n for n in self.nodes if n not in self._taken and self.layer(n) is not None]

    def additions(self) -> Iterator[tuple[fx.Node, Addition]]:
        """The sums of two tensors, in order."""
        for node in self.nodes:
            if (found := addition(node)) is not None:
                yield node, found

    # -- runs of steps ------------------------------------------------------------------------------------------------

    def chain_into(self, node: fx.Node, readers: frozenset[fx.Node] | None = None) -> Chain:
        """The longest run that ends with ``node`` and whose values nothing outside reads; a max pooling is never in it.

        Args:
            readers: the nodes that may read ``node`` itself; by default any one.
        """
        links = []
        alone = len(node.users) == 1 if readers is None else node.users.keys() <= readers
        while alone and not isinstance(reading := self.reading(node), (Stop, Pool)):
            links.append(ChainLink(node, reading, self.nodes_of(node)))
            node = self.input_of(node)
            alone = node.users.keys() <= set(links[-1].nodes)
        return Chain(node, tuple(reversed(links)))

    def chain_from(self, start: fx.Node, through: Callable[[fx.Node, Step], bool]) -> Chain:
        """The run that begins with ``start`` and goes on for as long as ``through`` likes the next step.

        A max pooling is the end of every run.
        """
        links, node = [ChainLink(start, self.reading(start), self.nodes_of(start))], start
        while (following := self.only_reader(node)) is not None:
            reading = self.reading(following)
            if isinstance(reading, Stop) or (reading is not PASS and not through(following, reading)):
                break
            links.append(ChainLink(following, reading, self.nodes_of(following)))
            if isinstance(reading, Pool):
                break
            node = following
        while links[-1].step is PASS:
            links.pop()
        return Chain(self.input_of(start), tuple(links))

    def activation_after(self, node: fx.Node) -> Chain:
        """The activation that alone reads ``node``, with the identities before it; an empty run where there is none."""
        links, before = [], node
        while (following := self.only_reader(node)) is not None:
            reading = self.reading(following)
            if reading is not PASS and not isinstance(reading, Act):
                break
            links.append(ChainLink(following, reading, self.nodes_of(following)))
            if reading is not PASS:
                return Chain(before, tuple(links))
            node = following
        return Chain(before)

    def only_reader(self, node: fx.Node) -> fx.Node | None:
        """The one step that reads ``node``, where there is exactly one and it reads nothing else."""
        for reader in (*node.users, *(behind for user in node.users for behind in user.users)):  # a product's last
            step = set(self.nodes_of(reader)) if reader.op != "output" and self.input_of(reader) is node else set()
            if node.users.keys() <= step:
                return reader
        return None

    # -- regions ------------------------------------------------------------------------------------------------------

    def problem(self, region: Region) -> str | None:
        """Why ``region`` may not become one call; ``None`` where it may."""
        problem = None if isinstance(region.block, GatedJoin) else self.unsupported(region.block)
        return problem or self._write_problem(region)

    def take(self, region: Region) -> None:
        self._taken.update(region.nodes)

    def decline(self, nodes: tuple[fx.Node, ...], reason: str) -> None:
        """Remembers ``reason`` for the layers among ``nodes``, unless they end up in another region."""
        for node in nodes:
            self.reasons.setdefault(node, reason)

    def why_no_more(self, region: Region) -> str:
        """Why the addition that follows a chain is not fused with it, or what it is not fused for; mostly nothing."""
        if not isinstance(region.block, Block) or region.block.shortcut is not None:
            return ""
        if idle_in_training(region.block):
            return "fused in inference alone: in training there is nothing to save"
        said = [self.reasons[node] for node in region.nodes if node in self.reasons]
        if said and said[0].startswith("the addition"):
            return said[0]
        node, reason = self._addition_behind(region.nodes[-1])
        return f"the addition {node.name} is not fused: {reason}" if node is not None and reason else ""

    def _addition_behind(self, node: fx.Node) -> tuple[fx.Node | None, str]:
        """The sum that a chain leads to through a few nodes that no region has, and what stands between."""
        reason = ""
        for _ in range(_NEAR):
            readers = self.in_order(node.users.keys())
            if not readers or not self.is_free(readers[-1]) or self._holds_convolutions(readers[-1]):
                break
            if len(readers) > 1:
                reason = reason or f"the output of {self._name(node)} is used in more than one place"
            node = readers[-1]
            if is_sum(node):
                return node, reason or _reason(self._read(node))
            reason = reason or _reason(self._read(node))
        return None, ""

    def _convolves(self, node: fx.Node) -> bool:
        return node.target is F.conv2d or self.convolution(node) is not None

    def _holds_convolutions(self, node: fx.Node) -> bool:
        module = self.module_of(node)
        return self._convolves(node) or (module is not None and any(isinstance(m, nn.Conv2d) for m in module.modules()))

    def _name(self, node: fx.Node) -> str:
        found = self.layer(node)
        return node.name if found is None else found[0]

    def why_not(self, node: fx.Node) -> str:
        """Why a convolution or norm is in no region."""
        if isinstance(reading := self._read(node), Stop):
            return reading.reason
        if node in self.reasons:
            return self.reasons[node]
        return self._why_no_norm(node) if isinstance(reading, Norm) else self._why_no_convolution(node)

    def _why_no_convolution(self, conv: fx.Node) -> str:
        reader, path = self.only_reader(conv), self._name(conv)
        if reader is None and len(conv.users) > 1:
            return f"the output of {path} is used in more than one place"
        if reader is not None and (reason := _reason(self.reading(reader))):
            return f"nothing to fuse {path} with: {reason}"
        return f"{path} stands alone: no norm, activation or addition next to it"

    def _why_no_norm(self, norm: fx.Node) -> str:
        path, run = self._name(norm), self._to_convolution(norm)
        if not run:
            return f"{path} stands alone: no convolution next to it"
        *between, conv = run
        if reason := _reason(self._read(conv)):
            return f"nothing to fuse {path} with: {reason}"
        for node in between:
            if len(node.users) > 1:
                return f"the output of {self._name(node)} is used in more than one place"
        return f"the convolution next to {path}, {self._name(conv)}, is fused without it, or in another module"

    def _to_convolution(self, norm: fx.Node) -> list[fx.Node]:
        """The nodes whose values lie between a norm and the next convolution, which is last; none without one."""
        run, node = [], self.input_of(norm)
        while node is not None:
            run.append(node)
            if self._convolves(node):
                return [*run, node]  # its own value is one of them
            node = self.input_of(node) if isinstance(self._read(node), (Act, Pass)) else None
        run = [norm]
        while run:
            if found := [n for n in run[-1].users if self._convolves(n)]:
                return [*run, found[0]]
            following = [n for n in run[-1].users if isinstance(self._read(n), (Act, Pass))]
            run = [*run, following[0]] if following else []
        return []

    # -- writes in place ----------------------------------------------------------------------------------------------

    def written_by(self, node: fx.Node) -> set[fx.Node]:
        """The values that an in-place node may change: its target, and all that the target may be a view of."""
        if is_users_function(node.target):
            return set().union(*map(self._storage, node.all_input_nodes))
        return self._storage(node.kwargs.get("out") or tensor_input(node))

    def _storage(self, node: fx.Node | None) -> set[fx.Node]:
        """``node`` and the values before it whose memory it may share; two nodes may share where their sets meet."""
        shared, waiting = set(), [node]
        while waiting:
            node = waiting.pop()
            if node is None or node in shared:
                continue
            shared.add(node)
            if is_users_function(node.target):
                waiting += node.all_input_nodes
            elif not self._is_fresh(node):
                waiting.append(tensor_input(node))
        return shared

    def _is_fresh(self, node: fx.Node) -> bool:
        """Whether ``node`` surely made its tensor itself; a view, an in-place result and the unknown did not."""
        module = self.module_of(node)
        return not changes_in_place(node, module) and (
            makes_its_result(node, module) or isinstance(self._read(node), Act)
        )

    def _write_problem(self, region: Region) -> str | None:
        """A call never changes its inputs, and reads them at its last node's turn; its nodes may do otherwise."""
        inside, inputs = set(region.nodes), set().union(*map(self._storage, region.inputs))
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


def _reason(reading: Reading) -> str:
    return reading.reason if isinstance(reading, Stop) else ""
