"""The build: incremental, loud about code that does not compile, and quiet about a compiler that is not there."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fusedres import env

ROOT = Path(__file__).resolve().parents[1]

needs_cxx = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler"
)


COPIED = ("setup.py", "pyproject.toml", "LICENSE", "csrc/library.cpp", "csrc/common/isa.h", "csrc/common/isa.cpp")
KERNEL = "namespace fusedres::FUSEDRES_ISA { int tiny() { return 1; } }\n"


class Project:
    """A copy of the build with hardly any source, so that it builds in seconds."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in COPIED:
            self.write(name, (ROOT / name).read_text())
        self.kernel = self.write("csrc/cpu/tiny_kernel.cpp", KERNEL)
        self.write("fusedres/__init__.py", "")

    def write(self, name: str, text: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def build(self, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        environment = {**os.environ, "FUSEDRES_CUDA": "0", **variables}
        return subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True)

    @property
    def library(self) -> Path:
        return self.root / "fusedres" / "_C.so"

    @property
    def record(self) -> dict:
        return json.loads((self.root / "fusedres" / "_build.json").read_text())


@pytest.fixture
def project(tmp_path) -> Project:
    return Project(tmp_path / "a folder with spaces")


@needs_cxx
def test_build_is_incremental_and_follows_headers(project):
    first = project.build()
    assert first.returncode == 0, first.stdout + first.stderr
    assert project.library.exists()
    assert project.record["built"]
    assert project.record["cuda_reason"] == "built with FUSEDRES_CUDA=0"

    assert "no work to do" in project.build().stdout

    (project.root / "csrc/common/isa.h").touch()
    rebuilt = project.build().stdout
    assert "obj/library.cpp.o" in rebuilt
    assert "tiny_kernel" not in rebuilt

    project.kernel.write_text("this is not C++\n")
    broken = project.build()
    assert broken.returncode != 0
    assert "do not compile" in broken.stderr


def test_no_compiler_installs_without_the_library(project):
    project.write("fusedres/_C.so", "from an earlier build")
    result = project.build(CXX="/nonexistent/c++")
    assert result.returncode == 0, result.stderr
    assert not project.library.exists()
    assert project.record == project.record | {"built": False, "cuda": False}
    if sys.platform == "linux":
        assert "CXX=/nonexistent/c++ was not found" in project.record["reason"]


def test_skipped_build_installs_without_the_library(project):
    result = project.build(FUSEDRES_SKIP_BUILD="1")
    assert result.returncode == 0, result.stderr
    assert not project.library.exists()
    assert "FUSEDRES_SKIP_BUILD=1" in project.record["reason"]


@pytest.mark.parametrize("variables", [{}, {"FUSEDRES_SKIP_BUILD": "1"}], ids=["built", "skipped"])
def test_one_wheel_for_every_python(project, variables):
    """The library does not touch Python's ABI, so the wheel's name must not either."""
    project.write("fusedres/triton/__init__.py", "")
    project.write("fusedres/triton/tables/a-device.json", "{}")
    command = [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", "dist"]
    environment = {**os.environ, "FUSEDRES_CUDA": "0", **variables}
    result = subprocess.run(command, cwd=project.root, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (wheel,) = (project.root / "dist").iterdir()
    assert re.fullmatch(r"fusedres-[\d.]+-py3-none-\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        record = json.loads(archive.read("fusedres/_build.json"))
    assert ("fusedres/_C.so" in names) == record["built"]
    assert "fusedres/triton/tables/a-device.json" in names  # what was tuned for a release


@needs_cxx
def test_cutlass_is_refused_without_its_architecture(project):
    nvcc = project.write("nvcc", "#!/bin/sh\ncase $1 in --list-gpu-arch) echo compute_80;; esac\n")
    nvcc.chmod(0o755)
    result = project.build(FUSEDRES_CUDA="1", FUSEDRES_CUTLASS="1", CUDACXX=str(nvcc), FUSEDRES_CUDA_ARCHS="80")
    assert result.returncode != 0
    assert "FUSEDRES_CUTLASS=1 needs 90a among the architectures" in result.stderr
    assert not (project.root / ".eggs").exists(), "the build has fetched something"


@pytest.mark.parametrize("wanted", ["0", "1"])
def test_cutlass_s_headers_are_required_of_its_own_build_alone(project, wanted):
    code = "from setuptools import build_meta; print(build_meta.get_requires_for_build_wheel())"
    environment = {**os.environ, "FUSEDRES_CUTLASS": wanted}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=project.root, env=environment, capture_output=True, text=True, check=True)
    assert ("nvidia-cutlass==4.2" in result.stdout.splitlines()[-1]) is (wanted == "1")


@needs_cxx
def test_unknown_cuda_mode_is_refused(project):
    result = project.build(FUSEDRES_CUDA="maybe")
    assert result.returncode != 0
    assert "FUSEDRES_CUDA must be auto, 0 or 1, got 'maybe'" in result.stderr


@needs_cxx
@pytest.mark.skipif(env.library_missing() is not None, reason=str(env.library_missing()))
def test_kernels_share_no_code_between_instruction_sets():
    """A symbol that the linker may merge could bring AVX-512 into the code that every machine runs."""
    objects = sorted(ROOT.glob("build/fusedres/obj/cpu/*_kernel.cpp.*.o"))
    assert objects
    for path in objects:
        symbols = subprocess.run(["nm", "--demangle", str(path)], capture_output=True, text=True, check=True).stdout
        mergeable = [line for line in symbols.splitlines() if line[17:18] in "WVu"]
        assert not mergeable, f"{path.name}: {mergeable}"


@needs_cxx
def test_a_machine_without_ninja_builds_too(project, monkeypatch):
    spec = importlib.util.spec_from_file_location("setup_of_the_project", project.root / "setup.py")
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, script)
    monkeypatch.setattr("setuptools.setup", lambda **arguments: None)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "find_ninja", lambda: None)
    monkeypatch.setenv("FUSEDRES_CUDA", "0")
    assert script.build_library().built
    assert (script.BUILD / "_C.so").exists() and not (script.BUILD / "build.ninja").exists()
    project.kernel.write_text("this is not C++\n")
    with pytest.raises(SystemExit, match="do not compile"):
        script.build_library()
