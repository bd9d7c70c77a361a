"""The demo's stages and what it prints."""

from __future__ import annotations

import copy
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from torch import nn

from .. import models
from ..benchmarking.agreement import summaries, verdict
from ..benchmarking.budget import TimeBudget
from ..benchmarking.contest import contest
from ..benchmarking.memory import saved_bytes
from ..benchmarking.peers import BASELINE, COMPILE, OURS
from ..benchmarking.results import Measurement, this_machine
from ..benchmarking.rotation import copies
from ..benchmarking.workloads import INFERENCE_BF16, INFERENCE_FP32, TRAIN_BF16, TRAIN_FP32, Batch, Workload, settle
from ..console import console, lacks, make_table, stages
from ..patch import patch
from ..testing import Comparison
from .data import digits, photographs
from .plot import save_figure
from .training import Training, deviation, train

__all__ = ["add_arguments", "run"]

_WORKLOADS = (TRAIN_FP32, TRAIN_BF16, INFERENCE_FP32, INFERENCE_BF16)
_SECONDS = 225.0
_AFTER_COMPILING = 60.0
"""Seconds of the demo that are not spent on compiling once compiling begins, about."""


@dataclass(frozen=True)
class _Settings:
    """How much to do.

    Attributes:
        compared: how many of the images the agreement is measured on; float64 is slow.
        turns: of every timing.
        epochs: of the training.
    """

    compared: int
    turns: int
    epochs: int


_QUICK = _Settings(compared=2, turns=3, epochs=3)
_FULL = _Settings(compared=8, turns=7, epochs=8)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="under a minute: fewer turns, no torch.compile")
    parser.add_argument("--plot", type=Path, default=Path("fusedres-demo.png"), help="where to write the figure")


def run(args: Namespace) -> int:
    """Exit status 1 where a result is outside its error budget, 2 where a package is missing."""
    if lacks("the demo", "sklearn", "matplotlib", "PIL"):
        return 2
    settings = _QUICK if args.quick else _FULL
    machine = str(this_machine())
    console.print(machine)
    deadline = float("-inf") if args.quick else perf_counter() + _SECONDS
    speeds, agreed = _resnet50(settings, TimeBudget(deadline, _AFTER_COMPILING))
    trainings = _digits(settings)
    save_figure(args.plot, trainings, speeds, machine)
    console.print(f"figure: {args.plot.resolve()}")
    return 0 if agreed else 1


# ---------------------------------------------------------------------------------------------------------------------
# ResNet-50 on photographs
# ---------------------------------------------------------------------------------------------------------------------


def _resnet50(settings: _Settings, budget: TimeBudget) -> tuple[dict[str, dict[str, float]], bool]:
    """Prints everything about ResNet-50; returns images/s by workload and contestant, and whether all agreed."""
    torch.manual_seed(0)
    model = models.resnet50(fused=False).to(memory_format=torch.channels_last)
    batch = Batch(photographs(), torch.randint(1000, (8,)))
    settle(model, batch.images)
    console.print()
    console.print(str(patch(copy.deepcopy(model))))
    console.print()
    with stages(3 + 2 * len(_WORKLOADS), "ResNet-50") as begin:
        begin("seconds until the first step")
        first_steps = _first_steps(model, batch)
        begin("bytes saved for backward")
        saved = {name: _saved(model, batch, memory) for name, memory in _MEMORY.items()}
        comparisons = {w: _compared(w, model, batch.images[: settings.compared], begin) for w in _WORKLOADS}
        contests = {w: _timed(w, model, batch, settings.turns, budget, begin) for w in _WORKLOADS if comparisons[w].ok}
    _print_agreement(comparisons)
    _print_costs(first_steps, saved, contests.get(TRAIN_FP32))
    _print_speeds(comparisons, contests)
    speeds = {
        w.name: {name: m.images_per_second for name, m in found.items() if m.seconds} for w, found in contests.items()
    }
    return speeds, len(contests) == len(_WORKLOADS)


_CONTESTANTS = (BASELINE, OURS, COMPILE)
_MEMORY = {"eager": None, "fusedres": "auto", 'fusedres, memory="low"': "low"}


def _first_steps(model: nn.Module, batch: Batch) -> dict[str, float]:
    """Seconds from a model to the end of its first training step, patching included."""
    seconds = {}
    for name in ("eager", "fusedres"):
        twin = TRAIN_FP32.prepared(model)
        start = perf_counter()
        if name == "fusedres":
            patch(twin)
        TRAIN_FP32.stepper(batch)(twin)()
        seconds[name] = perf_counter() - start
    return seconds


def _saved(model: nn.Module, batch: Batch, memory: str | None) -> int:
    twin = TRAIN_FP32.prepared(model)
    if memory is not None:
        patch(twin, memory=memory)
    return saved_bytes(twin, lambda: batch.loss(twin(batch.images)))


