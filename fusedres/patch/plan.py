"""Walking a model and deciding, module by module, what its forward becomes. Nothing is changed here.

From the root down: a module that holds convolutions is traced together with the small modules below it, and the
patterns look for regions. A region belongs to the innermost module whose code holds all of it; that module's forward is
the one to rewrite, and only the submodules which the region cuts through become part of it. So a stage made of one
block leaves the rewriting to the block, and a block whose shortcut is a ``Sequential`` swallows the shortcut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from ..block import unsupported
from ..mask import mask_of
from .codegen import generate
from .modules import (
    bare_conv_problem,
    class_problem,
    conv_problem,
    hook_problem,
    is_builtin,
    is_drop_path,
    is_norm,
    layer_kind,
    linear_problem,
    norm_problem,
    opaque_problem,
    shared_parameters,
)
from .patterns import PATTERNS
from .selection import Selection
from .source import asks_for_its_class
from .swap import Site, Template, fused_class, template_of
from .trace import Traced, Untraceable, survey, trace
from .twins import Twins
from .view import Region, View
from .watch import watch

__all__ = ["Plan", "make_plan"]

_SMALL = 8
"""A submodule with more convolutions than this is called, never inlined: no region reaches across so many."""


@dataclass
class Plan:
    """What to do with a model.

    Args:
        sites: the modules to fuse, outermost first.
        fused: the modules that are fused already, by path.
        reasons: why a convolution, a norm, or everything below a module, stays as it is, by path.
    """

    sites: list[Site] = field(default_factory=list)
    fused: dict[str, nn.Module] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def make_plan(model: nn.Module, selection: Selection, options: dict[str, str]) -> Plan:
    """The plan for ``model``.

    Args:
        options: the engine's keyword arguments that are not at their default.
    """
    planner = _Planner(model, selection, options)
    planner.visit(model)
    return planner.plan


class _Planner:
    def __init__(self, model: nn.Module, selection: Selection, options: dict[str, str]) -> None:
        self.plan = Plan()
        self._paths = {module: path for path, module in model.named_modules()}
        self._size: dict[nn.Module, int] = {}
        self._shared = shared_parameters(model)
        self._selection = selection
        self._options = options
        self._visited: set[nn.Module] = set()
        self._given_tensors = {model: True}
        self._twins = Twins(model)
        # Known before anything is traced: what they are is seen by running them.
        self._masks = set(filter(_draws_mask, model.modules()))

    # -- the walk -----------------------------------------------------------------------------------------------------

    def visit(self, module: nn.Module, inlined: frozenset[nn.Module] = frozenset()) -> None:
        """Plans ``module``, unless its code is inlined in a site above, and then what is below it."""
        if module in self._visited:
            return
        self._visited.add(module)
        if (problem := opaque_problem(module)) is not None:
            self._decline_opaque(module, problem)
            return
        if not self._layers(module):
            # Nothing to rewrite, but a scripted module, whose convolutions do not show, may be below.
            pass
        elif template_of(module) is not None:
            inlined = self._keep(module)
        elif module not in inlined and self._has_forward(module):
            inlined = inlined | self._rewrite(module)
        for child in module.children():
            self.visit(child, inlined)

    def _layers(self, module: nn.Module) -> bool:
        """Whether there is anything that could be fused."""
        return self._convolutions(module) > 0 or any(map(is_norm, module.modules()))

    def _convolutions(self, module: nn.Module) -> int:
        if module not in self._size:
            below = sum(map(self._convolutions, module.children()))
            self._size[module] = below + isinstance(module, nn.Conv2d)
        return self._size[module]

    @staticmethod
    def _has_forward(module: nn.Module) -> bool:
        return not is_builtin(module) and type(module).forward is not nn.Module.forward

    def _keep(self, module: nn.Module) -> frozenset[nn.Module]:
        """Notes a module that is fused already."""
        template = template_of(module)
        self.plan.fused[self._paths[module]] = module
        for path, reason in template.declined:
            self._decline(module.get_submodule(path), reason)
        return frozenset(map(module.get_submodule, template.inlined))

    def _rewrite(self, module: nn.Module) -> frozenset[nn.Module]:
        """Plans one module; returns the submodules whose code its new forward holds."""
        try:
            found = self._search(module)
        except Untraceable as failure:
            self._decline_below(module, failure.reason)
            return frozenset()
        if found is None:
            return frozenset()
        if asks_for_its_class(type(module)):
            # It would find the generated one where a call goes to the stock forward after all.
            self._decline_below(module, "its forward asks for the class of its module, which patching derives from")
            return frozenset()
        traced, view, regions = found
        try:
            self._add_site(module, traced, view, regions)
        except Exception as error:  # the class, its metaclass or its __init_subclass__ may refuse in any way
            self._decline_below(module, f"its class cannot be derived from ({type(error).__name__}: {error})")
            return frozenset()
        return traced.inlined

    # -- one module ---------------------------------------------------------------------------------------------------

    def _search(self, module: nn.Module) -> tuple[Traced, View, list[Region]] | None:
        """The module's graph and the regions in it that belong to it, or ``None`` where there are none."""
        if "forward" in module.__dict__:
            raise Untraceable("its forward was replaced on the instance")
        if isinstance(module, fx.GraphModule):
            raise Untraceable("it is an fx.GraphModule, which rewrites its own forward")
        traced = survey(module, self._may_inline, self._twins)
        if traced.tensors and not self._given_tensors.get(module, False):
            # Taken for tensors, they might turn out to be lists at every call, and the forward would always be stock's.
            raise Untraceable("its forward asks for the type of a value, which is not known")
        self._learn(module, traced)
        idle = _without_code(module, traced)
        regions = self._match(module, traced)[1]
        # Inlining less can undo a region, which can make less inlining needed, and so on; it settles at once or never.
        for _ in range(4):
            cut = [region for region in regions if not _scope(region)]
            if not cut:
                break
            traced, idle = self._trace(module, _cut_through(module, cut), idle, traced)
            needed, idle = traced.inlined, idle & traced.inlined
            view, regions = self._match(module, traced)
            if _cut_through(module, [r for r in regions if not _scope(r)]) | idle == needed:
                return traced, view, regions
        return None

    def _trace(
        self, module: nn.Module, needed: set[nn.Module], idle: set[nn.Module], before: Traced
    ) -> tuple[Traced, set[nn.Module]]:
        """The graph with ``needed`` inlined, and ``idle`` ones too unless they do something in training after all."""
        inlined = needed | idle
        try:
            surveyed = before if before.inlined == inlined else None
            return trace(module, inlined.__contains__, surveyed, self._twins), idle
        except Untraceable:
            if not idle:
                raise
        surveyed = before if before.inlined == needed else None
        return trace(module, needed.__contains__, surveyed, self._twins), set()

    def _learn(self, module: nn.Module, traced: Traced) -> None:
        """Notes which submodules are given nothing but tensors."""
        own = self._given_tensors.get(module, False)
        for child, tensors in traced.given.items():
            known = own if tensors is None else tensors
            self._given_tensors[child] = self._given_tensors.get(child, True) and known

    def _may_inline(self, module: nn.Module) -> bool:
        if template_of(module) is not None or is_drop_path(module) or is_norm(module) or module in self._masks:
            return False
        return self._convolutions(module) <= _SMALL and hook_problem(module) is None

    def _match(self, module: nn.Module, traced: Traced) -> tuple[View, list[Region]]:
        view, regions = View(module, traced, self._problem, unsupported), []
        for pattern in PATTERNS:
            for region in pattern.find(view):
                view.take(region)
                regions.append(region)
        for node in view.left:
            self._decline(view.layer(node)[1], view.why_not(node))
        return view, sorted(regions, key=lambda region: view.nodes.index(region.nodes[-1]))

    def _problem(self, module: nn.Module, bare: bool = False) -> str | None:
        """Why a module may not become a step, or ``None``; ``bare`` for the convolution in a forward of its own."""
        if isinstance(module, nn.Conv2d):
            problem = bare_conv_problem if bare else conv_problem
        elif isinstance(module, nn.Linear):
            problem = linear_problem
        elif is_norm(module):
            problem = norm_problem
        else:
            return hook_problem(module)
        return self._selection.problem(module) or problem(module, self._shared)

    def _add_site(self, module: nn.Module, traced: Traced, view: View, regions: list[Region]) -> None:
        declined = tuple((view.layer(node)[0], view.why_not(node)) for node in view.left)
        inlined = tuple(path for path, m in module.named_modules() if m in traced.inlined)
        remarks = tuple(map(view.why_no_more, regions))
        watched = watch(module, regions, inlined)
        source, names = generate(module, traced, regions, watched, self._options)
        blocks = tuple((region.pattern, region.block) for region in regions)
        options = tuple(self._options.items())
        template = Template(type(module), source, blocks, remarks, inlined, watched, declined, options)
        self.plan.sites.append(Site(self._paths[module], module, fused_class(template, names)))

    # -- reasons ------------------------------------------------------------------------------------------------------

    def _decline(self, layer: nn.Module, reason: str) -> None:
        # Inner modules come later and know better.
        self.plan.reasons[self._paths[layer]] = reason

    def _decline_opaque(self, module: nn.Module, problem: str) -> None:
        if isinstance(module, torch.jit.ScriptModule):
            self._decline(module, f"it {problem}")
        self._decline_below(module, problem)

    def _decline_below(self, module: nn.Module, reason: str) -> None:
        name = self._paths[module] or type(module).__name__
        for below in filter(layer_kind, module.modules()):
            # What it is itself would still hold if the module above were written otherwise.
            self._decline(below, class_problem(self._paths[below], below) or f"{name}: {reason}")


