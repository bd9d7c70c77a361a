"""What the stage ``bench`` makes of the file that its process leaves."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field

import pytest

from tools.gpu import benches
from tools.gpu.process import Finished
from tools.gpu.record import CUT_OFF, FAILED, OK


def measurement(contestant, check="ok", suite="model", seconds=None):
    about = {"suite": suite, "subject": "resnet50", "workload": "inference", "shape": [1, 3, 8, 8], "speedup": {}}
    return {**about, "contestant": contestant, "check": check, "seconds": seconds}


@dataclass
class Stage:
    """A context whose processes end as they are told to, with a line of output each."""

    out: object
    endings: list
    dry: bool = True
    device: str = "cpu"
    note: object = lambda outcome: None
    commands: list = field(default_factory=list)

    def python(self, job, command, deadline, on_line):
        self.commands.append(command)
        status, line = self.endings.pop(0)
        on_line(line)
        return Finished(status, 1.0, (line,))


def ended(out, measurements, endings, **settings):
    (out / "bench.json").write_text(json.dumps({"measurements": measurements, "settings": settings}))
    stage = Stage(out, endings)
    return benches.bench(stage, time.monotonic() + 600), stage


def test_a_file_that_is_there_is_left_to_the_process_to_go_on_with(tmp_path):
    outcome, _ = ended(tmp_path, [measurement("eager", "", seconds={"median": 1.0})], [(0, "nothing left")])
    assert outcome.status == OK and outcome.details["measurements"] == 1


@pytest.mark.parametrize(
    ("found", "status"),
    [
        (measurement("fusedres (cuda)", "RED: x"), FAILED),
        (measurement("triton", "RED: x", suite="op"), FAILED),
        (measurement("TensorRT", "RED: x"), OK),
    ],
)
def test_what_is_red_is_told_and_ours_is_a_failure(tmp_path, found, status):
    outcome, _ = ended(tmp_path, [found], [(0, "done: all")])
    assert outcome.status == status
    assert outcome.problems == [f"resnet50 inference, {found['contestant']}: RED: x"]


def test_a_job_that_failed_is_a_failure(tmp_path):
    outcome, _ = ended(tmp_path, [], [(0, "done: all")], failed=["kernels: OutOfMemoryError"])
    assert outcome.status == FAILED and outcome.problems == ["kernels: OutOfMemoryError"]


def test_it_is_begun_again_where_it_died_measuring_and_only_there(tmp_path):
    outcome, stage = ended(tmp_path, [], [(-6, "begin: kernels"), (None, "begin: grouped")])
    assert len(stage.commands) == 2 and outcome.status == FAILED and "SIGABRT" in outcome.problems[0]
    outcome, stage = ended(tmp_path, [], [(1, "ImportError")])
    assert len(stage.commands) == 1 and outcome.problems == ["exit status 1: ImportError"]
    outcome, _ = ended(tmp_path, [], [(None, "begin: kernels")])
    assert outcome.status == CUT_OFF
