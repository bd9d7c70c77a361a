"""How the time is shared."""

from __future__ import annotations

import pytest

from tools.gpu.__main__ import STAGES, _share


def test_the_build_may_take_half_of_the_time_and_no_other_stage_more_than_its_share():
    assert _share(STAGES) == 0.5
    later = STAGES[1:]
    assert _share(later) == pytest.approx(later[0].seconds / sum(stage.seconds for stage in later))
    assert _share(STAGES[-1:]) == _share(STAGES[:1]) == 1.0
