"""What a benchmark found, as data, and the JSON file that holds it: one form for every command and suite.

A file is one :class:`Results`. Whoever measures writes it with :meth:`Results.save`, which may be called again and
again as a run goes on (the file is replaced in one step); whoever reports reads it with :meth:`Results.load`, which
also reads files from before a field existed. Times are in seconds and amounts in bytes and floating-point operations,
except in ``rows``, which name their unit.

======================  ===============================================================================================
``machine``             :class:`Machine`: device, threads, versions, commit, date
``settings``            how it was measured; ``left_out``: what was not, for want of time, in words
``rows``                :class:`Row`: the headline table, with its goals
``grid``                cells of the grid of blocks (see :mod:`fusedres.benchmarking.grid`)
``measurements``        :class:`Measurement`: one for each contestant of each group, absent ones with the reason
``memory``              :class:`MemoryUse`: saved and peak bytes of each form of each network
``traffic``             :meth:`fusedres.analysis.traffic.Traffic.to_dict`, for each network, mode and device
``roofline``            the device's peaks: ``{"name", "bandwidth", "arithmetic": {"float32": ...}}``
``stages``              what else was run and how it ended: ``{"name", "status", "seconds", "detail"}``
======================  ===============================================================================================

A measurement whose ``check`` is red has no speed-up, and none is taken over it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fusedres

from ..env import env_report

__all__ = [
    "CONTRARY",
    "HEAD",
    "Goal",
    "Machine",
    "Measurement",
    "MemoryUse",
    "Results",
    "Row",
    "quantity",
    "ratio_of_times",
    "this_machine",
    "times",
]

HEAD = (
    "ResNet-50, batch 8, 224 x 224",
    "eager",
    "torch.compile",
    "fusedres",
    "images/s",
    "over eager",
    "over compile",
    "at least / aim",
    "reached",
    "check",
)
"""The columns of :meth:`Row.cells`."""


@dataclass(frozen=True)
class Goal:
    """What a row should reach; for ratios of bytes and for seconds, less is better."""

    at_least: float
    aim: float | None = None
    less_is_better: bool = False
    unit: str = "x"

    def reached(self, value: float) -> str:
        """``"aim"``, ``"yes"`` or ``"no"``."""
        if self.aim is not None and self._meets(value, self.aim):
            return "aim"
        return "yes" if self._meets(value, self.at_least) else "no"

    def _meets(self, value: float, bound: float) -> bool:
        return value <= bound if self.less_is_better else value >= bound

    def __str__(self) -> str:
        bounds = [self.at_least] if self.aim is None else [self.at_least, self.aim]
        return " / ".join(f"{bound:.2f}{self.unit}" for bound in bounds)


@dataclass(frozen=True)
class Row:
    """One line of the table. The contestants are in ``unit``; what was not measured is ``None``.

    Attributes:
        ratio: over eager, the median over turns; ``None`` where the check is red.
        compile_note: why ``torch.compile`` is missing, or how long its first step took.
        check: ``"ok"``, or what disagrees; empty where there is nothing to check.
        spread: quartiles of each contestant.
        goal_of: whether the goal is for the ``ratio`` or for what ``fusedres`` itself took.
        shares: of our time, by kind of work.
    """

    name: str
    unit: str
    goal: Goal
    eager: float | None = None
    compiled: float | None = None
    ours: float | None = None
    ratio: float | None = None
    compile_ratio: float | None = None
    images_per_second: float | None = None
    compile_note: str = ""
    check: str = ""
    spread: dict[str, Any] = field(default_factory=dict)
    goal_of: str = "ratio"
    shares: dict[str, float] = field(default_factory=dict)

    @property
    def reached(self) -> str:
        value = self.ratio if self.goal_of == "ratio" else self.ours
        return "" if value is None else self.goal.reached(value)

    @property
    def over_eager(self) -> str:
        """The ratio as text; marked where the medians contradict it."""
        return ratio_of_times(self.ratio, self.eager, self.ours) if self.unit == "ms" else times(self.ratio)

    def cells(self) -> tuple[str, ...]:
        """The row as text, one string for each of :data:`HEAD`."""
        compiled = " ".join(part for part in (quantity(self.compiled, self.unit), self.compile_note) if part)
        return (
            self.name,
            quantity(self.eager, self.unit),
            compiled,
            quantity(self.ours, self.unit),
            "" if self.images_per_second is None else f"{self.images_per_second:.1f}",
            self.over_eager,
            ratio_of_times(self.compile_ratio, self.compiled, self.ours),
            str(self.goal),
            self.reached,
            self.check,
        )


def quantity(value: float | None, unit: str) -> str:
    """A number with its unit, three digits of it; empty for ``None``."""
    if value is None:
        return ""
    return f"{value:.3g} {unit}" if value < 100 else f"{value:.0f} {unit}"


def times(value: float | None) -> str:
    """A ratio; empty for ``None``."""
    return "" if value is None else f"{value:.2f}x"


_BACKENDS = ("cpu", "cuda", "triton")
"""What an op's kernels go by as contestants; ``reference`` is none of them."""


