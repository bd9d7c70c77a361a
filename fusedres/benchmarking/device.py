"""``python -m fusedres.benchmarking.device``: whole networks on a GPU, job by job, the most important first.

What ``python -m tools.gpu`` runs as its stage ``bench``. A job is a network, a workload and a batch with some
contestants, timed in turns; later jobs repeat an earlier one with contestants that take longer to prepare. After every
job the file of results is whole. A job that does not fit into the time is left out, and said so. Before a job begins,
the file says that it does: begun again after a crash, the program notes what it died of, and goes on with the next.
"""

from __future__ import annotations

import faulthandler
import gc
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from .. import models, select
from ..analysis.devices import DEVICES, Device
from ..analysis.traffic import Cost, traffic
from ..capture import capture
from ..patch import patch
from ..testing import compare
from . import grouped, kernels
from .agreement import verdict
from .memory import peak_allocated
from .peers import BASELINE, COMPILE, PEERS
from .results import Measurement, Results, this_machine
from .timing import Timing, interleave, speedup
from .workloads import INFERENCE_BF16, TRAIN_BF16, Batch, Workload, settle

__all__ = ["Bench", "Job", "contestants_of", "jobs", "main"]

NETWORKS = ("resnet50", "resnext50_32x4d", "wide_resnet50_2", "densenet121", "seresnet50", "preresnet50")
"""In the order of their importance."""

EAGER, COMPILED, AUTOTUNED = BASELINE.name, COMPILE.name, f"{COMPILE.name}, max-autotune"

_PEERS = {peer.name: peer for peer in PEERS if peer.foreign}
"""All but stock PyTorch and this library."""

_SECONDS = {"plain": 15.0, "compiled": 75.0, "autotuned": 260.0, "peers": 60.0, "kernels": 25.0, "grouped": 20.0}
"""What a job takes, about, until one of its kind has been run here: with the compiling that its contestants need."""

_HANGS = 3.0
"""A job that takes so many times what was expected, and half a minute, is ended."""

_COUNTED_SECONDS = 60.0
"""How long to wait, after a job, for the count of its traffic."""

_CHECKED = (8, 96)
"""Images and resolution of the check against float64."""


@dataclass(frozen=True)
class Job:
    """A network's workload on a batch of images; or, without a network, single kernels or grouped convolutions."""

    kind: str
    network: str = ""
    workload: Workload | None = None
    batch: int = 0
    resolution: int = 0

    def __str__(self) -> str:
        if self.workload is None:
            return self.kind
        return f"{self.network}, {self.workload.name}, batch {self.batch}, {self.kind}"


def jobs(networks: tuple[str, ...] = NETWORKS, large: int = 256, resolution: int = 224) -> list[Job]:
    """All of them, in the order of their importance."""

    def of(kind: str, network: str, *, small: bool = True) -> list[Job]:
        both = [Job(kind, network, workload, large, resolution) for workload in (TRAIN_BF16, INFERENCE_BF16)]
        single = [Job(kind, network, workload, 1, resolution) for workload in (INFERENCE_BF16, TRAIN_BF16)]
        return both + single if small else both

    first, *others = networks
    found = [*of("plain", first), Job("kernels"), Job("grouped"), *of("compiled", first), *of("peers", first)]
    found += [job for network in others for job in of("plain", network)]
    found += [job for network in others for job in of("compiled", network, small=False)]
    return found + [job for network in networks for job in of("autotuned", network, small=False)]


