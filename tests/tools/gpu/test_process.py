"""Commands under a time limit."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from tools.gpu.process import Log, run


@pytest.fixture
def log(tmp_path) -> Log:
    return Log(tmp_path / "log.txt")


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_output_goes_to_the_log_and_to_whoever_listens(tmp_path, log):
    heard = []
    code = "import os, sys; print(os.environ['WHICH']); print('on the other stream', file=sys.stderr); sys.exit(3)"
    finished = run(
        "job", python(code), log, time.monotonic() + 60, cwd=tmp_path, environment={"WHICH": "x"}, on_line=heard.append
    )
    assert finished.status == 3 and not finished.ok and finished.ending == "exit status 3"
    assert sorted(heard) == sorted(finished.lines) == ["on the other stream", "x"]
    text = (tmp_path / "log.txt").read_text()
    assert "[job] x\n" in text and "(exit status 3" in text


def test_the_limit_ends_what_the_command_started_too(tmp_path, log):
    inner = "import time, os; print(os.getpid(), flush=True); time.sleep(600)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    began = time.monotonic()
    finished = run("job", python(code), log, began + 20, cwd=tmp_path)
    assert finished.status is None and finished.ending.endswith("no time left")
    stat = Path(f"/proc/{int(finished.lines[0])}/stat")
    deadline = time.monotonic() + 60  # a busy machine takes its time to end a process
    while runs(stat):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def runs(stat: Path) -> bool:
    """Whether the process of this file is there, and more than a zombie."""
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_command_that_is_not_there(tmp_path, log):
    finished = run("job", ["/nonexistent/tool"], log, time.monotonic() + 9, cwd=tmp_path)
    assert finished.status == 127 and "nonexistent" in finished.last_line()


def test_a_signal_has_a_name(tmp_path, log):
    finished = run("job", python("import os; os.kill(os.getpid(), 11)"), log, time.monotonic() + 60, cwd=tmp_path)
    assert finished.ending == "ended by SIGSEGV" and finished.last_line("nothing") == "nothing"
