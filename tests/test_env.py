"""The environment's variables, the library's loading, the report, and the command line that prints it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from argparse import ArgumentParser
from importlib import import_module
from pathlib import Path

import pytest
import torch

from fusedres import cli, env

ROOT = Path(__file__).resolve().parents[1]

needs_library = pytest.mark.skipif(env.library_missing() is not None, reason=str(env.library_missing()))


def variables_read() -> set[str]:
    """The FUSEDRES_* names that the sources ask the environment for."""
    sources = [ROOT / "setup.py", *ROOT.glob("fusedres/**/*.py"), *ROOT.glob("csrc/**/*.*")]
    asks = re.compile(r"(?:environ(?:\.get)?[\[(]|getenv\()\s*\"(FUSEDRES_\w+)\"")
    return {name for source in sources for name in asks.findall(source.read_text())}


def test_every_variable_is_documented_and_every_documented_one_is_read():
    assert variables_read() == {variable.name for variable in env.VARIABLES}


def test_missing_library_is_told_in_words(tmp_path):
    assert "is not there" in env._load(tmp_path / "_C.so", torch.__version__)


def test_broken_library_is_told_in_words(tmp_path):
    (tmp_path / "_C.so").write_text("not a library")
    assert "does not load" in env._load(tmp_path / "_C.so", torch.__version__)


@pytest.mark.parametrize("version", ["2.9.1", "1.13.0+cu117"])
def test_old_torch_is_told_in_words(version, tmp_path):
    assert version in env._load(tmp_path / "_C.so", version)


def test_report_names_every_backend_with_a_reason():
    report = env.env_report()
    assert [backend.name for backend in report.backends] == ["reference", "cpu", "triton", "cuda", "library"]
    assert all(backend.detail for backend in report.backends)
    assert report.threads == torch.get_num_threads()
    assert all(backend.name in str(report) and backend.detail in str(report) for backend in report.backends)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_cuda_backend_without_cuda():
    cuda = next(backend for backend in env.env_report().backends if backend.name == "cuda")
    assert not cuda.available
    assert cuda.detail.startswith("this torch has no CUDA")


NVCC = "nvcc was not found (looked at CUDACXX, CUDA_HOME, the path and /usr/local/cuda)"


@pytest.mark.parametrize(
    ("torch_has", "gpu", "library", "record", "expected"),
    [
        (False, False, None, {"cuda": True}, "this torch has no CUDA"),
        (True, False, None, {"cuda": True}, "torch sees no usable GPU (Found no NVIDIA driver)"),
        (
            False,
            False,
            None,
            {"cuda": False, "cuda_reason": NVCC},
            f"this torch has no CUDA; the library was built without CUDA: {NVCC}",
        ),
        (True, True, None, {"cuda": False, "cuda_reason": NVCC}, f"the library was built without CUDA: {NVCC}"),
        (True, True, "the compiled library is not there", {}, "the compiled library is not there"),
        (True, True, None, {"cuda": True, "archs": "80"}, "the library was built for 80, the GPU is 9.0"),
        (True, True, None, {"cuda": True, "archs": "80;90a"}, None),
    ],
)
def test_every_reason_against_cuda_is_told(monkeypatch, torch_has, gpu, library, record, expected):
    def init() -> None:
        raise RuntimeError("Found no NVIDIA driver\nPlease install one")

    monkeypatch.setattr(torch.version, "cuda", "13.0" if torch_has else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(env, "library_missing", lambda: library)
    monkeypatch.setattr(env, "_build_record", lambda: record)
    assert env.cuda_missing() == expected
    assert env.cutlass_missing() == (
        expected or "the library was built without CUTLASS (FUSEDRES_CUTLASS=1 builds with it)"
    )
    if expected is None:
        monkeypatch.setattr(env, "_build_record", lambda: {**record, "cutlass": True})
        assert env.cutlass_missing() is None
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
        assert "the GPU has 8.0" in env.cutlass_missing()


@pytest.mark.parametrize(
    ("archs", "capability", "expected"),
    [
        ("80;90a;100+PTX", (8, 0), True),
        ("80;90a;100+PTX", (8, 6), True),  # a later device of the same generation
        ("80;90a;100+PTX", (9, 0), True),
        ("80;90a;100+PTX", (7, 5), False),
        ("80;90a;100+PTX", (12, 0), True),  # through PTX
        ("80;90a", (10, 0), False),
        ("80+PTX", (9, 0), True),
        ("90a+PTX", (10, 0), False),  # architecture-specific PTX is no use elsewhere
        ("100f", (10, 3), True),
        ("86", (8, 0), False),
    ],
)
def test_runs_on(archs, capability, expected):
    assert env.runs_on(archs, capability) is expected


@needs_library
def test_every_instruction_set_can_be_chosen_at_run_time():
    before = torch.ops.fusedres.cpu_isa()
    try:
        for isa in torch.ops.fusedres.cpu_isas():
            torch.ops.fusedres.set_cpu_isa(isa)
            assert torch.ops.fusedres.cpu_isa() == isa
        with pytest.raises(RuntimeError, match="no instruction set 'neon'; it has scalar"):
            torch.ops.fusedres.set_cpu_isa("neon")
    finally:
        torch.ops.fusedres.set_cpu_isa(before)


@needs_library
def test_library_knows_how_it_was_built():
    info = dict(pair.split("=", 1) for pair in torch.ops.fusedres.build_info().split("|"))
    assert info["torch_target"] == "2.10"
    assert info["cuda_archs"] == env._build_record()["archs"]


def report_in_new_process(**variables: str) -> dict:
    command = [sys.executable, "-m", "fusedres", "env", "--json"]
    result = subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@needs_library
def test_isa_variable_lowers_the_instruction_set():
    report = report_in_new_process(FUSEDRES_ISA="scalar")
    assert report["instruction_set"] == "scalar"
    assert report["instruction_sets"][0] == "scalar"


@needs_library
def test_wrong_isa_variable_is_reported_and_does_not_raise():
    report = report_in_new_process(FUSEDRES_ISA="sse9")
    cpu = next(backend for backend in report["backends"] if backend["name"] == "cpu")
    assert not cpu["available"]
    assert "FUSEDRES_ISA=sse9" in cpu["detail"]


def test_env_command_prints_the_report(capsys):
    assert cli.main(["env"]) == 0
    assert "backends" in capsys.readouterr().out
    assert cli.main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == env.env_report().to_dict()


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_keeps_the_form(name):
    module = import_module(cli.COMMANDS[name].module)
    module.add_arguments(ArgumentParser())
    assert callable(module.run)


def test_no_command_is_an_error_that_lists_them(capsys):
    with pytest.raises(SystemExit) as error:
        cli.main([])
    assert error.value.code == 2