def smoke_jobs() -> list[Job]:
    """A small network's, of the kinds that take no compiler."""
    return [
        job for job in jobs(("cifar_resnet",), large=2, resolution=32) if job.kind in ("plain", "kernels", "grouped")
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Contestants
# ---------------------------------------------------------------------------------------------------------------------


def backends_of(device: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, str]:
    """Our contestants by name: what "auto" chooses, or each backend that runs here where that is stock PyTorch."""
    if select.backend_for(device, dtype) != "stock":
        return {"fusedres": "auto"}
    forced = [name for name in ("triton", "cuda") if select.why_not(name, device, dtype) is None]
    return {f"fusedres ({name})": name for name in forced}


def contestants_of(job: Job, device: str) -> list[str]:
    """In the order in which memory is given to them."""
    names = [EAGER, *backends_of(device)]
    names += [f"{name}, captured" for name in names]
    others = [name for name in _PEERS if name not in (COMPILED, AUTOTUNED)]
    return names + {"compiled": [COMPILED], "autotuned": [AUTOTUNED], "peers": others}.get(job.kind, [])


def _step_of(name: str, job: Job, model: nn.Module, batch: Batch) -> Callable[[], Any]:
    """One step of a contestant."""
    workload = job.workload
    base = name.removesuffix(", captured")
    twin = workload.prepared(model)
    backends = backends_of(batch.images.device.type)
    if base in backends:
        patch(twin, backend=backends[base])
    if base != name:
        return _captured(twin, workload, batch)
    if (peer := _PEERS.get(name)) is None:
        return workload.stepper(batch)(twin)
    return workload.step(twin, peer.prepare(twin, batch.images.to(workload.dtype)), [batch])


def _captured(model: nn.Module, workload: Workload, batch: Batch) -> Callable[[], Any]:
    if not workload.training:
        return partial(capture(model, batch.images.to(workload.dtype)), batch.images.to(workload.dtype))

    def forward_and_backward(images: Tensor, classes: Tensor) -> Tensor:
        with torch.autocast(images.device.type, workload.autocast, enabled=workload.autocast is not None):
            loss = Batch(images, classes).loss(model(images))
        loss.backward()
        return loss.detach()

    replay = capture(model, (batch.images, batch.classes), step=forward_and_backward)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        replay(batch.images, batch.classes)
        optimizer.step()

    return step


# ---------------------------------------------------------------------------------------------------------------------
# The bench
# ---------------------------------------------------------------------------------------------------------------------


class Bench:
    """Runs jobs and keeps the file of results.

    Args:
        path: of the file; what a run before has left there is gone on with.
        seconds: that there are in all.
        smoke: everything small and short, to see that it runs.
    """

    def __init__(self, path: Path, device: str, seconds: float, smoke: bool = False) -> None:
        self.path, self.device, self.smoke = path, torch.device(device), smoke
        self._deadline = perf_counter() + seconds
        self._expected = dict(_SECONDS)
        self._checks: dict[tuple[str, str, str], str] = {}
        self._costs: dict[tuple[str, int, int, bool], Future[dict[str, Cost]]] = {}
        self._pool: ProcessPoolExecutor | None = None
        self.results = Results.load(path) if path.exists() else _nothing_yet(self.device)
        self._note_what_it_died_of()

    def run(self, found: list[Job]) -> None:
        """Runs what is not done yet and fits into the time."""
        for job in found:
            if str(job) in self.results.settings["done"]:
                continue
            left = self._deadline - perf_counter()
            if self._expected[job.kind] > left:
                self._leave_out(f"{job}: needs about {self._expected[job.kind]:.0f} s of {max(left, 0):.0f} s left")
                continue
            self._run(job)

    def _run(self, job: Job) -> None:
        limit = _HANGS * max(self._expected[job.kind], _SECONDS[job.kind]) + 30
        faulthandler.dump_traceback_later(limit, exit=True)
        print(f"begin: {job} (up to {limit:.0f} s)", flush=True)
        self._save(begun=str(job))
        began = perf_counter()
        self._put(list(self._kernels(job) if job.workload is None else self._networks(job)))
        self._expected[job.kind] = perf_counter() - began
        faulthandler.cancel_dump_traceback_later()
        self._save(begun="", done=[*self.results.settings["done"], str(job)])
        print(f"done: {job} ({self._expected[job.kind]:.1f} s)", flush=True)

    def _note_what_it_died_of(self) -> None:
        begun = self.results.settings["begun"]
        if begun:
            self._leave_out(f"{begun}: the process died in it")
            self._save(begun="", done=[*self.results.settings["done"], begun])

    def _leave_out(self, what: str) -> None:
        self._save(left_out=[*self.results.settings["left_out"], what])

    def _put(self, measured: list[Measurement]) -> None:
        """Adds measurements, in the place of older ones of the same group and contestant."""
        fresh = {(m.suite, m.group, m.contestant) for m in measured}
        kept = tuple(m for m in self.results.measurements if (m.suite, m.group, m.contestant) not in fresh)
        self.results = replace(self.results, measurements=kept + tuple(measured))

    def _save(self, **settings: Any) -> None:
        self.results = replace(self.results, settings={**self.results.settings, **settings})
        self.results.save(self.path)

    # -- single kernels ------------------------------------------------------------------------------------------------

    def _kernels(self, job: Job) -> Iterator[Measurement]:
        (batch, turns), how = (2, 3) if self.smoke else (256, 9), (torch.bfloat16, self.device)
        if job.kind == "grouped":
            found = grouped.measure(batch, kernels.SMOKE_SHAPES[0] if self.smoke else None, *how, turns)
        else:
            found = kernels.measure(batch, kernels.SMOKE_SHAPES if self.smoke else kernels.SHAPES, *how, turns)
        roofline = self._roofline()
        for measured in found:
            yield replace(measured, roofline=roofline(measured.moved, measured.flops or 0))

    def _roofline(self) -> Callable[[int, int], float | None]:
        """The least seconds for bytes and operations in bfloat16; ``None`` where the device's peaks are not known."""
        known = _known_device(self.device)
        return (lambda nbytes, flops: known.seconds(nbytes, flops, torch.bfloat16)) if known else lambda *amounts: None

    # -- whole networks ------------------------------------------------------------------------------------------------

    def _networks(self, job: Job) -> list[Measurement]:
        self._ask_for_costs(job)
        torch.manual_seed(0)
        model = getattr(models, job.network)(fused=False).to(self.device, memory_format=torch.channels_last)
        batch = Batch.random(job.batch, job.resolution, num_classes=10, device=self.device)
        settle(model, Batch.random(min(max(job.batch, 8), 64), job.resolution, device=self.device).images)
        names = contestants_of(job, self.device.type)
        checks = {name: self._check(job, model, name) for name in names}
        steps, found = self._prepared(job, model, batch, [name for name in names if checks[name] in ("", "ok")])
        times = self._times(steps, found)
        return [self._measurement(job, name, checks[name], found.get(name, {}), times) for name in names]

    def _check(self, job: Job, model: nn.Module, name: str) -> str:
        """``"ok"``, or which tensor of ours is over its budget; nothing for a peer."""
        base = name.removesuffix(", captured")
        backend = backends_of(self.device.type).get(base)
        if backend is None:
            return ""
        key = (job.network, job.workload.name, base)
        if key not in self._checks:
            workload = job.workload
            size, resolution = _CHECKED[0], min(_CHECKED[1], job.resolution)
            with _nothing_too_small():
                self._checks[key] = verdict(
                    compare(
                        model.train(workload.training),
                        partial(patch, backend=backend),
                        lambda seed: [Batch.random(size, resolution, seed, device=self.device).images],
                        dtype=workload.dtype,
                        autocast=workload.autocast,
                        backward=workload.training,
                    )
                )
        return self._checks[key]

    def _prepared(
        self, job: Job, model: nn.Module, batch: Batch, names: list[str]
    ) -> tuple[dict[str, Callable[[], Any]], dict[str, dict[str, Any]]]:
        """The contestants that there are, each after its first step, and what is known of each by then."""
        steps: dict[str, Callable[[], Any]] = {}
        found: dict[str, dict[str, Any]] = {}
        for name in names:
            if name in _PEERS and (reason := _PEERS[name].refuses(job.workload, self.device)):
                found[name] = {"missing": reason}
                continue
            began = perf_counter()
            try:
                step = _step_of(name, job, model, batch)
                step()
                self._wait()
                found[name] = {"first_step": perf_counter() - began, "peak": peak_allocated(step, self.device)}
                steps[name] = step
            except Exception as error:  # whatever a compiler, a capture or a lack of memory may raise
                found[name] = {"missing": _in_a_line(error)}
                self._make_room()
        return steps, found

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _times(self, steps: dict[str, Callable[[], Any]], found: dict[str, dict[str, Any]]) -> dict[str, Timing]:
        """Times what fits into memory together: while that is too little, the last that was prepared stands back."""
        while steps:
            try:
                turns, seconds = (3, 0.0) if self.smoke else (9, 0.02)
                return interleave(steps, turns=turns, warmup=3, sample_seconds=seconds, device=self.device)
            except torch.OutOfMemoryError as error:
                name, _ = steps.popitem()
                found[name] = {"missing": f"no memory beside the others: {_in_a_line(error)}"}
            self._make_room()
        return {}

    def _make_room(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _measurement(
        self, job: Job, name: str, check: str, known: dict[str, Any], times: dict[str, Timing]
    ) -> Measurement:
        timing = times.get(name)
        cost = self._cost(job, name)
        others = {other: speedup(times[other], timing) for other in times if other != name} if timing else {}
        return Measurement(
            "model",
            job.network,
            "train step" if job.workload.training else "inference",
            "bfloat16",
            (job.batch, 3, job.resolution, job.resolution),
            name,
            autocast=job.workload.autocast is not None,
            baseline=name == EAGER,
            check=check,
            seconds=timing.to_dict() if timing else None,
            speedup=others,
            images=job.batch,
            moved=cost.nbytes if cost else None,
            flops=cost.flops if cost else None,
            roofline=cost.seconds if cost else None,
            **known,
        )

    def _ask_for_costs(self, job: Job) -> None:
        """Lets another process count what the model of traffic says of a job, while this one measures it."""
        known = _known_device(self.device)
        if known is not None and (key := _key(job)) not in self._costs:
            self._pool = self._pool or ProcessPoolExecutor(1, get_context("spawn"))
            self._costs[key] = self._pool.submit(_costs_of, *key, known)

    def _cost(self, job: Job, name: str) -> Cost | None:
        """The cost of this contestant's schedule, where the device's peaks are known."""
        if (asked := self._costs.get(_key(job))) is None:
            return None
        try:
            costs = asked.result(_COUNTED_SECONDS)
        except Exception as error:  # whatever came of the other process
            del self._costs[_key(job)]
            self._leave_out(f"traffic of {job}: {_in_a_line(error)}")
            return None
        base = name.removesuffix(", captured")
        schedule = _PEERS[name].schedule if name in _PEERS else "stock" if base == EAGER else "fused"
        return None if schedule is None else costs[schedule]


def _key(job: Job) -> tuple[str, int, int, bool]:
    return job.network, job.batch, job.resolution, job.workload.training


def _costs_of(network: str, batch: int, resolution: int, training: bool, device: Device) -> dict[str, Cost]:
    """By schedule, what a step costs at least."""
    model = getattr(models, network)(fused=False)
    counted = traffic(model, (batch, 3, resolution, resolution), torch.bfloat16, device, training=training)
    return {schedule: counted.total(schedule) for schedule in ("stock", "inductor", "fused")}


def _nothing_yet(device: torch.device) -> Results:
    settings = {"done": [], "begun": "", "left_out": [], "cudnn.benchmark": True, "layout": "channels_last"}
    known = _known_device(device)
    roofline = {}
    if known is not None:
        arithmetic = {str(dtype).removeprefix("torch."): peak for dtype, peak in known.arithmetic.items()}
        roofline = {"name": known.name, "bandwidth": known.bandwidth, "arithmetic": arithmetic}
    return Results(this_machine(device), settings, roofline=roofline)


def _known_device(device: torch.device) -> Device | None:
    """The device's published peaks, if its name says that they are in the table."""
    name = torch.cuda.get_device_name(device).replace(" ", "") if device.type == "cuda" else ""
    return next((known for key, known in DEVICES.items() if key in name), None)


def _in_a_line(error: Exception) -> str:
    first = next((line for line in str(error).splitlines() if line.strip()), "").strip()
    return f"{type(error).__name__}: {first}".rstrip(": ")


@contextmanager
def _nothing_too_small() -> Iterator[None]:
    """The check is of small images; what is timed is large enough to be fused, so what is checked must be too."""
    before = dict(select.FEWEST_ELEMENTS)
    select.FEWEST_ELEMENTS.update(dict.fromkeys(before, 0))
    try:
        yield
    finally:
        select.FEWEST_ELEMENTS.update(before)


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    torch.backends.cudnn.benchmark = True
    bench = Bench(args.out, args.device, args.seconds, args.smoke)
    bench.run(smoke_jobs() if args.smoke else jobs())
    return 0


def _arguments(argv: list[str] | None) -> Namespace:
    parser = ArgumentParser(prog="python -m fusedres.benchmarking.device")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=600.0, help="that there are in all (default %(default).0f)")
    parser.add_argument("--smoke", action="store_true", help="a small network, few turns")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