CONTRARY = "†"
"""Behind a ratio that the medians beside it contradict."""


def ratio_of_times(ratio: float | None, theirs: float | None, ours: float | None) -> str:
    """A ratio that is the median over turns, with :data:`CONTRARY` where the medians of what it is the ratio of, which
    stand beside it, say the contrary: who was the faster. So it may be on a machine whose speed changes."""
    text = times(ratio)
    if not (ratio and theirs and ours):
        return text
    by_turns, by_medians = (round(value, 2) - 1 for value in (ratio, theirs / ours))
    return f"{text} {CONTRARY}" if by_turns * by_medians < 0 else text


@dataclass(frozen=True)
class Measurement:
    """One contestant of one group: what it took, and what that means. What was not measured is ``None``.

    A group is a subject, a workload, a dtype, a shape and a layout; its contestants were timed in turns.

    Attributes:
        suite: ``"op"``, ``"block"``, ``"model"``, ``"ode"``, or that of a command: ``"growth"``, ``"first step"``,
            ``"ddp"``, ``"compiled"``, ``"overhead"``.
        subject: the op, block or network.
        workload: ``"train step"``, ``"inference"``, or what an op does (``"forward"``, ``"backward"``).
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``: what convolutions compute in.
        autocast: whether that is autocast's doing, the parameters being float32.
        layout: of the input, ``"channels_last"`` or ``"contiguous"``; a contestant may say another in its name.
        shape: of the input, as a rule ``[N, C, H, W]``; an op's further parameters are in ``variant``.
        contestant: ``"fusedres"``, ``"eager"``, or the name of a peer.
        baseline: whether it is what correctness is measured by, stock PyTorch.
        missing: why there are no numbers; empty where there are.
        check: ``"ok"``, ``"RED: ..."``, or empty where nothing was compared.
        seconds: of a call: ``median``, ``min``, ``q1``, ``q3``, ``turns``.
        note: what else there is to say, as that a compiler found its work done on disk.
        first_step: seconds until the first call had returned, preparation (patching, compiling, exporting) included.
        speedup: by contestant, how many times faster this one is: the median over turns of the ratio within a turn.
        moved: bytes that a call moves as the model of :mod:`fusedres.analysis.traffic` counts them for this
            contestant's schedule (for an op: what a single pass over its operands and results moves).
        flops: of its matrix products.
        roofline: seconds that the device's peaks allow for these.
        saved: bytes that autograd keeps between forward and backward.
        peak: bytes that a call allocates at its peak beyond what was there before.
    """

    suite: str
    subject: str
    workload: str
    dtype: str
    shape: tuple[int, ...]
    contestant: str
    variant: str = ""
    autocast: bool = False
    layout: str = "channels_last"
    depth: int | None = None
    baseline: bool = False
    missing: str = ""
    check: str = ""
    seconds: dict[str, float] | None = None
    note: str = ""
    first_step: float | None = None
    speedup: dict[str, float] = field(default_factory=dict)
    images: int | None = None
    moved: int | None = None
    flops: int | None = None
    roofline: float | None = None
    saved: int | None = None
    peak: int | None = None

    @property
    def group(self) -> str:
        """What its contestants share, in words."""
        dtype = f"{self.dtype} autocast" if self.autocast else self.dtype
        shape = "x".join(map(str, self.shape))
        layout = "" if self.layout == "channels_last" else self.layout
        return ", ".join(part for part in (self.subject, self.variant, self.workload, dtype, shape, layout) if part)

    @property
    def ours(self) -> bool:
        """Whether it is a form of this library: a patched network or block, or a kernel."""
        return self.contestant.startswith("fusedres") or (self.suite == "op" and self.contestant in _BACKENDS)

    @property
    def remark(self) -> str:
        """Why it is missing, or in parentheses how long its first step took."""
        if self.first_step is None:
            return self.missing
        return f"({self.first_step:.0f} s{f', {self.note}' if self.note else ''})"

    @property
    def images_per_second(self) -> float | None:
        return self._per_second(self.images)

    @property
    def bytes_per_second(self) -> float | None:
        return self._per_second(self.moved)

    @property
    def flops_per_second(self) -> float | None:
        return self._per_second(self.flops)

    @property
    def of_roofline(self) -> float | None:
        """The roofline's time over the measured: 1 is all that the device allows."""
        return self._per_second(self.roofline)

    def _per_second(self, amount: float | None) -> float | None:
        return None if amount is None or self.seconds is None else amount / self.seconds["median"]


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of one training step of one form of a network.

    Attributes:
        variant: ``"stock"``, ``"patched"``, ...: :data:`fusedres.analysis.memory.VARIANTS`.
        saved: what autograd keeps between forward and backward, counted by storage.
        peak: growth of the resident set of a process of its own, or of the device's allocated memory.
        missing: why there are no numbers; empty where there are.
    """

    model: str
    shape: tuple[int, ...]
    dtype: str
    variant: str
    device: str = "cpu"
    saved: int = 0
    peak: int = 0
    missing: str = ""


@dataclass(frozen=True)
class Machine:
    """What the numbers depend on besides the code.

    Attributes:
        gpu: its name, where the numbers are a GPU's; empty for a CPU's.
        packages: versions of the peers and of what they run on.
    """

    cpu: str
    threads: int
    instruction_set: str
    torch: str
    python: str
    fusedres: str
    commit: str
    date: str
    gpu: str = ""
    packages: dict[str, str] = field(default_factory=dict)

    @property
    def device(self) -> str:
        """The GPU, or the CPU with its threads."""
        return self.gpu or f"{self.cpu}, {self.threads} threads"

    @property
    def changed(self) -> bool:
        """Whether files had been changed since the commit, so that it does not say what was measured."""
        return self.commit.endswith("+")

    @property
    def slug(self) -> str:
        """A name for a folder."""
        return re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")

    def __str__(self) -> str:
        host = f"{self.cpu}, {self.threads} threads ({self.instruction_set})"
        return (
            f"{f'{self.gpu}, {host}' if self.gpu else host}, torch {self.torch}, Python {self.python}, "
            f"fusedres {self.fusedres} at {self.commit}, {self.date}"
        )


PACKAGES = ("triton", "onnxruntime", "openvino", "tensorrt", "torchdiffeq", "apex")
"""Whose versions a result carries besides those of torch and Python."""


def this_machine(device: str | torch.device = "cpu") -> Machine:
    """The machine, the versions and the commit of this process, for numbers of ``device``."""
    report = env_report()
    device = torch.device(device)
    return Machine(
        report.cpu,
        report.threads,
        report.instruction_set,
        report.versions["torch"],
        report.versions["python"],
        fusedres.__version__,
        _commit(),
        date.today().isoformat(),
        "" if device.type == "cpu" else torch.cuda.get_device_name(device),
        {name: found for name in PACKAGES if (found := _version(name))},
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    """The commit of the working tree that the package lies in, with ``+`` where files have changed since: others than
    results, of which a series of measurements writes one after the other. A copy without git is told its commit by
    the environment variable ``FUSEDRES_COMMIT``.
    """
    commit = _git("rev-parse", "--short", "HEAD")
    if not commit:
        return os.environ.get("FUSEDRES_COMMIT") or "an unknown commit"
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":(top)", ":(top,exclude)bench/results")
    return f"{commit}+" if changed else commit


def _git(*arguments: str) -> str:
    """What git says; nothing where it fails."""
    try:
        said = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return said.stdout.strip()


@dataclass(frozen=True)
class Results:
    """What one file holds; the module's docstring has what each part is."""

    machine: Machine
    settings: dict[str, Any]
    rows: tuple[Row, ...] = ()
    grid: Sequence[dict[str, Any]] = ()
    measurements: tuple[Measurement, ...] = ()
    memory: tuple[MemoryUse, ...] = ()
    traffic: tuple[dict[str, Any], ...] = ()
    roofline: dict[str, Any] = field(default_factory=dict)
    stages: tuple[dict[str, Any], ...] = ()

    def save(self, path: Path) -> None:
        """Writes JSON, and the folder that it lies in. A reader sees the file as it was or as it is, never half."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.unfinished")
        unfinished.write_text(json.dumps(asdict(self), indent=1) + "\n")
        unfinished.replace(path)

    @classmethod
    def load(cls, path: Path) -> Results:
        """Reads what :meth:`save` wrote.

        Raises:
            TypeError: for a field that no part has.
        """
        content = json.loads(path.read_text())
        parts = {
            "machine": Machine(**content.pop("machine")),
            "rows": tuple(Row(**{**row, "goal": Goal(**row["goal"])}) for row in content.pop("rows", ())),
            "measurements": tuple(Measurement(**_shaped(each)) for each in content.pop("measurements", ())),
            "memory": tuple(MemoryUse(**_shaped(each)) for each in content.pop("memory", ())),
            "traffic": tuple(content.pop("traffic", ())),
            "stages": tuple(content.pop("stages", ())),
        }
        return cls(**parts, **content)


def _shaped(content: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no tuples."""
    return {**content, "shape": tuple(content["shape"])}
