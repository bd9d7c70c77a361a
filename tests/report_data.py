"""Made-up results that have something for every table and figure."""

from __future__ import annotations

from dataclasses import replace

from fusedres.benchmarking.report.source import Source
from fusedres.benchmarking.results import Machine, Measurement, MemoryUse, Results

__all__ = ["MACHINE", "scaled", "source"]

MACHINE = Machine("A CPU", 2, "avx512", "2.13.0", "3.11.7", "0.1.0", "abc1234", "2026-01-02")


def timing(median: float) -> dict[str, float]:
    return {"median": median, "min": 0.9 * median, "q1": 0.96 * median, "q3": 1.04 * median, "turns": 9}


def measurements() -> list[Measurement]:
    eager = Measurement(
        "model",
        "resnet50",
        "train step",
        "float32",
        (8, 3, 224, 224),
        "eager",
        baseline=True,
        images=8,
        seconds=timing(0.7),
        first_step=0.8,
        moved=4 * 10**9,
        flops=10**11,
    )
    ours = replace(
        eager,
        contestant="fusedres",
        baseline=False,
        check="ok",
        seconds=timing(0.5),
        speedup={"eager": 1.4},
        roofline=0.3,
        first_step=1.1,
    )
    absent = replace(eager, contestant="TensorRT", baseline=False, seconds=None, missing="not installed")
    found = [eager, ours, absent, replace(ours, subject="densenet121", check="RED: output", seconds=None, speedup={})]
    for size, ratio in ((7, 0.9), (28, 1.3), (56, 1.6)):
        op = replace(ours, suite="op", subject="join", workload="forward", shape=(8, 64, size, size), first_step=None)
        found.append(replace(op, speedup={"eager": ratio}, seconds=timing(1e-5 * size), moved=10**5 * size, flops=None))
    for variant, values in (("batch", (1, 2, 4)), ("depth", (8, 14, 20))):
        for value in values:
            for name, cost in (("eager", 0.02), ("fusedres", 0.015)):
                found.append(
                    replace(
                        ours,
                        suite="growth",
                        variant=variant,
                        contestant=name,
                        first_step=None,
                        check="",
                        depth=value if variant == "depth" else None,
                        saved=10**7 * value,
                        shape=(value if variant == "batch" else 32, 3, 32, 32),
                        seconds=timing(cost * value),
                    )
                )
    for name, seconds in (("eager", 0.6), ("fusedres", 0.9), ("torch.compile", 60.0)):
        found.append(replace(eager, suite="first step", contestant=name, seconds=None, first_step=seconds))
    return found


def source(name: str = "bench/results/a-cpu-2-threads/full.json") -> Source:
    """A file of results."""
    memory = [
        MemoryUse("resnet50", (8, 3, 224, 224), "float32", variant, saved=saved, peak=2 * saved)
        for variant, saved in (("stock", 688_000_000), ("patched", 579_000_000), ('patched, memory="low"', 355_000_000))
    ]
    memory.append(MemoryUse("resnet50", (8, 3, 224, 224), "float32", "torch.compile", missing="it failed"))
    roofline = {"name": "this CPU", "bandwidth": 3e10, "arithmetic": {"float32": 3e11, "bfloat16": 2e12}}
    return Source(
        name,
        Results(
            MACHINE,
            {"left_out": ["OpenVINO: no time"]},
            measurements=tuple(measurements()),
            memory=tuple(memory),
            roofline=roofline,
        ),
    )


def scaled(before: Source, factor: float, contestant: str = "fusedres") -> Source:
    """The same with one contestant's times multiplied."""

    def slower(m: Measurement) -> Measurement:
        if m.contestant != contestant or m.seconds is None:
            return m
        return replace(m, seconds={k: v if k == "turns" else factor * v for k, v in m.seconds.items()})

    results = replace(before.results, measurements=tuple(map(slower, before.results.measurements)))
    return replace(before, results=results)
