"""``python -m fusedres engines``: what a patched network keeps of its speed under PyTorch's own engines.

Three questions. *DistributedDataParallel*: several processes, each with its own threads, train stock and patched, with
DDP and without. Without it they run side by side all the same, so that both ratios are of the same share of the
machine; before every step the processes wait for each other, and a step has taken as long as in the slowest of them.
The patched step should be as much faster than stock's with DDP as without. *torch.compile*: one process runs a patched
network compiled and not compiled; compiled should not be slower. *Overhead*: one image of 32 x 32 pixels, so small that
the interpreter is most of what a step costs; patched should cost no more of it than stock.

All contestants of a question take turns, and a ratio is taken within a turn before its median
(:mod:`fusedres.benchmarking.timing`). What is outside the error budgets is not timed.
"""

from __future__ import annotations

import copy
import os
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from time import perf_counter

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .. import models
from ..analysis.peak import in_child
from ..console import console, stages
from ..patch import patch
from .agreement import verdict
from .results import Measurement, Results, this_machine
from .timing import Timing, interleave, speedup
from .workloads import INFERENCE_BF16, INFERENCE_FP32, TRAIN_BF16, TRAIN_FP32, Batch, Workload, settle

__all__ = ["WITHIN", "add_arguments", "compiled", "overhead", "run", "spread"]

WITHIN = 0.05
"""By how much, at most, the ratio with DDP may fall short of the ratio without."""

_TRAINING = {"fp32": TRAIN_FP32, "bf16": TRAIN_BF16}
_COMPILED = (TRAIN_FP32, TRAIN_BF16, INFERENCE_FP32, INFERENCE_BF16)
_CHECKED = (4, 64)
"""Images and resolution, at most, of the check against float64."""

_TIMEOUT = timedelta(minutes=5)


# ---------------------------------------------------------------------------------------------------------------------
# What is compared
# ---------------------------------------------------------------------------------------------------------------------


def _network(name: str, batch: Batch) -> nn.Module:
    """The same weights in every process, with statistics that fit them."""
    torch.manual_seed(0)
    model = getattr(models, name)(fused=False).to(memory_format=torch.channels_last)
    settle(model, batch.images)
    return model


def _patched(model: nn.Module) -> nn.Module:
    patch(model)
    return model


def _check(network: str, workload: Workload, batch: tuple[int, int]) -> str:
    size, resolution = map(min, batch, _CHECKED)
    images = Batch.random(size, resolution)
    return verdict(workload.check(_network(network, images), lambda seed: Batch.random(size, resolution, seed).images))


def _measurements(
    plain: Measurement, times: dict[str, Timing], baseline_of: dict[str, str], check: str
) -> Iterator[Measurement]:
    for name, timing in times.items():
        baseline = baseline_of[name]
        yield replace(
            plain,
            contestant=name,
            baseline=name == baseline,
            check="" if name == baseline else check,
            seconds=timing.to_dict(),
            speedup={} if name == baseline else {baseline: speedup(times[baseline], timing)},
        )


# ---------------------------------------------------------------------------------------------------------------------
# DistributedDataParallel
# ---------------------------------------------------------------------------------------------------------------------

_DDP = {"eager": "eager", "fusedres": "eager", "eager, DDP": "eager, DDP", "fusedres, DDP": "eager, DDP"}
"""The contestants, and what each is measured by."""


def spread(
    network: str, workload: Workload, batch: tuple[int, int], processes: int = 2, threads: int = 1, turns: int = 15
) -> tuple[Measurement, ...]:
    """A training step in several processes at once: stock and patched, alone and in ``DistributedDataParallel``.

    Args:
        network: a name in :mod:`fusedres.models`.
        batch: images of each process, and their resolution.
        threads: of each process.
        turns: how many times each contestant is timed.

    Returns:
        one measurement of each contestant, whose seconds are those of the slowest process; or one that is red.

    Raises:
        ValueError: for a workload that does not train.
        RuntimeError: with the message of a process that failed.
    """
    if not workload.training:
        raise ValueError(f"workload must be one that trains, got {workload.name!r}")
    plain = _described("ddp", network, workload, batch, f"{processes} processes of {threads} threads")
    if (check := _check(network, workload, batch)) != "ok":
        return (replace(plain, contestant="fusedres", check=check),)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(processes) as pool:
        shared = (processes, str(Path(folder, "store")), network, workload, batch, threads, turns)
        children = [pool.submit(in_child, _times_of_rank, rank, *shared) for rank in range(processes)]
        of_ranks = [child.result().result for child in children]
    slowest = {name: Timing(tuple(map(max, zip(*(times[name] for times in of_ranks))))) for name in _DDP}
    return tuple(_measurements(plain, slowest, _DDP, check))


