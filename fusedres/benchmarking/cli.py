"""``python -m fusedres bench``: ResNet-50 and a grid of blocks, eager and ``torch.compile`` beside us.

Correctness comes first: where a result is outside the budget of :mod:`fusedres.testing`, nothing is timed and no ratio
is printed.
"""

from __future__ import annotations

import gc
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
from . import grid
from .agreement import verdict
from .compiled import CompileBudget, Compiled, compile_contestant
from .memory import saved_bytes
from .results import HEAD, Goal, Results, Row, this_machine
from .timing import Timing, interleave, speedup
from .workloads import INFERENCE_BF16, INFERENCE_FP32, TRAIN_BF16, TRAIN_FP32, Batch, Workload, settle

__all__ = ["add_arguments", "run"]

_GOALS = {
    TRAIN_BF16: Goal(1.40, 1.80),
    TRAIN_FP32: Goal(1.20, 1.45),
    INFERENCE_BF16: Goal(3.0, 4.0),
    INFERENCE_FP32: Goal(1.6, 2.0),
}
_BATCH = (8, 224)
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

    def turns(self, workload: Workload) -> int:
        return self.train_turns if workload.training else self.inference_turns


_QUICK = _Settings(5, 9, 7, (None,))
_FULL = _Settings(11, 25, 15, (None, torch.bfloat16))


def add_arguments(parser: ArgumentParser) -> None:
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
        help="write the results; without FILE to bench/results/<this machine>/{quick,full}.json",
    )


def run(args: Namespace) -> int:
    """Exit status 1 where a check is red."""
    machine = this_machine()
    console.print(str(machine))
    settings = _QUICK if args.quick else _FULL
    rows, cells = _measure(settings, _compile_budget(args))
    console.print(make_table("", HEAD, [row.cells() for row in rows], _caption(settings)))
    _print_slow(cells)
    if args.json is not None:
        path = Path(args.json or f"bench/results/{machine.slug}/{'quick' if args.quick else 'full'}.json")
        options = {
            "quick": args.quick,
            "compile": args.compile,
            "network": "ResNet-50",
            "batch": _BATCH[0],
            "resolution": _BATCH[1],
        }
        Results(machine, options, rows, [cell.to_dict() for cell in cells]).save(path)
        console.print(f"written to {path}")
    return 0 if all(row.check in ("", "ok") for row in rows) else 1


def _caption(settings: _Settings) -> str:
    return (
        f"Medians of {settings.train_turns} (train) and {settings.inference_turns} (inference) turns, interleaved; "
        "channels_last; torch.compile with freezing in inference; its first step in parentheses"
    )


def _compile_budget(args: Namespace) -> CompileBudget:
    if args.compile == "never":
        return CompileBudget(float("-inf"))
    if args.quick and args.compile == "auto":
        return CompileBudget(perf_counter() + _QUICK_SECONDS, _AFTER_COMPILING)
    return CompileBudget(float("inf"))


def _measure(settings: _Settings, budget: CompileBudget) -> tuple[tuple[Row, ...], list[grid.Cell]]:
    cases = list(grid.cases(settings.grid_dtypes))
    with stages(len(_GOALS) + 3 + len(cases), "bench") as begin:
        begin("patch()")
        torch.manual_seed(0)
        model = models.resnet50(fused=False).to(memory_format=torch.channels_last)
        patch_row = _patch_row(model)
        batch = Batch.random(*_BATCH)
        begin("running statistics")
        settle(model, batch.images)
        rows = [_workload_row(w, goal, model, batch, settings, budget, begin) for w, goal in _GOALS.items()]
        begin("bytes saved for backward")
        rows += _bytes_rows(model, batch)
        cells = list(_grid_cells(cases, settings, begin))
    return (*rows, patch_row, *_grid_rows(cells)), cells


# ---------------------------------------------------------------------------------------------------------------------
# The rows
# ---------------------------------------------------------------------------------------------------------------------


def _patch_row(model: nn.Module) -> Row:
    twin = models.resnet50(fused=False).to(memory_format=torch.channels_last)
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
    make_step = workload.stepper(batch)
    stock, ours = workload.prepared(model), workload.prepared(model)
    patch(ours)
    compiled = compile_contestant(stock, make_step, workload.training, budget)
    calls = {"eager": make_step(stock), "torch.compile": compiled.step, "fusedres": make_step(ours)}
    times = interleave({k: call for k, call in calls.items() if call}, turns=settings.turns(workload))
    gc.collect()
    return _timed_row(workload.name, goal, times, compiled, len(batch))


def _timed_row(name: str, goal: Goal, times: dict[str, Timing], compiled: Compiled, images: int) -> Row:
    eager, ours, theirs = times["eager"], times["fusedres"], times.get("torch.compile")
    return Row(
        name,
        "ms",
        goal,
        eager=1e3 * eager.median,
        compiled=None if theirs is None else 1e3 * theirs.median,
        ours=1e3 * ours.median,
        ratio=speedup(eager, ours),
        compile_ratio=None if theirs is None else speedup(theirs, ours),
        images_per_second=images / ours.median,
        compile_note=_compile_note(compiled),
        check="ok",
        spread={contestant: timing.to_dict() for contestant, timing in times.items()},
    )


def _compile_note(compiled: Compiled) -> str:
    if compiled.first_step is None:
        return compiled.missing
    return f"({compiled.first_step:.0f} s{', cached' if compiled.cached else ''})"


def _bytes_rows(model: nn.Module, batch: Batch) -> list[Row]:
    name = "bytes saved for backward, fp32"
    stock = _saved(model, batch, None)
    return [
        _bytes_row(name, Goal(0.85, None, True), stock, _saved(model, batch, "auto"), "ok"),
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
    for case in cases:
        begin(str(case))
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
    name = f"{title}: {worst.case.block} {'x'.join(map(str, worst.case.shape))}"
    eager, fused = (1e3 * worst.times[contestant].median for contestant in ("eager", "fusedres"))
    return Row(name, "ms", goal, eager=eager, ours=fused, ratio=worst.ratio, check="ok")


def _print_slow(cells: list[grid.Cell]) -> None:
    slow = [cell for cell in cells if cell.ratio is not None and cell.ratio < grid.NOT_SLOWER]
    for cell in sorted(slow, key=lambda cell: cell.ratio):
        console.print(f"slower than eager: {cell.case}: {cell.ratio:.2f}x")
