"""What compute-sanitizer prints, read."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import pytest

from tools.gpu import sanitizer as stage
from tools.gpu.process import Finished
from tools.gpu.record import FAILED, OK
from tools.gpu.sanitizer import Findings

CLEAN = """\
========= COMPUTE-SANITIZER
18 calls
========= ERROR SUMMARY: 0 errors
"""
WRITE = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at void fusedres::join_kernel<float>(Args)+0x110 in join.cu:55
=========     by thread (31,0,0) in block (1,0,0)
=========     Access at 0x7f0000000200 is out of bounds
=========
========= ERROR SUMMARY: 1 error
"""
RACE = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at fusedres::k(float *)+0x60 in reduce.h:12
=========     and Read access at fusedres::k(float *)+0x90 in reduce.h:14 [32 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
REFUSED = """\
========= COMPUTE-SANITIZER
========= Error: Device not supported. Please refer to the "Supported Devices" section
========= ERROR SUMMARY: 1 error
"""


@pytest.mark.parametrize(
    ("text", "status", "told", "problem"),
    [
        (CLEAN, 0, "0 errors", None),
        (CLEAN.replace("18 calls", "Traceback"), 1, "0 errors", "exit status 1"),
        (WRITE, 9, "1 errors", "Invalid __global__ write of size 4 bytes at void fusedres::join_kernel"),
        (RACE, 9, "1 errors", "Error: Race reported between Write access at fusedres::k"),
        (REFUSED, 9, "unavailable: Device not supported", None),
        ("", 127, "no summary (exit status 127)", "exit status 127"),
        ("========= COMPUTE-SANITIZER", None, "cut off", None),
    ],
)
def test_findings(text, status, told, problem):
    findings, lines = Findings(), tuple(text.splitlines())
    for line in lines:
        findings.read(line)
    finished = Finished(status, 1.0, lines)
    assert findings.told(finished).startswith(told)
    problems = findings.problems("memcheck cuda", finished)
    assert problems == [] if problem is None else problem in problems[0]


@dataclass
class Machine:
    """A context in which compute-sanitizer finds nothing; it keeps what it was asked to run, and for how long."""

    names: dict[str, tuple[int, str]]
    dry: bool = False
    device: str = "cuda"
    note: object = lambda outcome: None
    runs: dict[str, tuple[list[str], float]] = field(default_factory=dict)

    def python(self, job, command, deadline):
        status, line = self.names[command[-1]]
        return Finished(status, 1.0, ("a warning", line))

    def run(self, name, command, deadline, environment, on_line):
        self.runs[name] = command, deadline - time.monotonic()
        on_line("========= ERROR SUMMARY: 0 errors")
        return Finished(0, 1.0, ())


@pytest.fixture(autouse=True)
def compute_sanitizer(monkeypatch):
    monkeypatch.setattr(stage, "which", lambda tool: f"/bin/{tool}")


def test_every_run_has_its_share_of_the_time():
    machine = Machine({"cuda": (0, "fusedres"), "triton": (0, "_join_kernel _stats_kernel")})
    outcome = stage.sanitizer(machine, time.monotonic() + 100)
    assert outcome.status == OK and list(machine.runs) == list(outcome.details)
    shares = [round(seconds / 100, 2) for _, seconds in machine.runs.values()]
    assert shares == [0.25, 0.33, 0.5, 1.0]
    command = machine.runs["racecheck triton"][0]
    assert command.count("--kernel-name") == 2 and "kernel_substring=_stats_kernel" in command


def test_kernels_whose_names_are_not_known_are_no_success():
    machine = Machine({"cuda": (0, "fusedres"), "triton": (1, "ImportError: no triton")})
    outcome = stage.sanitizer(machine, time.monotonic() + 100)
    assert outcome.status == FAILED and "triton's kernels: exit status 1: ImportError" in outcome.problems[0]
    assert list(machine.runs) == ["memcheck cuda", "racecheck cuda"]
