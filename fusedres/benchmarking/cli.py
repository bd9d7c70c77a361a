"""``python -m fusedres bench``: ResNet-50 and a grid of blocks, eager and ``torch.compile`` beside us.

Correctness comes first: where a result is outside the budget of :mod:`fusedres.testing`, nothing is timed and no ratio
is printed.
"""

from __future__ import annotations

import copy
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from torch import nn

from .. import models
from ..console import console, make_table, stages
from ..patch import patch
from . import architectures, grid
from .agreement import verdict
from .compiled import CompileBudget
from .contest import contest
from .memory import saved_bytes
from .results import HEAD, Goal, Machine, Results, Row, this_machine
from .workloads import INFERENCE_BF16, INFERENCE_FP32, TRAIN_BF16, TRAIN_FP32, Batch, Workload, settle

__all__ = ["add_arguments", "run"]

_GOALS = {
    TRAIN_BF16: Goal(1.40, 1.80),
    TRAIN_FP32: Goal(1.20, 1.45),
    INFERENCE_BF16: Goal(3.0, 4.0),
    INFERENCE_FP32: Goal(1.6, 2.0),
}
_BATCH = (8, 224)
_OF_COMPILE = "; torch.compile with freezing in inference; its first step in parentheses"
_QUICK_SECONDS = 115.0
_AFTER_COMPILING = 35.0
"""Seconds of a quick run that are not spent on compiling, about."""


@dataclass(frozen=True)
class _Settings:
    """How long to measure."""

    train_turns: int
    inference_turns: int
    grid_turns: int
    grid_dtypes: tuple[torch.dtype | None, ...]
    grid_blocks: tuple[str, ...]

    def turns(self, workload: Workload) -> int:
        return self.train_turns if workload.training else self.inference_turns


_QUICK = _Settings(5, 9, 7, (None,), ("conv-bn-relu", "basic", "bottleneck"))
_FULL = _Settings(11, 25, 15, (None, torch.bfloat16), tuple(grid.BLOCKS))


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--architectures", action="store_true", help="a network of each kind instead of ResNet-50, eager beside us"
    )
    parser.add_argument("--quick", action="store_true", help="fewer turns; under two minutes on two cores")
    parser.add_argument(
        "--compile",
        choices=("auto", "always", "never"),
        default="auto",
        help="torch.compile as a contestant; auto: where --quick leaves the time (default)",
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const="",
        metavar="FILE",
        help="write the results; without FILE to bench/results/<this machine>/{quick,full,architectures}.json",
    )


def run(args: Namespace) -> int:
    """Exit status 1 where a check is red."""
    machine = this_machine()
    console.print(str(machine))
    settings = _QUICK if args.quick else _FULL
    if args.architectures:
        return _run_architectures(args, machine, settings)
    rows, cells = _measure(settings, _compile_budget(args))
    console.print(make_table("", HEAD, [row.cells() for row in rows], _caption(settings) + _OF_COMPILE))
    _print_slow(cells)
    size, resolution = _BATCH
    measured = {"quick": args.quick, "network": "ResNet-50", "batch": size, "resolution": resolution}
    results = Results(machine, measured, rows, [cell.to_dict() for cell in cells])
    return _finish(args, results, "quick" if args.quick else "full")


def _run_architectures(args: Namespace, machine: Machine, settings: _Settings) -> int:
    rows: list[Row] = []
    with stages(len(architectures.ARCHITECTURES), "bench") as begin:
        for architecture in architectures.ARCHITECTURES:
            begin(f"{architecture.name}: agreement with float64, then time")
            rows += architectures.measure(architecture, settings.train_turns, settings.inference_turns)
    rows.append(architectures.ode_row())
    cells = [architectures.cells(row) for row in rows]
    console.print(make_table("", architectures.HEAD, cells, _caption(settings)))
    measured = {"quick": args.quick, "batch": architectures.BATCH}
    return _finish(args, Results(machine, measured, tuple(rows), []), "architectures")


def _finish(args: Namespace, results: Results, name: str) -> int:
    """Saves the results if that was asked for; exit status 1 where a check is red."""
    if args.json is not None:
        path = Path(args.json or f"bench/results/{results.machine.slug}/{name}.json")
        results.save(path)
        console.print(f"written to {path}")
    return 0 if all(row.check in ("", "ok") for row in results.rows) else 1


def _caption(settings: _Settings) -> str:
    return (
        f"Medians of {settings.train_turns} (train) and {settings.inference_turns} (inference) turns, interleaved; "
        "channels_last"
    )


def _compile_budget(args: Namespace) -> CompileBudget:
    if args.compile == "never":
        return CompileBudget(float("-inf"))
    if args.quick and args.compile == "auto":
        return CompileBudget(perf_counter() + _QUICK_SECONDS, _AFTER_COMPILING)
    return CompileBudget(float("inf"))


