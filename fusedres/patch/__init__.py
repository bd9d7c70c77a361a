"""Finding what the engine can fuse in a model, rewriting those modules' forwards in place, and undoing it.

How it works: ``plan`` walks the model, ``trace`` turns a module's forward into a graph, ``view`` and ``steps`` read the
graph as steps of a block, ``patterns`` finds the regions, ``codegen`` writes the new forward, ``swap`` installs it, and
``report`` tells.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import select
from ..block import Block, Dense, Step, measured_backends
from .codegen import formula
from .gated_join import GatedJoin
from .modules import class_problem, layer_kind, shared_parameters
from .plan import Plan, make_plan
from .prediction import Predictor
from .report import Declined, Fused, PatchReport
from .selection import Selection
from .steps import paths as paths_of
from .steps import step_problem
from .swap import Template, swap, template_of, unswap
from .watch import changed

__all__ = ["Declined", "Fused", "PatchReport", "explain", "patch", "unpatch"]

_MEMORY = ("auto", "low")


def patch(
    model: nn.Module,
    *,
    only: Any = None,
    skip: Any = None,
    dry_run: bool = False,
    memory: str = "auto",
    backend: str = "auto",
) -> PatchReport:
    """Fuses, in place, every structure of ``model`` that the engine can run.

    Parameters, ``state_dict`` keys, hooks, optimizers and ``isinstance`` stay as they are; the classes of the modules
    that hold a fused structure become generated subclasses. What cannot be fused is left alone and named in the report.
    Patching again changes nothing but what has become possible since.

    Args:
        model: any module.
        only: a module's path, a glob over paths, a class, or several of these: fuse nothing else.
        skip: the same, for what to leave alone.
        dry_run: only report.
        memory: ``"low"`` recomputes in the backward pass what is cheap to recompute.
        backend: ``"auto"``, or the name of the backend that the sites fused by this call keep to.

    Raises:
        TypeError: for a model that is not a module.
        ValueError: for an unknown ``memory`` or ``backend``, or a path in ``only`` or ``skip`` that the model lacks.
        RuntimeError: for a backend that cannot run this model, with the reason.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if memory not in _MEMORY:
        raise ValueError(f"memory must be 'auto' or 'low', got {memory!r}")
    if backend != "auto" and backend not in select.BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(map(repr, select.BACKENDS))}, got {backend!r}")
    selection = Selection(model, only, skip)
    options = {k: v for k, v in (("backend", backend), ("memory", memory)) if v != "auto"}
    stepped_back = _restore_changed(model)
    try:
        plan = make_plan(model, selection, options)
        # The report comes first: it raises where the backend cannot run the model, which then stays as it is.
        report = _report(model, plan, dry_run, Predictor(model, only, skip, memory))
    finally:
        if dry_run:
            for module, fused in stepped_back:
                module.__class__ = fused
    if not dry_run:
        for site in plan.sites:
            swap(site)
    return report


def _restore_changed(model: nn.Module) -> list[tuple[nn.Module, type]]:
    """Unpatches the modules whose fused forward no longer holds, so that they are looked at again; returns them."""
    shared = shared_parameters(model)
    found = []
    for module in model.modules():
        template = template_of(module)
        if template is not None and (changed(module, template.watched) or _reads_others(module, template, shared)):
            found.append((module, type(module)))
            unswap(module)
    return found


def _reads_others(module: nn.Module, template: Template, shared: dict[int, str]) -> bool:
    """Whether a layer that the engine reads is no longer one that it may: then it calls the layers, at every call."""
    return any(
        step_problem(step, module.get_submodule(path), shared) is not None
        for _, block in template.blocks
        for step in _steps(block)
        for path in paths_of(step)
    )


def explain(model: nn.Module) -> PatchReport:
    """What :func:`patch` would do, with nothing changed."""
    return patch(model, dry_run=True)


def unpatch(model: nn.Module) -> int:
    """Undoes :func:`patch` in ``model`` and everything below it; returns how many modules were restored."""
    return sum(unswap(module) for module in model.modules())


