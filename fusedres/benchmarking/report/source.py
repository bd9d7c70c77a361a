"""What a file of results holds, in the one form that tables and figures read: measurements."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..results import Machine, Measurement, MemoryUse, Results, Row

__all__ = ["Source", "by_device", "load", "memory_of"]

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class Source:
    """A file of results.

    Attributes:
        name: its path as the page shows it, relative to the page's project where it lies in it.
    """

    name: str
    results: Results

    @property
    def machine(self) -> Machine:
        return self.results.machine

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        """Those of the file; where it has none of a network's or block's workload, from before there were any, what its
        headline rows and its grid amount to."""
        found = self.results.measurements
        # Not by group: a row does not say the shape, and would tell of one that nobody measured.
        seen = set(map(_timed, found))
        older = [*_of_rows(self.results), *_of_grid(self.results)]
        return (*found, *(m for m in older if _timed(m) not in seen))

    @property
    def memory(self) -> tuple[MemoryUse, ...]:
        return memory_of([self])


def _timed(m: Measurement) -> tuple[str, str, str, str, bool]:
    return m.suite, m.subject, m.workload, m.dtype, m.autocast


def load(path: Path, root: Path) -> Source:
    """Reads a file.

    Raises:
        ValueError: where it is no file of results.
    """
    try:
        results = Results.load(path)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no file of results: {error}") from error
    path = path.resolve()
    return Source(path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name, results)


def by_device(sources: list[Source]) -> dict[str, list[Source]]:
    """The files of each device, in their order."""
    found: dict[str, list[Source]] = {}
    for source in sources:
        found.setdefault(source.machine.device, []).append(source)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------

_NETWORKS = {
    "densenet121": "DenseNet-121",
    "preresnet50": "pre-activation ResNet-50",
    "resnet18": "ResNet-18",
    "resnet50": "ResNet-50",
    "resnext50_32x4d": "ResNeXt-50 32x4d",
    "seresnet50": "SE-ResNet-50",
    "wide_resnet50_2": "WRN-50-2",
}
"""What headline rows call the networks that commands know by another name."""


def memory_of(sources: Sequence[Source]) -> tuple[MemoryUse, ...]:
    """What files hold of memory, each form of each network once, under one name: what was measured in a process of its
    own before what headline rows and a GPU's training steps amount to."""
    measured = [use for source in sources for use in source.results.memory]
    counted = [use for source in sources for use in _memory_of_rows(source.results)]
    beside = [use for source in sources for use in _memory_of_steps(source.results)]
    found: dict[tuple[str, str, int, str], MemoryUse] = {}
    for use in (*measured, *counted, *beside):
        use = replace(use, model=_NETWORKS.get(use.model, use.model))
        found.setdefault((use.model, use.dtype, use.shape[0], use.variant), use)
    return tuple(found.values())


# ---------------------------------------------------------------------------------------------------------------------
# Headline rows and the grid
# ---------------------------------------------------------------------------------------------------------------------


def _of_rows(results: Results) -> Iterator[Measurement]:
    for row in results.rows:
        if row.unit != "ms" or row.images_per_second is None or not row.spread:
            continue
        network, workload = _network_and_workload(row, results.settings)
        size = results.settings["batch"]
        resolution = results.settings.get("resolution", 0)
        ratios = {"eager": row.ratio, "torch.compile": row.compile_ratio}
        for contestant, seconds in row.spread.items():
            ours = contestant == "fusedres"
            yield Measurement(
                "model",
                network,
                "train step" if "train" in workload else "inference",
                next((dtype for short, dtype in _DTYPES.items() if short in workload), "float32"),
                (size, 3, resolution, resolution) if resolution else (size,),
                contestant,
                autocast="autocast" in workload,
                baseline=contestant == "eager",
                check=row.check if ours else "",
                seconds=seconds,
                speedup={other: ratio for other, ratio in ratios.items() if ratio} if ours else {},
                images=size,
            )


def _network_and_workload(row: Row, settings: dict[str, Any]) -> tuple[str, str]:
    """``"DenseNet-121: train step, fp32"``, or the workload alone where the file is of one network."""
    network, separator, workload = row.name.partition(": ")
    return (network, workload) if separator else (settings.get("network", "the network"), row.name)


def _of_grid(results: Results) -> Iterator[Measurement]:
    for cell in results.grid:
        words = cell["case"].split()
        *block, mode, dtype, shape = words
        for contestant, seconds in cell["seconds"].items():
            ours = contestant == "fusedres"
            yield Measurement(
                "block",
                " ".join(block),
                "train step" if mode == "train" else "inference",
                _DTYPES[dtype],
                tuple(map(int, shape.split("x"))),
                contestant,
                autocast=dtype != "fp32",
                baseline=contestant == "eager",
                check=cell["check"] if ours else "",
                seconds=seconds,
                speedup={"eager": cell["ratio"]} if ours and cell["ratio"] else {},
            )


def _memory_of_rows(results: Results) -> Iterator[MemoryUse]:
    """The bytes that autograd keeps, of rows that compare stock with patched."""
    stock_seen = set()
    for row in results.rows:
        if row.unit != "MB" or row.eager is None or row.ours is None or row.ratio is None:
            continue
        network, workload = _network_and_workload(row, results.settings)
        if "ODE" in network:
            continue  # compares two ways of differentiating, not two forms of a network
        shape = (results.settings["batch"],)
        if network not in stock_seen:
            stock_seen.add(network)
            yield MemoryUse(network, shape, "float32", "stock", saved=round(1e6 * row.eager))
        variant = 'patched, memory="low"' if "low" in workload else "patched"
        yield MemoryUse(network, shape, "float32", variant, saved=round(1e6 * row.ours))


_MEMORY_FORMS = {"eager": "stock", "fusedres": "patched"}
_AHEAD = ("captured", "max-autotune")
"""Of contestants that run as CUDA graphs: what these need was allocated before the step whose peak is measured."""


def _memory_of_steps(results: Results) -> Iterator[MemoryUse]:
    """The peaks of a GPU's training steps. A CPU's are another quantity than what :class:`MemoryUse` has: they are of
    PyTorch's allocator, and not of a process."""
    for m in results.measurements if results.machine.gpu else ():
        if m.suite != "model" or m.workload != "train step" or m.peak is None or m.contestant.endswith(_AHEAD):
            continue
        form = next((form for form in _MEMORY_FORMS if m.contestant.startswith(form)), "")
        variant = _MEMORY_FORMS.get(form, "") + m.contestant.removeprefix(form)
        dtype = f"{m.dtype} autocast" if m.autocast else m.dtype
        yield MemoryUse(m.subject, m.shape, dtype, variant, "cuda", saved=m.saved or 0, peak=m.peak)
