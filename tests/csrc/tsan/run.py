"""Builds the CPU kernels under ThreadSanitizer and runs them from several threads (``make tsan``).

The scalar kernels, since what threads share does not depend on the instruction set. Python, libtorch and oneDNN are not
instrumented: of these the sanitizer sees locks, threads and memory that comes and goes. The first run is a planted
race, without whose report nothing that follows would mean anything.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
BUILD = ROOT / "build" / "tsan"
CXX = shlex.split(os.environ.get("CXX", "g++"))
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-fsanitize=thread", "-Wno-attributes"]
REPORT = "WARNING: ThreadSanitizer"


def torch_dir() -> Path:
    return Path(importlib.util.find_spec("torch").origin).parent


def sources() -> list[Path]:
    csrc = ROOT / "csrc"
    host = [csrc / "library.cpp", *csrc.glob("common/*.cpp"), *csrc.glob("cpu/*.cpp")]
    return sorted(s for s in host if not s.stem.endswith("_avx512bf16"))


def compile_one(source: Path) -> Path:
    """The object of a source; made again where the source or a header is younger."""
    target = BUILD / "obj" / f"{source.parent.name}_{source.stem}.o"
    headers = [*(ROOT / "csrc").rglob("*.h"), *HERE.rglob("*.h")]
    if target.exists() and all(target.stat().st_mtime > p.stat().st_mtime for p in (source, Path(__file__), *headers)):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    defines = ["-DFUSEDRES_NO_X86", "-DTORCH_TARGET_VERSION=0x020A000000000000", '-DFUSEDRES_CUDA_ARCHS=""']
    if source.stem.endswith("_kernel"):
        defines += ["-DFUSEDRES_ISA=scalar", "-DFUSEDRES_ISA_SCALAR"]
    includes = [f"-I{HERE / 'include'}", f"-I{ROOT / 'csrc'}", f"-I{torch_dir() / 'include'}"]
    subprocess.run([*CXX, *FLAGS, *defines, *includes, "-c", str(source), "-o", str(target)], check=True)
    return target


def build() -> Path:
    """A copy of the package with the instrumented library in it; returns the folder to import it from."""
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        objects = list(pool.map(compile_one, sources()))
    package = BUILD / "fusedres"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(ROOT / "fusedres", package, ignore=shutil.ignore_patterns("_C.so", "__pycache__"))
    libraries = [f"-L{torch_dir() / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
    link = [*CXX, "-shared", "-fsanitize=thread", *map(str, objects), *libraries, "-o", str(package / "_C.so")]
    subprocess.run(link, check=True)
    (package / "_build.json").write_text('{"built": true, "reason": "", "compiler": "", "torch": "", "cuda": false}')
    planted = [*CXX, *FLAGS, "-fvisibility=default", "-shared", str(HERE / "planted.cpp")]
    subprocess.run([*planted, "-o", str(BUILD / "planted.so")], check=True)
    return BUILD


def runtime() -> str:
    """The sanitizer's library, which must be in the process from its beginning."""
    found = subprocess.run([*CXX, "-print-file-name=libtsan.so"], capture_output=True, text=True, check=True)
    return str(Path(found.stdout.strip()).resolve())


def exercise(*arguments: str) -> str:
    """Everything that ``exercise.py`` and the sanitizer said."""
    environment = os.environ | {
        "LD_PRELOAD": runtime(),
        "PYTHONPATH": str(BUILD),
        "OMP_NUM_THREADS": "1",
        "TSAN_OPTIONS": "exitcode=0 report_thread_leaks=0",
    }
    command = [sys.executable, str(HERE / "exercise.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    said = done.stdout + done.stderr
    if done.returncode or "ran" not in done.stdout:
        sys.exit(f"the exercise failed ({done.returncode}):\n{said[-4000:]}")
    return said


def main() -> None:
    build()
    if REPORT not in exercise("planted", str(BUILD / "planted.so")):
        sys.exit("ThreadSanitizer does not see the planted race")
    reports = re.findall(rf"{REPORT}.*?={{18}}", exercise("fused"), re.DOTALL)
    # Others are between parts of libtorch; and the linker frees a thread's own memory once the thread has ended.
    reports = [report for report in reports if "_C.so" in report and "_dl_deallocate_tls" not in report]
    if reports:
        sys.exit(f"{len(reports)} reports, the first:\n{reports[0]}")
    print("ThreadSanitizer: the planted race is seen, the kernels have none")


if __name__ == "__main__":
    main()