def _compared(workload: Workload, model: nn.Module, images: torch.Tensor, begin: Callable[[str], None]) -> Comparison:
    begin(f"agreement with float64: {workload.name}")
    return workload.check(model, lambda seed: images.roll(seed, 3).contiguous(memory_format=torch.channels_last))


def _timed(
    workload: Workload,
    model: nn.Module,
    batch: Batch,
    turns: int,
    budget: TimeBudget,
    begin: Callable[[str], None],
) -> dict[str, Measurement]:
    begin(f"time: {workload.name}")
    batches = [Batch(batch.shifted(i), batch.classes) for i in range(copies(batch.images.nbytes))]
    finishes = contest("ResNet-50", workload, model, batches, _CONTESTANTS, turns=turns, budget=budget)
    return {f.measurement.contestant: f.measurement for f in finishes}


def _print_agreement(comparisons: dict[Workload, Comparison]) -> None:
    rows = [
        (w.name, s.kind, str(s.count), f"{s.stock:.1e}", f"{s.ours:.1e}", f"{s.budget_used:.2f}", verdict(comparison))
        for w, comparison in comparisons.items()
        for s in summaries(comparison)
        if w.training or s.kind == "output"
    ]
    head = ("agreement with float64", "what", "tensors", "error of stock", "error of fusedres", "of its budget", "")
    caption = (
        "Relative errors, medians over the tensors. Budget: twice the error of stock; share: the worst tensor's.\n"
        "The bf16 gradients of a deep network that was never trained are mostly rounding, in stock too."
    )
    console.print(make_table("", head, rows, caption))


def _print_costs(first_steps: dict[str, float], saved: dict[str, int], timed: dict[str, Measurement] | None) -> None:
    compiled = timed[COMPILE.name] if timed else None
    first = "" if compiled is None or compiled.first_step is None else f"{compiled.first_step:.1f} s"
    low = saved['fusedres, memory="low"']
    rows = [
        (
            "bytes saved for backward, fp32",
            f"{saved['eager'] / 1e6:.0f} MB",
            "",
            f'{saved["fusedres"] / 1e6:.0f} MB, {low / 1e6:.0f} MB with memory="low"',
        ),
        (
            "seconds until the first step, fp32",
            f"{first_steps['eager']:.1f} s",
            first,
            f"{first_steps['fusedres']:.1f} s",
        ),
    ]
    console.print(make_table("", ("costs", "eager", "torch.compile", "fusedres"), rows))


def _print_speeds(comparisons: dict[Workload, Comparison], contests: dict[Workload, dict[str, Measurement]]) -> None:
    rows = [_speed_row(w, contests.get(w)) for w in comparisons]
    head = ("images/s", "eager", "torch.compile", "fusedres", "over eager", "over compile")
    console.print(make_table("", head, rows, "Medians, interleaved; no number where agreement is red"))


def _speed_row(workload: Workload, found: dict[str, Measurement] | None) -> tuple[str, ...]:
    if found is None:
        return (workload.name, *[""] * 5)
    ours, compiled = found[OURS.name], found[COMPILE.name]
    speeds = [f"{m.images_per_second:.1f}" if m.seconds else "" for m in (found[BASELINE.name], compiled, ours)]
    speeds[1] = " ".join(part for part in (speeds[1], compiled.remark) if part)
    ratios = (ours.speedup.get(peer.name) for peer in (BASELINE, COMPILE))
    return (workload.name, *speeds, *("" if ratio is None else f"{ratio:.2f}x" for ratio in ratios))


# ---------------------------------------------------------------------------------------------------------------------
# Digits
# ---------------------------------------------------------------------------------------------------------------------


def _digits(settings: _Settings) -> dict[str, Training]:
    """Trains three times from one seed; the third run shows what another order of rounding alone does."""
    data = digits()
    runs = {
        "stock": {"fused": False},
        "patched": {"fused": True},
        "stock, NCHW": {"fused": False, "memory_format": torch.contiguous_format},
    }
    trainings: dict[str, Training] = {}
    with stages(len(runs), "digits") as begin:
        for name, options in runs.items():
            begin(f"training, {name}")
            trainings[name] = train(data, settings.epochs, **options)
    rows = [_training_row(name, t, trainings["stock"]) for name, t in trainings.items()]
    head = ("CIFAR ResNet-20 on digits", "last loss", "accuracy", "largest difference from stock", "time")
    caption = (
        f"{len(trainings['stock'].losses)} steps from one seed; the last run differs from stock in rounding only. "
        "Images this small would run as stock: here the fused kernels are forced"
    )
    console.print(make_table("", head, rows, caption))
    return trainings


def _training_row(name: str, run: Training, stock: Training) -> tuple[str, ...]:
    difference = f"{deviation(run, stock):.1e}"
    return name, f"{run.losses[-1]:.4f}", f"{run.accuracy:.1%}", difference, f"{run.seconds:.1f} s"
