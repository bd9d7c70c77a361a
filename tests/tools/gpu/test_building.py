"""What is built for which GPU, and a wheel in the build's place."""

from __future__ import annotations

import json
import runpy
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from tools.gpu.building import _what_went_wrong, arch_of, unpacked
from tools.gpu.probe import capability
from tools.gpu.process import Finished

ROOT = Path(__file__).parents[3]
SMI = "/usr/bin/nvidia-smi: NVIDIA H100 80GB HBM3, 580.159.04, 9.0, 81559 MiB"


@pytest.mark.parametrize(("found", "arch"), [("8.0", "80"), ("9.0", "90a"), ("10.0", "100"), (None, None)])
def test_the_architecture_of_a_capability(found, arch):
    assert arch_of(found) == arch


def test_the_capability_is_the_drivers_word_else_torchs():
    assert capability({"tools": {"nvidia-smi": SMI}, "torch": {"capability": "8.0"}}) == "9.0"
    assert capability({"tools": {"nvidia-smi": None}, "torch": {"capability": "8.0"}}) == "8.0"
    assert capability({"tools": {"nvidia-smi": "/usr/bin/nvidia-smi: NVIDIA-SMI has failed"}}) is None
    assert capability({}) is None


def test_a_wheel_goes_into_the_tree(tmp_path):
    (tmp_path / "fusedres").mkdir()
    wheel = tmp_path / "fusedres.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("fusedres/_C.so", "machine code")
        archive.writestr("fusedres/_build.json", "{}")
    assert unpacked(wheel, tmp_path) is None
    assert sorted(path.name for path in (tmp_path / "fusedres").iterdir()) == ["_C.so", "_build.json"]
    assert "No such file" in unpacked(tmp_path / "absent.whl", tmp_path)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("fusedres/__init__.py", "")
    assert "_C.so" in unpacked(wheel, tmp_path)


def test_a_build_says_what_went_wrong(tmp_path):
    failed = Finished(1, 2.0, ("[3/9] nvcc obj/cuda/join.cu.o", "join.cu(7): error: expected a ';'", "ninja: stopped"))
    assert "expected a ';'" in _what_went_wrong(failed, tmp_path, True)
    (tmp_path / "fusedres").mkdir()
    record = tmp_path / "fusedres" / "_build.json"
    done = Finished(0, 2.0, ())
    for content, expected in (
        ({"built": False, "reason": "no compiler", "cuda": False, "cuda_reason": ""}, "no compiler"),
        ({"built": True, "reason": "", "cuda": False, "cuda_reason": "no nvcc"}, "without CUDA: no nvcc"),
    ):
        record.write_text(json.dumps(content))
        assert expected in _what_went_wrong(done, tmp_path, True)
    assert _what_went_wrong(done, tmp_path, False) is None


@pytest.mark.parametrize("wheel", [False, True])
def test_an_older_setuptools_builds_too(wheel, monkeypatch):
    """Before 70.1 it had no command for wheels, which was in a package of its own."""
    monkeypatch.setitem(sys.modules, "setuptools.command.bdist_wheel", None)
    monkeypatch.setitem(sys.modules, "wheel", ModuleType("wheel"))
    found = ModuleType("wheel.bdist_wheel")
    found.bdist_wheel = object
    monkeypatch.setitem(sys.modules, "wheel.bdist_wheel", found if wheel else None)
    given = {}
    monkeypatch.setattr("setuptools.setup", given.update)
    runpy.run_path(str(ROOT / "setup.py"))
    assert list(given["cmdclass"]) == ["build_ext", *["bdist_wheel"] * wheel]
