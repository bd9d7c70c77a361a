"""``python -m fusedres.benchmarking.device``: whole networks on a GPU, job by job, the most important first.

What ``python -m tools.gpu`` runs as its stage ``bench``. A job is a network, a workload and a batch with some
contestants, timed in turns; later jobs repeat an earlier one with contestants that take longer to prepare. A job that
does not fit into the time is left out, and said so.

Nothing that was measured is lost: the file of results is whole after every group of kernels and every contestant of a
network, which is timed beside stock PyTorch as soon as it is ready, and with all others at the end. What raises is red,
and the others go on. Before a contestant begins, the file says that it does: begun again after a crash, the program
notes what it died of, and does that job without it. A file of the same sources and the same machine is gone on with.
"""

from __future__ import annotations

import faulthandler
import gc
import hashlib
import os
import signal
import sys
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
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
from .agreement import agrees, in_a_line, verdict
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

_FIRST_SECONDS = 240.0
"""What a job may take at the least whose network and workload are new here: all its kernels have yet to be compiled."""

_DEATHS = 3
"""So many contestants of a job may take the process with them, one after another, before the job is given up."""

_EARLY_TURNS = 3
"""Of a contestant that is timed beside stock PyTorch before the others are ready."""

_DIED = "the process died in it"

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


class _Overheard:
    """Calls a network, and keeps what it said first: before any step has changed a weight."""

    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        self._call = call
        self.first: Tensor | None = None

    def __call__(self, images: Tensor) -> Tensor:
        logits = self._call(images)
        if self.first is None:
            self.first = logits.detach().clone()
        return logits


def _step_of(name: str, job: Job, model: nn.Module, batch: Batch) -> tuple[Callable[[], Any], _Overheard]:
    """One step of a contestant, and what hears its logits."""
    workload = job.workload
    base = name.removesuffix(", captured")
    twin = workload.prepared(model)
    backends = backends_of(batch.images.device.type)
    if base in backends:
        patch(twin, backend=backends[base])
    if base != name:
        return _captured(twin, workload, batch)
    peer = _PEERS.get(name)
    heard = _Overheard(twin if peer is None else peer.prepare(twin, batch.images.to(workload.dtype)))
    return workload.step(twin, heard, [batch]), heard


def _captured(model: nn.Module, workload: Workload, batch: Batch) -> tuple[Callable[[], Any], _Overheard]:
    if not workload.training:
        heard = _Overheard(capture(model, batch.images.to(workload.dtype)))
        return partial(heard, batch.images.to(workload.dtype)), heard

    def forward_and_backward(images: Tensor, classes: Tensor) -> Tensor:
        with torch.autocast(images.device.type, workload.autocast, enabled=workload.autocast is not None):
            logits = model(images)
            loss = Batch(images, classes).loss(logits)
        loss.backward()
        return logits.detach()

    replay = capture(model, (batch.images, batch.classes), step=forward_and_backward)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    heard = _Overheard(lambda images: replay(images, batch.classes))

    def step() -> None:
        heard(batch.images)
        optimizer.step()

    return step, heard


def _in_float32(model: nn.Module, workload: Workload, batch: Batch) -> Tensor:
    """What the network says of the batch in float32, with the weights and images that the workload's dtype has."""
    twin = workload.prepared(model).float()
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=True):
        return twin(batch.images.to(workload.dtype).float())


@dataclass
class _Entrant:
    """What is known so far of a contestant.

    Attributes:
        step: what is timed; ``None`` where it does not take part.
        known: fields of its measurement.
    """

    name: str
    step: Callable[[], Any] | None = None
    first: Tensor | None = None
    check: str = ""
    known: dict[str, Any] = field(default_factory=dict)

    @property
    def plain(self) -> str:
        """The contestant that it is a captured form of, or itself."""
        return self.name.removesuffix(", captured")


# ---------------------------------------------------------------------------------------------------------------------
# The bench
# ---------------------------------------------------------------------------------------------------------------------


