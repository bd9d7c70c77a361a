"""The CUTLASS convolutions compile without a GPU: Hopper's matrix instructions, no spills, the build's own command.

Compiling needs CUTLASS's headers: ``make cutlass`` fetches them and runs this file.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sass

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")

needs_headers = pytest.mark.skipif(
    importlib.util.find_spec("cutlass_library") is None, reason="needs nvidia-cutlass, the headers: make cutlass"
)


def rules(**variables: str) -> tuple[int, str]:
    """The ninja file that ``setup.py`` would write, without running it; or what it says instead."""
    code = (
        "import importlib.util, sys, setuptools\n"
        "setuptools.setup = lambda **_: None\n"
        "spec = importlib.util.spec_from_file_location('build', 'setup.py')\n"
        "build = sys.modules['build'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(build)\n"
        "build.BUILD.mkdir(parents=True, exist_ok=True)\n"
        "cxx = build.find_cxx()\n"
        "print(build.ninja_file(*build.rules_and_compiles(build.torch_dir(), cxx, build.find_cuda(cxx))))\n"
    )
    environment = {**os.environ, "FUSEDRES_CUDA": "1", "FUSEDRES_WERROR": "1", **variables}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    return result.returncode, result.stdout + result.stderr


@pytest.fixture
def headers(tmp_path) -> Path:
    """A folder for PYTHONPATH with the package of the headers in it, but for the headers."""
    (tmp_path / "cutlass_library").mkdir()
    (tmp_path / "cutlass_library" / "__init__.py").touch()
    return tmp_path


def test_only_where_it_is_asked_for(headers):
    code, text = rules(FUSEDRES_CUTLASS="0", PYTHONPATH=str(headers))
    assert code == 0 and "rule nvcc" in text and "cutlass" not in text
    code, text = rules(FUSEDRES_CUTLASS="1", FUSEDRES_CUDA_ARCHS="80")
    assert code != 0 and "needs 90a among the architectures" in text


def test_its_kernels_are_for_their_architecture_alone(headers):
    code, text = rules(FUSEDRES_CUTLASS="1", FUSEDRES_CUDA_ARCHS="80;90a", PYTHONPATH=str(headers))
    assert code == 0, text
    assert "build obj/cutlass/conv_epilogue.cu.o: cutlass " in text
    commands = {name: re.search(rf"rule {name}\n  command = (.*)", text)[1] for name in ("nvcc", "cutlass")}
    assert "sm_80" in commands["nvcc"] and "cutlass_library" not in commands["nvcc"]
    assert "sm_90a" in commands["cutlass"] and "sm_80" not in commands["cutlass"]
    assert f"-isystem {headers}/cutlass_library/source/include" in commands["cutlass"]


@needs_headers
def test_compiles_to_hopper_s_matrix_instructions(tmp_path):
    code, text = rules(FUSEDRES_CUTLASS="1", FUSEDRES_CUDA_ARCHS="90a")
    assert code == 0, text
    command = re.search(r"rule cutlass\n  command = (.*)", text)[1].replace("$$", "$")
    target = tmp_path / "conv_epilogue.o"
    names = {"$in": str(ROOT / "csrc" / "cutlass" / "conv_epilogue.cu"), "$out": str(target), "$out.d": f"{target}.d"}
    command = [*(names.get(part, part) for part in shlex.split(command)), "-Xptxas=-v"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "wgmma.mma_async instructions are serialized" not in result.stderr
    if sass.cuobjdump() is None:
        pytest.skip("compiles; needs cuobjdump to see more")
    dump = subprocess.run([sass.cuobjdump(), "-sass", str(target)], capture_output=True, text=True, check=True).stdout
    kernels = [part for part in dump.split("Function : ")[1:] if "ConvUniversal" in part.partition("\n")[0]]
    assert len(kernels) == 6  # two dtypes, three tiles
    for kernel in kernels:
        assert "HGMMA" in kernel and "UTMALDG" in kernel and "UTMASTG" in kernel
