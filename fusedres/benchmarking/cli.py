"""``python -m fusedres bench``: ResNet-50 and a grid of blocks, with everyone who can run them beside us.

Correctness comes first: where a result is outside the budget of :mod:`fusedres.testing`, nothing is timed and no ratio
is printed. There is a budget of time, too: what matters most is measured first, and what did not fit is named.
"""

from __future__ import annotations

import copy
import gc
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter

import torch
from torch import nn

from .. import models
from ..analysis.devices import device_of
from ..analysis.traffic import Traffic, traffic_on
from ..console import console, make_table, stages
from ..patch import patch
from . import architectures, grid
from .agreement import verdict
from .budget import TimeBudget
from .contest import contest
from .memory import saved_bytes
from .peers import BASELINE, COMPILE, OURS, PEERS, Peer, peers_named
from .results import HEAD, Goal, Machine, Measurement, Results, Row, quantity, this_machine, times
from .shapes import BATCH
from .workloads import INFERENCE_BF16, INFERENCE_FP32, TRAIN_BF16, TRAIN_FP32, Batch, Workload, settle

__all__ = ["add_arguments", "run"]

_GOALS = {
    TRAIN_BF16: Goal(1.40, 1.80),
    TRAIN_FP32: Goal(1.20, 1.45),
    INFERENCE_BF16: Goal(3.0, 4.0),
    INFERENCE_FP32: Goal(1.6, 2.0),
}
_NETWORK = "ResNet-50"


@dataclass(frozen=True)
class _Settings:
    """How long to measure.

    Attributes:
        seconds: in all.
        reserve: seconds of these that the stages behind the contests need.
        checked: how many images of a batch a training step is checked with. Float64 takes seconds; inference is always
            checked with all, since some peers take one size only.
        grid_seconds: for which a block is timed.
        peers: who takes part where nobody was named.
        fair: whether a contest leaves the later ones the time to compile, too; where there is hardly time for one, the
            first that fits takes it.
    """

    seconds: float
    reserve: float
    train_turns: int
    inference_turns: int
    checked: int
    grid_seconds: float
    grid_dtypes: tuple[torch.dtype | None, ...]
    grid_blocks: tuple[str, ...]
    peers: tuple[Peer, ...]
    fair: bool

    def needed(self, workload: Workload) -> float:
        """About what a contest takes on two cores, with those contestants alone that should not be missing."""
        compiling = COMPILE.seconds[not workload.training] if self.fair and COMPILE in self.peers else 0.0
        return (14.0 if workload.training else 6.0) + compiling

    def turns(self, workload: Workload) -> int:
        return self.train_turns if workload.training else self.inference_turns


_QUICK = _Settings(
    seconds=112.0,
    reserve=28.0,
    train_turns=7,
    inference_turns=9,
    checked=BATCH[0] // 2,
    grid_seconds=0.3,
    grid_dtypes=(None,),
    grid_blocks=("conv-bn-relu", "basic", "bottleneck"),
    peers=tuple(peer for peer in PEERS if peer.name in ("eager", "fusedres", "torch.compile", "OpenVINO")),
    fair=False,
)
_FULL = _Settings(
    seconds=660.0,
    reserve=170.0,
    train_turns=11,
    inference_turns=25,
    checked=BATCH[0],
    grid_seconds=0.5,
    grid_dtypes=(None, torch.bfloat16),
    grid_blocks=tuple(grid.BLOCKS),
    peers=PEERS,
    fair=True,
)

_CELL_SECONDS = 1.5


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--architectures", action="store_true", help="a network of each kind instead of ResNet-50, eager beside us"
    )
    parser.add_argument("--quick", action="store_true", help="fewer turns, fewer peers; under two minutes on two cores")
    parser.add_argument(
        "--peers", nargs="+", metavar="NAME", help=f"besides eager and us: {', '.join(p.name for p in PEERS[2:])}"
    )
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="leave out what does not fit")
    parser.add_argument(
        "--json",
        nargs="?",
        const="",
        metavar="FILE",
        help="write the results; without FILE to bench/results/<this machine>/{quick,full,architectures}.json",
    )