def _measure(settings: _Settings, budget: CompileBudget) -> tuple[tuple[Row, ...], list[grid.Cell]]:
    cases = list(grid.cases(settings.grid_dtypes, settings.grid_blocks))
    with stages(len(_GOALS) + 3 + len(cases) // len(grid.SHAPES), "bench") as begin:
        begin("patch()")
        torch.manual_seed(0)
        model = models.resnet50(fused=False).to(memory_format=torch.channels_last)
        patch_row = _patch_row(model)
        batch = Batch.random(*_BATCH)
        begin("running statistics")
        settle(model, batch.images)
        rows = [_workload_row(w, goal, model, batch, settings, budget, begin) for w, goal in _GOALS.items()]
        begin("bytes saved for backward")
        checked = next(row.check for row in rows if row.name == TRAIN_FP32.name)
        rows += _bytes_rows(model, batch, checked)
        cells = list(_grid_cells(cases, settings, begin))
    return (*rows, patch_row, *_grid_rows(cells)), cells


# ---------------------------------------------------------------------------------------------------------------------
# The rows
# ---------------------------------------------------------------------------------------------------------------------


def _patch_row(model: nn.Module) -> Row:
    twin = copy.deepcopy(model)
    start = perf_counter()
    patch(twin)
    seconds = perf_counter() - start
    return Row("patch() itself", "s", Goal(2.0, 0.3, True, " s"), ours=seconds, goal_of="ours")


def _workload_row(
    workload: Workload,
    goal: Goal,
    model: nn.Module,
    batch: Batch,
    settings: _Settings,
    budget: CompileBudget,
    begin: Callable[[str], None],
) -> Row:
    begin(f"{workload.name}: agreement with float64, then time")
    check = verdict(workload.check(model, lambda seed: Batch.random(*_BATCH, seed).images))
    if check != "ok":
        return Row(workload.name, "ms", goal, check=check)
    found = contest(workload, model, batch, settings.turns(workload), budget)
    eager, ours, theirs = (found.times.get(name) for name in ("eager", "fusedres", "torch.compile"))
    return Row(
        workload.name,
        "ms",
        goal,
        eager=1e3 * eager.median,
        compiled=None if theirs is None else 1e3 * theirs.median,
        ours=1e3 * ours.median,
        ratio=found.speedup_over("eager"),
        compile_ratio=found.speedup_over("torch.compile"),
        images_per_second=len(batch) / ours.median,
        compile_note=found.compile_note,
        check="ok",
        spread={name: timing.to_dict() for name, timing in found.times.items()},
    )


def _bytes_rows(model: nn.Module, batch: Batch, check: str) -> list[Row]:
    name = "bytes saved for backward, fp32"
    stock = _saved(model, batch, None)
    return [
        _bytes_row(name, Goal(0.85, None, True), stock, _saved(model, batch, "auto"), check),
        _bytes_row(
            f'{name}, memory="low"',
            Goal(0.85, 0.55, True),
            stock,
            _saved(model, batch, "low"),
            verdict(TRAIN_FP32.check(model, lambda seed: Batch.random(2, 64, seed).images, memory="low")),
        ),
    ]


def _saved(model: nn.Module, batch: Batch, memory: str | None) -> int:
    twin = TRAIN_FP32.prepared(model)
    if memory is not None:
        patch(twin, memory=memory)
    return saved_bytes(twin, lambda: batch.loss(twin(batch.images)))


def _bytes_row(name: str, goal: Goal, stock: int, ours: int, check: str) -> Row:
    ratio = ours / stock if check == "ok" else None
    return Row(name, "MB", goal, eager=stock / 1e6, ours=ours / 1e6, ratio=ratio, check=check)


# ---------------------------------------------------------------------------------------------------------------------
# The grid
# ---------------------------------------------------------------------------------------------------------------------


def _grid_cells(cases: list[grid.Case], settings: _Settings, begin: Callable[[str], None]) -> Iterator[grid.Cell]:
    for i, case in enumerate(cases):
        if i % len(grid.SHAPES) == 0:
            begin(f"{case.group} blocks")
        yield grid.measure(case, settings.grid_turns)


def _grid_rows(cells: list[grid.Cell]) -> list[Row]:
    return [_grid_row(cells, training) for training in (True, False)]


def _grid_row(cells: list[grid.Cell], training: bool) -> Row:
    ours = [cell for cell in cells if cell.case.training is training]
    goal = Goal(grid.NOT_SLOWER)
    title = f"worst of {len(ours)} blocks, {'train' if training else 'inference'}"
    red = [cell for cell in ours if cell.check != "ok"]
    if red:
        return Row(title, "ms", goal, check=f"{red[0].case}: {red[0].check}")
    worst = min(ours, key=lambda cell: cell.ratio)
    eager, fused = (1e3 * worst.times[contestant].median for contestant in ("eager", "fusedres"))
    return Row(title, "ms", goal, eager=eager, ours=fused, ratio=worst.ratio, check="ok")


def _print_slow(cells: list[grid.Cell]) -> None:
    timed = sorted((cell for cell in cells if cell.ratio is not None), key=lambda cell: cell.ratio)
    slow = [cell for cell in timed if cell.ratio < grid.NOT_SLOWER]
    for cell in slow or timed[:1]:
        console.print(f"{'slower than eager' if slow else 'worst block'}: {cell.case}: {cell.ratio:.2f}x")