def _scopes(region: Region) -> Iterator[tuple[tuple[str, str], ...]]:
    """For each node of a region, the submodules whose code it stems from, outermost first, as (call, path)."""
    for node in region.nodes:
        stack = [(call, path) for call, (path, _) in node.meta.get("nn_module_stack", {}).items()]
        yield tuple(stack[:-1] if node.op == "call_module" else stack)


def _scope(region: Region) -> tuple[tuple[str, str], ...]:
    """The submodules whose code holds the whole region; empty where only the traced module's own does."""
    scopes = list(_scopes(region))
    common = scopes[0]
    for scope in scopes[1:]:
        while scope[: len(common)] != common:
            common = common[:-1]
    return common


def _draws_mask(module: nn.Module) -> bool:
    """Whether a module of the user's is a factor by chance."""
    return not is_builtin(module) and hook_problem(module) is None and mask_of(module) is not None


def _without_code(module: nn.Module, traced: Traced) -> set[nn.Module]:
    """The inlined submodules that leave no node in the graph: they hand on what they are given, in evaluation."""
    stacks = (node.meta.get("nn_module_stack", {}).values() for node in traced.graph.nodes)
    with_code = {module.get_submodule(path) for path in {path for stack in stacks for path, _ in stack}}
    return set(traced.inlined - with_code)


def _cut_through(module: nn.Module, regions: list[Region]) -> set[nn.Module]:
    """The submodules that must be inlined for the regions to be one."""
    return {module.get_submodule(path) for region in regions for scope in _scopes(region) for _, path in scope}