def _report(model: nn.Module, plan: Plan, dry_run: bool, predictor: Predictor) -> PatchReport:
    paths = {module: path for path, module in model.named_modules()}
    templates = {path: (template_of(module), True) for path, module in plan.fused.items()}
    templates.update({site.path: (site.template, False) for site in plan.sites})
    sites = [
        entry
        for module, path in paths.items()
        if path in templates
        for entry in _entries(module, paths, *templates[path])
    ]
    kinds = {path: kind for m, path in paths.items() if (kind := layer_kind(m))}
    left = (plan.reasons.keys() | kinds.keys()) - {p for site in sites for p in (*site.convolutions, *site.norms)}
    reasons = [
        Declined(path, plan.reasons.get(path) or _unseen(model, path), kinds.get(path, "module"))
        for path in paths.values()
        if path in left
    ]
    sources = {path: template.source for path, (template, _) in templates.items()}
    notes = _notes({path: m for m, path in paths.items() if isinstance(m, nn.Conv2d)}, bool(sites))
    total = Counter(kinds.values())
    return PatchReport(
        *(tuple(sites), tuple(reasons), total["convolution"], notes, dry_run, sources, predictor),
        total_norms=total["norm"],
    )


def _unseen(model: nn.Module, path: str) -> str:
    """Why a convolution or norm is in no graph."""
    if (own := class_problem(path, model.get_submodule(path))) is not None:
        return own
    if not path:
        return "it is the whole model"
    return "the forward of the module that holds it does not call it"


def _entries(module: nn.Module, paths: dict[nn.Module, str], template: Template, already: bool) -> list[Fused]:
    """The report's entries for one module: one for each call of the engine."""
    entries = []
    for (pattern, block), remark in zip(template.blocks, template.remarks):
        inner = [module.get_submodule(path) for path in _inner(block)]
        convs, norms = (tuple(paths[m] for m in inner if layer_kind(m) == k) for k in ("convolution", "norm"))
        weight = _weight((*inner, *module.modules()))
        forced = dict(template.options).get("backend", "auto")
        backend = select.backend_for(weight.device, weight.dtype, forced)
        if select.by_measurement(weight.device.type, forced) and not isinstance(block, GatedJoin):
            backend = measured_backends(block, module, weight.device)
        entries.append(Fused(paths[module], pattern, backend, convs, already, remark, norms, formula(block)))
    return entries


def _weight(modules: Sequence[nn.Module]) -> Tensor:
    """A tensor of the device and dtype that a call will have, as far as can be told: a norm's may be wider."""
    wider = [m for m in modules if layer_kind(m) == "norm"]
    for module in (*(m for m in modules if isinstance(m, (nn.Conv2d, nn.Linear))), *wider):
        # Not the attribute: a parametrization computes one anew, and spectral norm's moves on by a step.
        for held in (module._parameters.get("weight"), module._buffers.get("running_mean")):
            if held is not None:
                return held
    return torch.empty(0)


def _inner(block: Block | Dense | GatedJoin) -> list[str]:
    """The paths of the modules whose parameters a call reads, and of a gated sum's gate."""
    if isinstance(block, GatedJoin):
        return [block.gate] if block.gate else []
    return [path for step in _steps(block) for path in paths_of(step)]


def _steps(block: Block | Dense | GatedJoin) -> list[Step]:
    if isinstance(block, GatedJoin):
        return []
    chains = block.layers if isinstance(block, Dense) else (block.branch, block.shortcut or ())
    return [step for steps in chains for step in steps]


def _notes(convolutions: dict[str, nn.Conv2d], fused: bool) -> tuple[str, ...]:
    """Hints that concern the whole model."""
    if not convolutions:
        return () if fused else ("the model has no Conv2d",)
    weights = [w for w in (m._parameters.get("weight") for m in convolutions.values()) if type(w) is nn.Parameter]
    if any(not w.is_contiguous(memory_format=torch.channels_last) for w in weights):
        return ("the model is in NCHW (contiguous) layout: call model.to(memory_format=torch.channels_last)",)
    return ()