def _times_of_rank(
    rank: int,
    processes: int,
    store: str,
    network: str,
    workload: Workload,
    batch: tuple[int, int],
    threads: int,
    turns: int,
) -> dict[str, tuple[float, ...]]:
    """What each step took in this process, which trains on images of its own."""
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", f"file://{store}", _TIMEOUT, processes, rank)
    try:
        stock = workload.prepared(_network(network, Batch.random(*batch)))
        forms = {"eager": stock, "fusedres": _patched(copy.deepcopy(stock))}
        forms |= {f"{name}, DDP": DistributedDataParallel(copy.deepcopy(form)) for name, form in forms.items()}
        steps = {name: workload.stepper(Batch.random(*batch, seed=rank))(form) for name, form in forms.items()}
        times = interleave(steps, turns=turns, ready=dist.barrier)
        dist.barrier()  # who is done first must not leave while another still answers
        return {name: timing.samples for name, timing in times.items()}
    finally:
        dist.destroy_process_group()


def _described(suite: str, network: str, workload: Workload, batch: tuple[int, int], variant: str) -> Measurement:
    size, resolution = batch
    return Measurement(
        suite,
        network,
        "train step" if workload.training else "inference",
        str(workload.autocast or workload.dtype).removeprefix("torch."),
        (size, 3, resolution, resolution),
        "",
        variant,
        autocast=workload.autocast is not None,
        images=size,
    )


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile
# ---------------------------------------------------------------------------------------------------------------------

_COMPILE = {"fusedres": "fusedres", "fusedres, compiled": "fusedres"}


def compiled(
    network: str, workload: Workload, batch: tuple[int, int], turns: int = 15, backend: str = "inductor"
) -> tuple[Measurement, ...]:
    """A patched network beside the same one under ``torch.compile(fullgraph=True)``; arguments of :func:`spread`.

    Returns:
        one measurement of each of the two; or one that is red.
    """
    plain = _described("compiled", network, workload, batch, "")
    if (check := _check(network, workload, batch)) != "ok":
        return (replace(plain, contestant="fusedres", check=check),)
    images = Batch.random(*batch)
    patched = _patched(workload.prepared(_network(network, images)))
    inner = copy.deepcopy(patched)
    inner.compile(backend=backend, fullgraph=True)
    steps = {"fusedres": workload.stepper(images)(patched), "fusedres, compiled": workload.stepper(images)(inner)}
    began = perf_counter()
    steps["fusedres, compiled"]()
    first = perf_counter() - began
    found = _measurements(plain, interleave(steps, turns=turns), _COMPILE, check)
    return tuple(m if m.baseline else replace(m, first_step=first) for m in found)


# ---------------------------------------------------------------------------------------------------------------------
# Overhead
# ---------------------------------------------------------------------------------------------------------------------

_SMALL = (1, 32)
_SMALL_STEPS = (TRAIN_FP32, INFERENCE_FP32)
_OVERHEAD = {"eager": "eager", "fusedres": "eager"}