def run(args: Namespace) -> int:
    """Exit status 1 where a check is red, 2 for a peer that does not exist."""
    try:
        settings = _settings(args)
    except ValueError as error:
        console.print(f"fusedres bench: {error}")
        return 2
    report = _Report(this_machine(), args, settings, TimeBudget.of(settings.seconds))
    console.print(str(report.machine))
    (_run_architectures if args.architectures else _run_resnet50)(report)
    return report.finish()


def _settings(args: Namespace) -> _Settings:
    settings = _QUICK if args.quick else _FULL
    seconds = _ARCHITECTURES_SECONDS if args.architectures and args.budget is None else args.budget
    if seconds is not None:
        settings = replace(settings, seconds=seconds, reserve=settings.reserve * seconds / settings.seconds)
    if args.peers is not None:
        settings = replace(settings, peers=tuple(dict.fromkeys((BASELINE, OURS, *peers_named(args.peers)))))
    return settings


@dataclass
class _Report:
    """What has been found so far, saved again after every stage, so that being cut off loses nothing."""

    machine: Machine
    args: Namespace
    settings: _Settings
    budget: TimeBudget
    rows: list[Row] = field(default_factory=list)
    cells: list[grid.Cell] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)
    traffic: list[Traffic] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def path(self) -> Path | None:
        if self.args.json is None:
            return None
        name = "architectures" if self.args.architectures else "quick" if self.args.quick else "full"
        return Path(self.args.json or f"bench/results/{self.machine.slug}/{name}.json")

    def save(self) -> None:
        if self.path is not None:
            self._results().save(self.path)

    def _results(self) -> Results:
        size, resolution = BATCH
        measured = {
            "quick": self.args.quick,
            "network": None if self.args.architectures else _NETWORK,
            "batch": size,
            "resolution": resolution,
            "budget": self.settings.seconds,
            "left_out": self.left_out,
        }
        here = [t.device for t in self.traffic]
        return Results(
            self.machine,
            measured,
            tuple(self.rows),
            [cell.to_dict() for cell in self.cells],
            (*self.measurements, *(m for cell in self.cells for m in cell.measurements)),
            traffic=tuple(t.to_dict() for t in self.traffic),
            roofline=_roofline(here),
        )

    def finish(self) -> int:
        """Says what was left out and where the results are; exit status 1 where a check is red."""
        self.save()
        for what in self.left_out:
            console.print(f"left out: {what}")
        if self.path is not None:
            console.print(f"written to {self.path}")
        return 0 if all(row.check in ("", "ok") for row in self.rows) else 1


def _roofline(devices: Sequence) -> dict:
    """The peaks of the device, for all dtypes that were measured."""
    if not devices:
        return {}
    arithmetic = {str(d).removeprefix("torch."): v for device in devices for d, v in device.arithmetic.items()}
    return {"name": devices[0].name, "bandwidth": devices[0].bandwidth, "arithmetic": arithmetic}


# ---------------------------------------------------------------------------------------------------------------------
# ResNet-50
# ---------------------------------------------------------------------------------------------------------------------


