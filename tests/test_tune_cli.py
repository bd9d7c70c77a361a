"""``python -m fusedres tune`` without a GPU: it says why."""

from __future__ import annotations

import pytest

from fusedres import env
from fusedres.cli import main


@pytest.mark.skipif(env.triton_missing() is None, reason="the kernels run here")
def test_it_says_why_it_cannot_run(capsys):
    assert main(["tune", "resnet18"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("fusedres tune: triton: ") and env.triton_missing() in said and "; cuda: " in said
