"""What compute-sanitizer prints, read."""

from __future__ import annotations

import pytest

from tools.gpu.process import Finished
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
