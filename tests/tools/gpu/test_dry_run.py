"""The whole command on the CPU: every stage's own code, in the processes that it runs in, with small stand-ins."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fusedres import env
from fusedres import triton as backend
from fusedres.benchmarking.results import Results
from tools.gpu.__main__ import STAGES

ROOT = Path(__file__).parents[3]
COMMAND = [sys.executable, "-m", "tools.gpu", "--dry-run"]

pytestmark = [
    pytest.mark.skipif(env.library_missing() is not None, reason=str(env.library_missing())),
    pytest.mark.skipif(backend.missing() is not None, reason=str(backend.missing())),
    pytest.mark.skipif(sys.platform != "linux", reason="the emulator needs Linux"),
]


def test_every_stage_runs(tmp_path):
    result = subprocess.run(
        [*COMMAND, "--out", str(tmp_path), "--budget", "1500"], cwd=ROOT, capture_output=True, text=True
    )
    log = (tmp_path / "log.txt").read_text()
    assert result.returncode == 0, result.stdout + log
    content = json.loads((tmp_path / "gpu.json").read_text())
    stages = {stage["name"]: stage for stage in content["stages"]}
    assert list(stages) == [stage.name for stage in STAGES]
    assert {name: stage["status"] for name, stage in stages.items()} == dict.fromkeys(stages, "ok"), log
    assert not any(stage["problems"] for stage in stages.values())
    assert (tmp_path / "table.txt").read_text() in result.stdout

    assert stages["build"]["details"]["backends"]["cpu"]["available"]
    assert stages["build"]["details"]["build"]["built"]
    assert all(file["counts"]["passed"] for file in stages["tests"]["details"]["files"].values())
    assert stages["layouts"]["details"]["fragments"] == "as the emulator has them"
    assert set(stages["sanitizer"]["details"].values()) == {"0 errors"}
    measured = Results.load(tmp_path / "bench.json").measurements
    assert {m.contestant for m in measured if m.suite == "model" and m.seconds} >= {"eager", "fusedres"}
    assert {m.subject for m in measured if m.suite == "op"} >= {"bn_stats", "join"}
    table = json.loads((tmp_path / stages["tune"]["details"]["table"]).read_text())
    assert len(table["entries"]) == stages["tune"]["details"]["entries"] == 1
    assert len(list(tmp_path.iterdir())) == 5, "docs/gpu.md names them"


def test_being_ended_loses_nothing(tmp_path):
    process = subprocess.Popen([*COMMAND, "--out", str(tmp_path), "--only", "tests"], cwd=ROOT, stdout=subprocess.PIPE)
    path, deadline = tmp_path / "gpu.json", time.monotonic() + 300
    while time.monotonic() < deadline and (not path.exists() or '"tests"' not in path.read_text()):
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    assert process.returncode == 130
    stages = {stage["name"]: stage["status"] for stage in json.loads(path.read_text())["stages"]}
    assert stages == {"build": "ok", "tests": "cut off"}


@pytest.mark.parametrize("arguments", [["--only", "bench,nonsense"], ["--budget", "soon"]])
def test_wrong_arguments_are_refused(arguments):
    result = subprocess.run([*COMMAND, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and "usage" in result.stderr