class Bench:
    """Runs jobs and keeps the file of results.

    Args:
        path: of the file; what a run of the same sources on this machine has left there is gone on with.
        seconds: that there are in all.
        smoke: everything small and short, to see that it runs.
    """

    def __init__(self, path: Path, device: str, seconds: float, smoke: bool = False) -> None:
        self.path, self.device, self.smoke = path, torch.device(device), smoke
        self._deadline = perf_counter() + seconds
        self._expected = dict(_SECONDS)
        self._took: dict[str, float] = {}
        self._seen: set[tuple[str, str, Workload | None]] = set()
        self._checks: dict[tuple[str, str, str], str] = {}
        self._costs: dict[tuple[str, int, int, bool], Future[dict[str, Cost]]] = {}
        self._pool: ProcessPoolExecutor | None = None
        fresh = _nothing_yet(self.device, smoke)
        self.results = _gone_on_with(path, fresh) or fresh
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
        limit = self._limit(job)
        faulthandler.dump_traceback_later(limit, exit=True)
        print(f"begin: {job} (up to {limit:.0f} s)", flush=True)
        self._save(begun=str(job))
        began = perf_counter()
        try:
            for measured in self._kernels(job) if job.workload is None else self._networks(job):
                self._put(measured)
                self._save()
        except Exception as error:
            self._wait()  # raises again where the device is lost to this process: another one goes on
            traceback.print_exc()
            self._save(failed=[*self.results.settings["failed"], f"{job}: {in_a_line(error)}"])
        finally:
            faulthandler.cancel_dump_traceback_later()
        took = perf_counter() - began
        # The fastest so far: the first of a kind also compiles what the others find compiled.
        self._expected[job.kind] = self._took[job.kind] = min(took, self._took.get(job.kind, took))
        self._seen.add((job.kind, job.network, job.workload))
        self.ended_here(str(job))
        print(f"done: {job} ({took:.1f} s)", flush=True)

    def _limit(self, job: Job) -> float:
        """After how many seconds the job counts as hanging."""
        limit = _HANGS * max(self._expected[job.kind], _SECONDS[job.kind]) + 30
        if (job.kind, job.network, job.workload) in self._seen:
            return limit
        return max(limit, _FIRST_SECONDS, self._deadline - perf_counter())

    def ended_here(self, *done: str) -> None:
        """Notes that no contestant is under way, so that none is to blame for the end of the process."""
        self._save(begun="", under_way="", done=[*self.results.settings["done"], *done])

    def _note_what_it_died_of(self) -> None:
        settings = self.results.settings
        job, contestant = settings["begun"], settings["under_way"]
        without = settings["without"].get(job, [])
        if contestant and len(without) < _DEATHS:
            self._leave_out(f"{job}, {contestant}: {_DIED}")
            self._save(without={**settings["without"], job: [*without, contestant]})
            self.ended_here()
        elif job:
            self._leave_out(f"{job}: {_DIED}")
            self.ended_here(job)

    def _begin(self, contestant: str) -> bool:
        """Notes that a contestant is under way, or none for an empty name; false for one that the process died in."""
        settings = self.results.settings
        if contestant in settings["without"].get(settings["begun"], []):
            return False
        self._save(under_way=contestant)
        return True

    def _leave_out(self, what: str) -> None:
        self._save(left_out=[*(told for told in self.results.settings["left_out"] if told != what), what])

    def _put(self, measured: Measurement) -> None:
        """Adds a measurement, in the place of an older one of the same group and contestant.

        What was timed before stays where it is only missing now, and a ratio over a contestant that takes no part this
        time. Over one that is red there is none.
        """
        found = list(self.results.measurements)
        same = [m for m in found if (m.suite, m.group) == (measured.suite, measured.group)]
        older = next((m for m in same if m.contestant == measured.contestant), None)
        red = measured.check.startswith("RED")
        if older is not None:
            if older.seconds and not measured.seconds and not red:
                return
            if measured.seconds:
                first_step = measured.first_step if older.first_step is None else older.first_step
                measured = replace(measured, speedup={**older.speedup, **measured.speedup}, first_step=first_step)
            found.remove(older)
        if red:
            found = [_without_ratio(m, measured.contestant) if m in same else m for m in found]
        self.results = replace(self.results, measurements=(*found, measured))

    def _save(self, **settings: Any) -> None:
        self.results = replace(self.results, settings={**self.results.settings, **settings})
        self.results.save(self.path)

    # -- single kernels ------------------------------------------------------------------------------------------------

    def _kernels(self, job: Job) -> Iterator[Measurement]:
        (batch, turns), how = (2, 3) if self.smoke else (256, 9), (torch.bfloat16, self.device)
        if job.kind == "grouped":
            found = grouped.measure(batch, kernels.SMOKE_SHAPES[0] if self.smoke else None, *how, turns, self._begin)
        else:
            found = kernels.measure(
                batch, kernels.SMOKE_SHAPES if self.smoke else kernels.SHAPES, *how, turns, self._begin
            )
        roofline = self._roofline()
        for measured in found:
            yield replace(measured, roofline=roofline(measured.moved, measured.flops or 0))

    def _roofline(self) -> Callable[[int, int], float | None]:
        """The least seconds for bytes and operations in bfloat16; ``None`` where the device's peaks are not known."""
        known = _known_device(self.device)
        return (lambda nbytes, flops: known.seconds(nbytes, flops, torch.bfloat16)) if known else lambda *amounts: None

    # -- whole networks ------------------------------------------------------------------------------------------------

    def _networks(self, job: Job) -> Iterator[Measurement]:
        self._ask_for_costs(job)
        torch.manual_seed(0)
        model = getattr(models, job.network)(fused=False).to(self.device, memory_format=torch.channels_last)
        batch = Batch.random(job.batch, job.resolution, num_classes=10, device=self.device)
        settle(model, Batch.random(min(max(job.batch, 8), 64), job.resolution, device=self.device).images)
        exact = _in_float32(model, job.workload, batch)
        entrants: dict[str, _Entrant] = {}
        for name in contestants_of(job, self.device.type):
            if self._begin(name):
                entrants[name] = self._entered(job, model, batch, name, entrants, exact)
            else:
                entrants[name] = self._failed(_Entrant(name), _DIED, entrants)
            early = self._early(entrants, name)
            self._begin("")
            yield self._measurement(job, entrants[name], early, wait=False)
        times = self._times(list(entrants.values()), 9)
        for entrant in entrants.values():
            yield self._measurement(job, entrant, times)

    def _entered(
        self, job: Job, model: nn.Module, batch: Batch, name: str, others: dict[str, _Entrant], exact: Tensor
    ) -> _Entrant:
        """A contestant after its first step and its check, and what is known of it by then."""
        entrant = _Entrant(name)
        plain = others.get(entrant.plain)
        if plain is not None and plain.step is None:
            return replace(plain, name=name)
        if name in _PEERS and (reason := _PEERS[name].refuses(job.workload, self.device)):
            return replace(entrant, known={"missing": reason})
        began = perf_counter()
        try:
            step, heard = _step_of(name, job, model, batch)
            step()
            self._wait()
            entrant.known["first_step"] = perf_counter() - began
            entrant.known["peak"] = peak_allocated(step, self.device)
            entrant.first = heard.first
            # After the first step, which then has compiled what it needs by itself.
            entrant.check = self._check(job, model, name)
            if name != EAGER and entrant.check in ("", "ok") and others[EAGER].first is not None:
                entrant.check = agrees(heard.first, others[EAGER].first, exact)
            if entrant.check in ("", "ok"):
                entrant.step = step
            return entrant
        except Exception as error:  # whatever a compiler, a capture, a kernel or a lack of memory may raise
            failure = error.with_traceback(None)
        self._make_room()
        return self._failed(entrant, failure, others)

    def _early(self, entrants: dict[str, _Entrant], name: str) -> dict[str, Timing]:
        """A few turns of a contestant beside stock PyTorch, in case that there is no time for all of them together."""
        pair = [entrants[n] for n in dict.fromkeys((EAGER, name))]
        if entrants[name].step is None:
            return {}
        try:
            return self._times(pair, _EARLY_TURNS)
        except Exception as error:
            failure = error.with_traceback(None)
        self._make_room()
        entrants[name] = self._failed(entrants[name], failure, entrants)
        return {}

    def _failed(self, entrant: _Entrant, error: Exception | str, others: dict[str, _Entrant]) -> _Entrant:
        """Red where it is ours and stock PyTorch does the same without a failure; missing otherwise."""
        told = error if isinstance(error, str) else in_a_line(error)
        stock = others.get(EAGER + entrant.name.removeprefix(entrant.plain))
        ours = entrant.plain in backends_of(self.device.type)
        if ours and not isinstance(error, torch.OutOfMemoryError) and stock is not None and stock.step is not None:
            return replace(entrant, step=None, check=f"RED: {told}")
        return replace(entrant, step=None, known={**entrant.known, "missing": told})

    def _check(self, job: Job, model: nn.Module, name: str) -> str:
        """``"ok"``, or which tensor of ours is over its budget; nothing for others."""
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

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _times(self, entrants: list[_Entrant], turns: int) -> dict[str, Timing]:
        """Times what fits into memory together: while that is too little, the last that was prepared stands back."""
        able = {entrant.name: entrant for entrant in entrants if entrant.step is not None}
        while able:
            try:
                steps = {name: entrant.step for name, entrant in able.items()}
                turns, seconds = (3, 0.0) if self.smoke else (turns, 0.02)
                return interleave(steps, turns=turns, warmup=3, sample_seconds=seconds, device=self.device)
            except torch.OutOfMemoryError as error:
                _, last = able.popitem()
                steps.clear()
                last.step, last.known = None, {"missing": f"no memory beside the others: {in_a_line(error)}"}
            self._make_room()
        return {}

    def _make_room(self) -> None:
        """Frees what a failure has left; raises where it has taken the device from this process."""
        gc.collect()
        self._wait()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _measurement(self, job: Job, entrant: _Entrant, times: dict[str, Timing], wait: bool = True) -> Measurement:
        name = entrant.name
        timing = times.get(name)
        cost = self._cost(job, name, wait)
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
            check=entrant.check,
            seconds=timing.to_dict() if timing else None,
            speedup=others,
            images=job.batch,
            moved=cost.nbytes if cost else None,
            flops=cost.flops if cost else None,
            roofline=cost.seconds if cost else None,
            **entrant.known,
        )

    def _ask_for_costs(self, job: Job) -> None:
        """Lets another process count what the model of traffic says of a job, while this one measures it."""
        known = _known_device(self.device)
        if known is not None and (key := _key(job)) not in self._costs:
            self._pool = self._pool or ProcessPoolExecutor(1, get_context("spawn"))
            self._costs[key] = self._pool.submit(_costs_of, *key, known)

    def _cost(self, job: Job, name: str, wait: bool) -> Cost | None:
        """The cost of this contestant's schedule, where the device's peaks are known; where it is not counted yet,
        only if there is time to ``wait``."""
        asked = self._costs.get(_key(job))
        if asked is None or not (wait or asked.done()):
            return None
        try:
            costs = asked.result(_COUNTED_SECONDS)
        except Exception as error:  # whatever came of the other process
            del self._costs[_key(job)]
            self._leave_out(f"traffic of {job}: {in_a_line(error)}")
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


