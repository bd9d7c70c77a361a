"""The sign that weights were written to: taken at every inference call, so all that counts is what a call costs."""

from __future__ import annotations

import pytest
import torch

from bench.ops.contestants import BACKENDS, require
from fusedres.ops.registry import OPS

OP = OPS["fingerprint"]


@pytest.mark.parametrize("contestant", BACKENDS)
def test_fingerprint(race, contestant):
    require(contestant, torch.float32)
    arguments = [[torch.randn(256, 256, 3, 3), *torch.randn(5, 256).unbind(0)]]
    assert OP.overload(contestant)(*arguments) == OP.overload("reference")(*arguments)
    race("fingerprint", lambda: OP.overload(contestant)(*arguments), dtype=torch.float32)
