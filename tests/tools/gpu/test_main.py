"""How the time is shared, and how a stage ends."""

from __future__ import annotations

import json
import time

import pytest

from tools.gpu.__main__ import STAGES, Stage, _run, _share
from tools.gpu.context import Context
from tools.gpu.process import Log
from tools.gpu.record import CUT_OFF, FAILED, Outcome, Record


def test_the_build_may_take_half_of_the_time_and_no_other_stage_more_than_its_share():
    assert _share(STAGES) == 0.5
    later = STAGES[1:]
    assert _share(later) == pytest.approx(later[0].seconds / sum(stage.seconds for stage in later))
    assert _share(STAGES[-1:]) == _share(STAGES[:1]) == 1.0


def test_what_threads_tell_after_the_end_changes_nothing(tmp_path):
    record = Record(tmp_path / "gpu.json", {})
    context = Context(tmp_path, tmp_path, Log(tmp_path / "log.txt"), dry=True)

    def ended(context, deadline):
        raise SystemExit(130)

    with pytest.raises(SystemExit):
        _run(Stage("tests", 1.0, ended), context, record, time.monotonic() + 9)
    context.note(Outcome(FAILED, problems=["ended by SIGTERM"]))
    assert [stage["status"] for stage in json.loads(record.path.read_text())["stages"]] == [CUT_OFF]
