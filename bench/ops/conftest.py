"""What the suites of ops share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from bench.ops.contestants import COMPILED, Contest


@pytest.fixture
def race(enter, smoke) -> Callable[..., None]:
    """``race(group, contestant, contest)``: makes the contest when its group has not raced, reports the contestant."""

    def run(group, contestant: str, contest: Callable[[], Contest], device: str = "cpu") -> None:
        def entrants():
            made = contest()
            if smoke:
                absent = {**(made.absent or {}), COMPILED: "nothing is compiled in a smoke test"}
                made = replace(made, memory=False, absent=absent)
            return made.entrants()

        enter(group, contestant, entrants, device=device)

    return run
