"""``python -m fusedres growth``: what a step costs as batch and depth grow, and how long the first one takes.

A step's cost is its time and the bytes that autograd keeps for it. Both grow in proportion to the batch, and with depth
by what a block adds; what shows is where they do not. The first step is timed in a process of its own with nothing
cached, from a stock model in memory to the end of its first training step: what a user waits for.
"""

from __future__ import annotations

import copy
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

from .. import models
from ..analysis.peak import in_child
from ..console import console, make_table, stages
from ..patch import patch
from .agreement import verdict
from .memory import saved_bytes
from .results import Measurement, Results, quantity, this_machine, times
from .timing import interleave, speedup
from .workloads import TRAIN_FP32, Batch, settle

__all__ = ["CONTESTANTS", "add_arguments", "first_steps", "grown", "run"]

BATCHES = (1, 2, 4, 8, 16, 32)
DEPTHS = (8, 14, 20, 32, 44, 56, 110)
_BATCH_NETWORK, _BATCH_RESOLUTION = "resnet18", 112
_DEPTH_NETWORK, _DEPTH_BATCH, _DEPTH_RESOLUTION = "cifar_resnet", 32, 32
_FIRST = ("resnet18", "resnet50", "densenet121")
_FIRST_BATCH = (8, 224)
_CHECKED = (8, 32)
"""Images and resolution, at most, of the check against float64."""


def _patched(model: nn.Module) -> nn.Module:
    patch(model)
    return model


CONTESTANTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "eager": lambda model: model,
    "fusedres": _patched,
    "torch.compile": torch.compile,
}
"""Each takes a stock model, which it may change, and returns one to train."""

_GROWING = ("eager", "fusedres")


# ---------------------------------------------------------------------------------------------------------------------
# Batch and depth
# ---------------------------------------------------------------------------------------------------------------------


def grown(
    variant: str, values: Sequence[int], turns: int, begin: Callable[[str], None] = lambda stage: None
) -> Iterator[Measurement]:
    """A training step in float32 of a ResNet-18 on batches of these sizes, or of CIFAR ResNets of these depths.

    Args:
        variant: ``"batch"`` or ``"depth"``.
        turns: how many times each contestant is timed.
        begin: is told what comes next, for a progress bar.

    Raises:
        ValueError: for another variant.
    """
    if variant not in ("batch", "depth"):
        raise ValueError(f"variant must be 'batch' or 'depth', got {variant!r}")
    for value in values:
        begin(f"{variant} {value}")
        if variant == "batch":
            model, batch = getattr(models, _BATCH_NETWORK)(fused=False), Batch.random(value, _BATCH_RESOLUTION)
            yield from _contest(_BATCH_NETWORK, variant, None, model, batch, turns)
        else:
            model = getattr(models, _DEPTH_NETWORK)(value, fused=False)
            batch = Batch.random(_DEPTH_BATCH, _DEPTH_RESOLUTION, num_classes=10)
            yield from _contest(_DEPTH_NETWORK, variant, value, model, batch, turns)


def _contest(
    network: str, variant: str, depth: int | None, model: nn.Module, batch: Batch, turns: int
) -> Iterator[Measurement]:
    torch.manual_seed(0)
    model = model.to(memory_format=torch.channels_last)
    settle(model, batch.images)
    size, resolution = _CHECKED[0], min(_CHECKED[1], batch.images.shape[-1])
    check = verdict(TRAIN_FP32.check(model, lambda seed: Batch.random(size, resolution, seed).images))
    plain = Measurement(
        "growth",
        network,
        "train step",
        "float32",
        tuple(batch.images.shape),
        "",
        variant,
        depth=depth,
        images=len(batch),
    )
    if check != "ok":
        yield replace(plain, contestant="fusedres", check=check)
        return
    forms = {name: CONTESTANTS[name](TRAIN_FP32.prepared(model)) for name in _GROWING}
    timed = interleave({name: TRAIN_FP32.stepper(batch)(form) for name, form in forms.items()}, turns=turns)
    for name, form in forms.items():
        yield replace(
            plain,
            contestant=name,
            baseline=name == "eager",
            check="ok" if name == "fusedres" else "",
            seconds=timed[name].to_dict(),
            speedup={other: speedup(timed[other], timed[name]) for other in forms if other != name},
            saved=saved_bytes(form, lambda form=form: batch.loss(form(batch.images))),
        )


