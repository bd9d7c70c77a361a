"""``python -m fusedres tune`` without a GPU: it says why; and its ``--ship``."""

from __future__ import annotations

import json

import pytest

from fusedres import env, tune_cli
from fusedres.cli import main
from fusedres.triton import tuning
from fusedres.triton.tuning import Verdict


@pytest.mark.skipif(env.triton_missing() is None, reason="the kernels run here")
def test_it_says_why_it_cannot_run(capsys):
    assert main(["tune", "resnet18"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("fusedres tune: triton: ") and env.triton_missing() in said and "; cuda: " in said


@pytest.mark.parametrize("options", [[], ["--ship"]])
def test_what_was_measured_is_shipped_if_asked(capsys, monkeypatch, tmp_path, options):
    monkeypatch.setenv("FUSEDRES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "_TABLES", tmp_path / "tables")
    tuning._table.cache_clear()

    def measured(model, images, **_):
        tuning.record_verdicts("cpu", {"a block": Verdict("triton", 1.0, 2.0)})
        return "a report"

    monkeypatch.setattr(tune_cli, "untunable", lambda device_type: None)
    monkeypatch.setattr(tune_cli, "tune", measured)
    assert main(["tune", "cifar_resnet", "--device", "cpu", "--batch", "1", "--size", "8", *options]) == 0
    tuning._table.cache_clear()
    said, table = capsys.readouterr().out, tmp_path / "tables" / "cpu.json"
    assert "a report" in said and table.exists() == bool(options)
    if options:
        assert f"shipped in {table}" in said
        assert json.loads(table.read_text())["verdicts"] == {"a block": ["triton", 1.0, 2.0, []]}