def _without_ratio(m: Measurement, over: str) -> Measurement:
    return replace(m, speedup={name: ratio for name, ratio in m.speedup.items() if name != over})


def _nothing_yet(device: torch.device, smoke: bool) -> Results:
    settings = {"cudnn.benchmark": True, "layout": "channels_last", "smoke": smoke, "sources": _sources()}
    settings |= {"done": [], "begun": "", "under_way": "", "without": {}, "left_out": [], "failed": []}
    known = _known_device(device)
    roofline = {}
    if known is not None:
        arithmetic = {str(dtype).removeprefix("torch."): peak for dtype, peak in known.arithmetic.items()}
        roofline = {"name": known.name, "bandwidth": known.bandwidth, "arithmetic": arithmetic}
    return Results(this_machine(device), settings, roofline=roofline)


def _sources() -> str:
    """A digest of the package: its Python and its library."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted([*root.rglob("*.py"), *root.glob("*.so")]):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _gone_on_with(path: Path, fresh: Results) -> Results | None:
    """What the file holds, if it was measured with these sources in this way on this machine."""
    try:
        found = Results.load(path)
    except (OSError, ValueError, TypeError, KeyError):  # none, or not such a file
        return None
    same = [found.settings.get(key) == fresh.settings[key] for key in ("sources", "smoke")]
    return found if all(same) and replace(found.machine, date=fresh.machine.date) == fresh.machine else None


def _known_device(device: torch.device) -> Device | None:
    """The device's published peaks, if its name says that they are in the table."""
    name = torch.cuda.get_device_name(device).replace(" ", "") if device.type == "cuda" else ""
    return next((known for key, known in DEVICES.items() if key in name), None)


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

    def out_of_time(sign: int, frame: object) -> None:
        bench.ended_here()
        os._exit(128 + sign)

    signal.signal(signal.SIGTERM, out_of_time)
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