def _run_resnet50(report: _Report) -> None:
    settings = report.settings
    cases = list(grid.cases(settings.grid_dtypes, settings.grid_blocks))
    with stages(len(_GOALS) + 4 + len(cases) // len(grid.SHAPES), "bench") as begin:
        begin("patch()")
        torch.manual_seed(0)
        model = models.resnet50(fused=False).to(memory_format=torch.channels_last)
        patch_row = _patch_row(model)
        batches = Batch.several(*BATCH)
        begin("running statistics")
        settle(model, batches[0].images)
        begin("the model of memory traffic")
        modelled = _modelled(model, batches[0])
        report.traffic += modelled.values()
        for workload, goal in _GOALS.items():
            report.rows.append(_contest_row(report, workload, goal, model, batches, modelled[workload], begin))
        begin("bytes saved for backward")
        checked = next(row.check for row in report.rows if row.name == TRAIN_FP32.name)
        report.rows += [*_bytes_rows(model, batches[0], checked), patch_row]
        with _frozen_garbage():
            _measure_grid(report, cases, begin)
        report.rows += _grid_rows(report.cells)
    console.print(make_table("", HEAD, [row.cells() for row in report.rows], _caption(settings)))
    _print_contestants(report.measurements)
    _print_slow(report.cells)


def _caption(settings: _Settings) -> str:
    return (
        f"Medians of {settings.train_turns} (train) and {settings.inference_turns} (inference) turns, interleaved; "
        "channels_last; torch.compile with freezing in inference; its first step in parentheses"
    )


def _modelled(model: nn.Module, batch: Batch) -> dict[Workload, Traffic]:
    """What this device would need at the least, by workload."""
    here = {dtype: device_of(batch.images.device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    return {w: _traffic_of(w, model, batch, here[w.autocast or w.dtype]) for w in _GOALS}


def _traffic_of(workload: Workload, model: nn.Module, batch: Batch, device) -> Traffic:
    shape, dtype = tuple(batch.images.shape), workload.autocast or workload.dtype
    return traffic_on([device], model, shape, dtype, training=workload.training)[0]


def _patch_row(model: nn.Module) -> Row:
    twin = copy.deepcopy(model)
    start = perf_counter()
    patch(twin)
    seconds = perf_counter() - start
    return Row("patch() itself", "s", Goal(2.0, 0.3, True, " s"), ours=seconds, goal_of="ours")


def _contest_row(
    report: _Report,
    workload: Workload,
    goal: Goal,
    model: nn.Module,
    batches: Sequence[Batch],
    modelled: Traffic | None,
    begin: Callable[[str], None],
) -> Row:
    needed = report.settings.needed(workload)
    if report.rows and (reason := report.budget.refuses("a contest", needed)):
        report.left_out.append(f"{workload.name}: {reason}")
        return Row(workload.name, "ms", goal)
    begin(f"{workload.name}: agreement with float64, then time")
    start = perf_counter()
    order = list(_GOALS)
    behind = sum(map(report.settings.needed, order[order.index(workload) + 1 :])) + report.settings.reserve
    finishes = contest(
        _NETWORK,
        workload,
        model,
        batches,
        report.settings.peers,
        turns=report.settings.turns(workload),
        budget=report.budget.within(behind),
        modelled=modelled,
        memory=True,
        depth=50,
        checked=batches[0].first(report.settings.checked) if workload.training else None,
    )
    found = {f.measurement.contestant: f.measurement for f in finishes}
    report.measurements += found.values()
    report.left_out += [f"{workload.name}, {m.contestant}: {m.missing}" for m in found.values() if _no_time(m)]
    report.left_out += _turns_left_out(workload, report.settings.turns(workload), found)
    report.budget.spent("a contest", needed, perf_counter() - start)
    report.save()
    return _row(workload.name, goal, found)


def _no_time(measurement: Measurement) -> bool:
    return measurement.missing.startswith("no time")


def _turns_left_out(workload: Workload, turns: int, found: dict[str, Measurement]) -> list[str]:
    """What to say where a contest had time for fewer turns: all of its contestants have had as many."""
    taken = min((m.seconds["turns"] for m in found.values() if m.seconds is not None), default=turns)
    return [f"{workload.name}: no time for {turns - taken} of {turns} turns"] if taken < turns else []


def _row(name: str, goal: Goal, found: dict[str, Measurement]) -> Row:
    eager, ours, compiled = found[BASELINE.name], found[OURS.name], found.get(COMPILE.name)
    if ours.seconds is None:
        return Row(name, "ms", goal, check=ours.check)
    return Row(
        name,
        "ms",
        goal,
        eager=_milliseconds(eager),
        compiled=_milliseconds(compiled),
        ours=_milliseconds(ours),
        ratio=ours.speedup.get(BASELINE.name),
        compile_ratio=ours.speedup.get(COMPILE.name),
        images_per_second=ours.images_per_second,
        compile_note="not asked for" if compiled is None else compiled.remark,
        check=ours.check,
        spread={name: m.seconds for name, m in found.items() if m.seconds is not None},
    )


def _milliseconds(measurement: Measurement | None) -> float | None:
    if measurement is None or measurement.seconds is None:
        return None
    return 1e3 * measurement.seconds["median"]


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
# Everyone
# ---------------------------------------------------------------------------------------------------------------------

_CONTESTANTS_HEAD = (
    "workload",
    "contestant",
    "median",
    "quartiles",
    "images/s",
    "fusedres over it",
    "measured / model",
    "saved",
    "first step",
    "check, or why it is missing",
)


def _print_contestants(measurements: Sequence[Measurement]) -> None:
    ours = {m.group: m for m in measurements if m.contestant == OURS.name}
    rows = [_contestant_row(m, ours[m.group]) for m in measurements if m.group in ours]
    caption = (
        "measured / model: times what the device's bandwidth and arithmetic allow for the traffic that is modelled"
    )
    console.print(make_table("", _CONTESTANTS_HEAD, rows, caption))


def _contestant_row(m: Measurement, ours: Measurement) -> tuple[str, ...]:
    workload = f"{m.workload}, {m.dtype}" + (" autocast" if m.autocast else "")
    if m.seconds is None:
        return (workload, m.contestant, *[""] * 7, m.missing or m.check)
    q1, median, q3 = (1e3 * m.seconds[key] for key in ("q1", "median", "q3"))
    return (
        workload,
        m.contestant,
        quantity(median, "ms"),
        f"{q1:.3g} to {q3:.3g}",
        f"{m.images_per_second:.1f}",
        times(ours.speedup.get(m.contestant)),
        "" if m.of_roofline is None else times(1 / m.of_roofline),
        "" if m.saved is None else quantity(m.saved / 1e6, "MB"),
        quantity(m.first_step, "s"),
        "the measure" if m.baseline else m.check,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Blocks
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def _frozen_garbage() -> Iterator[None]:
    """Collections pass over what there is already: to look through PyTorch takes longer than to time a small block."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _measure_grid(report: _Report, cases: Sequence[grid.Case], begin: Callable[[str], None]) -> None:
    for i, case in enumerate(cases):
        if i % len(grid.SHAPES) == 0:
            begin(f"{case.group} blocks")
            report.save()
        if reason := report.budget.refuses("a block", _CELL_SECONDS):
            report.left_out.append(f"{len(cases) - i} of {len(cases)} blocks: {reason}")
            return
        start = perf_counter()
        report.cells.append(grid.measure(case, report.settings.grid_seconds))
        report.budget.spent("a block", _CELL_SECONDS, perf_counter() - start)


def _grid_rows(cells: Sequence[grid.Cell]) -> list[Row]:
    return [_grid_row(cells, training) for training in (True, False) if any(c.case.training is training for c in cells)]


def _grid_row(cells: Sequence[grid.Cell], training: bool) -> Row:
    ours = [cell for cell in cells if cell.case.training is training]
    goal = Goal(grid.NOT_SLOWER)
    title = f"worst of {len(ours)} blocks, {'train' if training else 'inference'}"
    red = [cell for cell in ours if cell.check != "ok"]
    if red:
        return Row(title, "ms", goal, check=f"{red[0].case}: {red[0].check}")
    worst = min(ours, key=lambda cell: cell.ratio)
    eager, fused = (1e3 * worst.times[contestant].median for contestant in ("eager", "fusedres"))
    return Row(title, "ms", goal, eager=eager, ours=fused, ratio=worst.ratio, check="ok")


def _print_slow(cells: Sequence[grid.Cell]) -> None:
    timed = sorted((cell for cell in cells if cell.ratio is not None), key=lambda cell: cell.ratio)
    slow = [cell for cell in timed if cell.ratio < grid.NOT_SLOWER]
    for cell in slow or timed[:1]:
        console.print(f"{'slower than eager' if slow else 'worst block'}: {cell.case}: {cell.ratio:.2f}x")


# ---------------------------------------------------------------------------------------------------------------------
# Other architectures
# ---------------------------------------------------------------------------------------------------------------------

_ARCHITECTURE_SECONDS = 40.0
_ARCHITECTURES_SECONDS = 240.0
"""One of them, about, and all, where nothing else was asked for."""


def _run_architectures(report: _Report) -> None:
    settings = report.settings
    with stages(len(architectures.ARCHITECTURES), "bench") as begin:
        for architecture in architectures.ARCHITECTURES:
            if reason := report.budget.refuses("a network", _ARCHITECTURE_SECONDS):
                report.left_out.append(f"{architecture.name}: {reason}")
                continue
            begin(f"{architecture.name}: agreement with float64, then time")
            start = perf_counter()
            for found in architectures.measure(architecture, settings.train_turns, settings.inference_turns):
                report.rows.append(found.row)
                report.measurements += found.measurements
            report.budget.spent("a network", _ARCHITECTURE_SECONDS, perf_counter() - start)
            report.save()
    report.rows.append(architectures.ode_row())
    cells = [architectures.cells(row) for row in report.rows]
    console.print(make_table("", architectures.HEAD, cells, _caption(settings)))
