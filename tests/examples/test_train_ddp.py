"""``examples/train_ddp.py``, run as its users run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def torchrun(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    options = ["--images", "160", "--batch", "16", "--epochs", "2"]
    return subprocess.run(
        [*command, str(ROOT / "examples/train_ddp.py"), *options, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )


def test_a_checkpoint_in_mid_epoch_goes_on_with_the_same_losses(tmp_path):
    pytest.importorskip("sklearn")
    whole = torchrun("--checkpoints", str(tmp_path), "--every", "3", "--losses", str(tmp_path / "whole.json"))
    assert whole.returncode == 0, whole.stderr
    assert "post-activation residual" in whole.stdout
    rest = torchrun("--resume", str(tmp_path / "step6.pt"), "--losses", str(tmp_path / "rest.json"))
    assert rest.returncode == 0, rest.stderr
    expected = json.loads((tmp_path / "whole.json").read_text())
    assert len(expected) == 10 and expected["9"] < 0.8 * expected["0"]
    assert json.loads((tmp_path / "rest.json").read_text()) == {n: expected[n] for n in ("6", "7", "8", "9")}
