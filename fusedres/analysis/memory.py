"""What a training step keeps and what it peaks at: stock, patched, ``memory="low"``, ``torch.compile``, checkpointing.

Saved bytes are those that autograd holds between forward and backward, counted by storage: exact and repeatable. The
peak is the resident set of a process that does nothing but these steps, or on a GPU what its allocator had given out.
"""

from __future__ import annotations

import copy
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from ..benchmarking.memory import saved_bytes
from ..benchmarking.results import MemoryUse, Results, this_machine
from ..console import console, lacks, make_table, stages
from ..explain_cli import load_model
from ..patch import patch, unpatch
from .blocks import blocks_of
from .output import COLOURS, new_figure, save_figure, shape_argument
from .peak import in_child, resident
from .state import preserved

__all__ = [
    "CAVEATS",
    "VARIANTS",
    "SavedActivations",
    "add_arguments",
    "memory",
    "run",
    "save_plot",
    "saved_activations",
]


# ---------------------------------------------------------------------------------------------------------------------
# The forms of a model
# ---------------------------------------------------------------------------------------------------------------------


def _patched(model: nn.Module, memory: str) -> nn.Module:
    patch(model, memory=memory)
    return model


def _checkpointed(model: nn.Module) -> nn.Module:
    """Every block keeps its input alone and runs again in backward (Chen et al. 2016, "Training Deep Nets with
    Sublinear Memory Cost")."""
    for block in blocks_of(model).values():
        forward = block.forward
        # Reentrant, since only so the kept input goes through autograd, where it is counted.
        block.forward = partial(checkpoint, forward, use_reentrant=True)
    return model


VARIANTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "stock": lambda model: model,
    "patched": lambda model: _patched(model, "auto"),
    'patched, memory="low"': lambda model: _patched(model, "low"),
    "torch.compile": torch.compile,
    "checkpointing": _checkpointed,
}
"""What is compared; each takes a stock model in channels_last, which it may change, and returns one to train."""


# ---------------------------------------------------------------------------------------------------------------------
# Bytes that autograd keeps
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SavedActivations:
    """Bytes that autograd keeps for backward, parameters and buffers not counted."""

    stock: int
    patched: int
    low: int

    @property
    def ratio(self) -> float:
        """Patched over stock."""
        return self.patched / self.stock if self.stock else float("nan")


def saved_activations(model: nn.Module, x: Tensor) -> SavedActivations:
    """The bytes that one training forward of ``model`` keeps for backward: stock, patched, and with ``memory="low"``.

    A storage that is saved several times, or through several views, counts once. The model is left as it was.

    Args:
        model: stock or patched; its copies are measured, in its mode.
        x: its input.
    """

    def kept(fuse: Callable[[nn.Module], Any]) -> int:
        twin = copy.deepcopy(model)
        unpatch(twin)
        fuse(twin)
        return saved_bytes(twin, lambda: twin(x))

    return SavedActivations(
        kept(lambda twin: None), kept(lambda twin: patch(twin)), kept(lambda twin: patch(twin, memory="low"))
    )


# ---------------------------------------------------------------------------------------------------------------------
# Peak resident memory
# ---------------------------------------------------------------------------------------------------------------------


def memory(
    name: str,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    variants: Sequence[str] = tuple(VARIANTS),
    begin: Callable[[str], None] = lambda stage: None,
    device: str = "cpu",
) -> tuple[MemoryUse, ...]:
    """Saved bytes and peak memory of a training step, for each of ``variants``, each in a process of its own.

    The peak is by how much the process's resident set grew from before the first step to its largest, or on a GPU the
    memory that tensors had; parameters and input are not in it, their gradients are.

    Args:
        name: of a model, as ``python -m fusedres explain`` takes it: it is built in the processes.
        shape: of the input, ``[N, C, H, W]``.
        dtype: of everything.
        variants: of :data:`VARIANTS`.
        begin: is told what comes next, for a progress bar.
        device: where it runs.

    Raises:
        ValueError: for a variant or a model that does not exist.
    """
    if unknown := [v for v in variants if v not in VARIANTS]:
        raise ValueError(f"variants must be of {', '.join(map(repr, VARIANTS))}, got {unknown[0]!r}")
    load_model(name)  # a wrong name is told here, not by every child
    shape, found = tuple(shape), []
    for variant in variants:
        begin(variant)
        use = MemoryUse(name, shape, str(dtype).removeprefix("torch."), variant, device)
        try:
            child = in_child(_step_in_child, name, shape, dtype, variant, torch.get_num_threads(), device)
        except RuntimeError as error:
            found.append(replace(use, missing=str(error).partition("\n")[0]))
        else:
            saved, before, peak = child.result
            found.append(replace(use, saved=saved, peak=(child.peak if peak is None else peak) - before))
    return tuple(found)