# ---------------------------------------------------------------------------------------------------------------------
# The first step
# ---------------------------------------------------------------------------------------------------------------------


def first_steps(
    networks: Sequence[str],
    batch: tuple[int, int] = _FIRST_BATCH,
    contestants: Sequence[str] = tuple(CONTESTANTS),
    begin: Callable[[str], None] = lambda stage: None,
) -> Iterator[Measurement]:
    """Seconds to the end of a network's first training step, each in a process of its own, with no compiler's cache."""
    size, resolution = batch
    for network in networks:
        for name in contestants:
            begin(f"{network}, {name}")
            measured = Measurement(
                "first step",
                network,
                "train step",
                "float32",
                (size, 3, resolution, resolution),
                name,
                baseline=name == "eager",
                images=size,
            )
            try:
                child = in_child(_first_step, network, size, resolution, name, torch.get_num_threads())
            except RuntimeError as error:
                yield replace(measured, missing=str(error).partition("\n")[0])
            else:
                yield replace(measured, first_step=child.result)


def _first_step(network: str, size: int, resolution: int, name: str, threads: int) -> float:
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    torch.set_num_threads(threads)
    model = getattr(models, network)(fused=False).to(memory_format=torch.channels_last)
    batch = Batch.random(size, resolution)
    # What a process pays once, whoever runs in it: threads, allocator, oneDNN.
    warm = models.cifar_resnet(8, fused=False).to(memory_format=torch.channels_last)
    TRAIN_FP32.stepper(Batch.random(1, 32, num_classes=10))(warm)()
    began = perf_counter()
    TRAIN_FP32.stepper(batch)(CONTESTANTS[name](copy.deepcopy(model).train()))()
    return perf_counter() - began


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="fewer sizes, no torch.compile")
    parser.add_argument(
        "--json",
        nargs="?",
        const="",
        metavar="FILE",
        help="write the results; without FILE to bench/results/<this machine>/growth.json",
    )


def run(args: Namespace) -> int:
    """Exit status 1 where a check is red."""
    machine = this_machine()
    console.print(str(machine))
    batches, depths, turns = (BATCHES[:4:2], DEPTHS[:2], 3) if args.quick else (BATCHES, DEPTHS, 9)
    contestants = _GROWING if args.quick else tuple(CONTESTANTS)
    networks = _FIRST[:1] if args.quick else _FIRST
    path = None if args.json is None else Path(args.json or f"bench/results/{machine.slug}/growth.json")
    found: list[Measurement] = []
    with stages(len(batches) + len(depths) + len(networks) * len(contestants), "growth") as begin:
        coming = chain(
            grown("batch", batches, turns, begin),
            grown("depth", depths, turns, begin),
            first_steps(networks, _FIRST_BATCH, contestants, begin),
        )
        for measured in coming:
            found.append(measured)
            if path is not None:  # after each, so that being cut off loses nothing
                Results(machine, {"quick": args.quick, "turns": turns}, measurements=tuple(found)).save(path)
    console.print(make_table("", _HEAD, [_cells(m) for m in found]))
    if path is not None:
        console.print(f"written to {path}")
    return 0 if all(m.check in ("", "ok") for m in found) else 1


_HEAD = ("", "contestant", "step", "over eager", "saved for backward", "first step", "check")


def _cells(m: Measurement) -> tuple[str, ...]:
    what = f"depth {m.depth}" if m.variant == "depth" else f"batch {m.shape[0]}"
    return (
        f"{m.subject}, {what}",
        m.contestant,
        quantity(_milliseconds(m.seconds), "ms"),
        times(m.speedup.get("eager")),
        quantity(None if m.saved is None else m.saved / 1e6, "MB"),
        quantity(m.first_step, "s"),
        m.missing or m.check,
    )


def _milliseconds(seconds: dict[str, Any] | None) -> float | None:
    return None if seconds is None else 1e3 * seconds["median"]