def overhead(network: str, workload: Workload, turns: int = 45) -> tuple[Measurement, ...]:
    """Stock and patched on one image of 32 x 32 pixels; arguments and results as those of :func:`compiled`."""
    plain = _described("overhead", network, workload, _SMALL, "")
    images = Batch.random(*_SMALL)
    stock = workload.prepared(_network(network, Batch.random(*_CHECKED)))
    if (check := _check(network, workload, _CHECKED)) != "ok":
        return (replace(plain, contestant="fusedres", check=check),)
    # A norm that sees one value per channel, as the last ones of a ResNet do here, has no batch to train with.
    for norm in (m for m in stock.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.eval()
    forms = {"eager": stock, "fusedres": _patched(copy.deepcopy(stock))}
    steps = {name: workload.stepper(images)(form) for name, form in forms.items()}
    return tuple(_measurements(plain, interleave(steps, turns=turns, warmup=5), _OVERHEAD, check))


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--network", default="resnet50", help="a name in fusedres.models (resnet50)")
    parser.add_argument("--batch", type=int, default=8, help="images, of each process (8)")
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--processes", type=int, default=2, help="of DDP (2)")
    parser.add_argument("--threads", type=int, help="of each of them (the machine's, shared out)")
    parser.add_argument("--turns", type=int, default=15, help="how many times each contestant is timed (15)")
    parser.add_argument("--only", choices=("ddp", "compile", "overhead"), help="one of the three questions")
    parser.add_argument(
        "--json",
        nargs="?",
        const="",
        metavar="FILE",
        help="write the results; without FILE to bench/results/<this machine>/engines.json",
    )


def run(args: Namespace) -> int:
    """Exit status 1 where a check is red."""
    machine = this_machine()
    console.print(str(machine))
    batch, found = (args.batch, args.resolution), []
    threads = args.threads or max(1, (os.cpu_count() or 1) // args.processes)
    parts = {"ddp": len(_TRAINING), "compile": len(_COMPILED), "overhead": len(_SMALL_STEPS)}
    asked = [part for part in parts if args.only in (None, part)]
    with stages(sum(parts[part] for part in asked), "engines") as begin:
        if "ddp" in asked:
            for workload in _TRAINING.values():
                begin(f"DDP, {workload.name}")
                found += spread(args.network, workload, batch, args.processes, threads, args.turns)
        if "compile" in asked:
            for workload in _COMPILED:
                begin(f"torch.compile, {workload.name}")
                found += compiled(args.network, workload, batch, args.turns)
        if "overhead" in asked:
            for workload in _SMALL_STEPS:
                begin(f"overhead, {workload.name}")
                found += overhead(args.network, workload, 3 * args.turns)
    for line in said(found):
        console.print(line)
    if args.json is not None:
        path = Path(args.json or f"bench/results/{machine.slug}/engines.json")
        settings = {"turns": args.turns, "processes": args.processes, "threads of each": threads}
        Results(machine, settings, measurements=tuple(found)).save(path)
        console.print(f"written to {path}")
    return 0 if all(m.check in ("", "ok") for m in found) else 1


def said(found: Sequence[Measurement]) -> Iterator[str]:
    """The ratios in words, a line each."""
    for m in found:
        if m.check not in ("", "ok"):
            yield f"{m.group}: {m.check}"
    by_name = {(m.group, m.contestant): m for m in found if m.speedup}
    for (group, name), m in by_name.items():
        if name == "fusedres" and m.suite == "overhead":
            ratio = m.speedup["eager"]
            reached = "reached" if ratio >= 1 else "not reached"
            yield f"{group}: patched over stock: {ratio:.3f}x (at least 1: {reached})"
        if name == "fusedres" and m.suite == "ddp":
            alone, spread_out = m.speedup["eager"], by_name[group, "fusedres, DDP"].speedup["eager, DDP"]
            difference = spread_out / alone - 1
            yield f"{group}: without DDP, patched over stock: {alone:.3f}x"
            yield f"{group}: with DDP, patched over stock: {spread_out:.3f}x"
            reached = "reached" if difference >= -WITHIN else "not reached"
            yield f"{group}: difference: {difference:+.1%} (at least {-WITHIN:.0%}: {reached})"
        if name == "fusedres, compiled":
            ratio = m.speedup["fusedres"]
            reached = "reached" if ratio >= 1 else "not reached"
            yield f"{group}: compiled over uncompiled, patched: {ratio:.3f}x (at least 1: {reached})"