def _step_in_child(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, variant: str, threads: int, device: str
) -> tuple[int, int, int | None]:
    """Saved bytes, what was in memory before the first step, and the peak of a GPU's."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = load_model(name).to(device, dtype, memory_format=torch.channels_last).train()
    x = torch.randn(shape).to(device, dtype).contiguous(memory_format=torch.channels_last)
    on_gpu = x.is_cuda
    before = torch.cuda.memory_allocated() if on_gpu else resident()
    form = VARIANTS[variant](model)
    for _ in range(2):
        _loss(form(x)).backward()
        model.zero_grad()
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    with preserved(model):
        return saved_bytes(model, lambda: form(x)), before, peak


def _loss(output: Any) -> Tensor:
    return sum(t.float().square().mean() for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad)


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("models", nargs="*", default=["resnet18", "resnet50"], help="as for explain (default: two)")
    parser.add_argument("--shape", type=shape_argument, default=(8, 3, 224, 224), help="N,C,H,W (default 8,3,224,224)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default %(default)s)")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="leave out the rest")
    parser.add_argument(
        "--json",
        nargs="?",
        const="",
        metavar="FILE",
        help="write the results; without FILE to bench/results/<this machine>/memory.json",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", default=Path("fusedres-memory.svg"), help="the figure (default %(default)s)"
    )


def run(args: Namespace) -> int:
    if lacks("memory", "matplotlib"):
        return 2
    machine = this_machine(args.device)
    path = None if args.json is None else Path(args.json or f"bench/results/{machine.slug}/memory.json")
    found: dict[str, tuple[MemoryUse, ...]] = {}
    deadline, left_out = perf_counter() + args.budget, []

    def save() -> None:
        if path is not None:
            uses = tuple(use for each in found.values() for use in each)
            Results(machine, {"shape": list(args.shape), "left_out": left_out}, memory=uses).save(path)

    try:
        with stages(len(args.models) * len(args.variants), "memory") as begin:
            for name in args.models:
                if found and perf_counter() > deadline:
                    left_out.append(f"{name}: no time")
                    save()
                    continue
                found[name] = memory(
                    name,
                    args.shape,
                    variants=args.variants,
                    begin=lambda v, name=name: begin(f"{name}, {v}"),
                    device=args.device,
                )
                save()  # being cut off loses nothing
    except ValueError as error:
        console.print(f"fusedres memory: {error}")
        return 2
    title = f"training step, fp32, {'x'.join(map(str, args.shape))}"
    rows = [row for name, each in found.items() for row in _rows(name, each)]
    console.print(make_table(title, _HEAD, rows, CAVEATS))
    for what in left_out:
        console.print(f"left out: {what}")
    if path is not None:
        console.print(f"written to {path}")
    save_plot(args.out, found, title)
    console.print(f"figure: {args.out.resolve()}")
    return 0


CAVEATS = (
    "Peak: growth of a fresh process's resident set over its steps (on a GPU, of its tensors); torch.compile's has its "
    "compiler in it"
)
"""What a table or figure of these must say."""

_HEAD = ("model", "form", "saved for backward", "of stock", "peak", "of stock")


def _rows(name: str, each: Sequence[MemoryUse]) -> list[tuple[str, ...]]:
    stock = next((m for m in each if m.variant == "stock" and not m.missing), None)
    return [_row(name, m, stock) for m in each]


def _row(name: str, m: MemoryUse, stock: MemoryUse | None) -> tuple[str, ...]:
    if m.missing:
        return (name, m.variant, m.missing, "", "", "")
    return (
        name,
        m.variant,
        f"{m.saved / 1e6:.0f} MB",
        f"{m.saved / stock.saved:.2f}" if stock and stock.saved else "",
        f"{m.peak / 1e6:.0f} MB",
        f"{m.peak / stock.peak:.2f}" if stock and stock.peak else "",
    )


_COLOURS = dict(zip(VARIANTS, (COLOURS[c] for c in ("stock", "fused", "fused_low", "inductor", "other"))))


def save_plot(path: Path, found: Mapping[str, Sequence[MemoryUse]], title: str) -> None:
    """Saved bytes and peak by model, one bar per form."""
    figure, (axes,) = new_figure(1, 2, (6.0 + 2.6 * len(found), 4.8))
    figure.suptitle(title)
    variants = list(dict.fromkeys(m.variant for each in found.values() for m in each))
    width = 0.84 / len(variants)
    for axis, field, panel in zip(axes, ("saved", "peak"), ("saved for backward", "peak memory")):
        for place, variant in enumerate(variants):
            values = [next((m for m in each if m.variant == variant), None) for each in found.values()]
            heights = [getattr(m, field) / 1e6 if m else 0.0 for m in values]
            positions = [i + width * (place - (len(variants) - 1) / 2) for i in range(len(found))]
            bars = axis.bar(positions, heights, 0.92 * width, label=variant, color=_COLOURS[variant])
            labels = [f"{height:.0f}" if m and not m.missing else "none" for m, height in zip(values, heights)]
            axis.bar_label(bars, labels, fontsize=8)
        axis.set_xticks(range(len(found)), list(found))
        axis.set(title=panel, ylabel="MB")
    axes[0].legend(loc="upper left")
    save_figure(figure, path)
