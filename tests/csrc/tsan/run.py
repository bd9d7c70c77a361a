"""Builds the CPU kernels under ThreadSanitizer and runs them from several threads (``make tsan``).

The scalar kernels, since what threads share does not depend on the instruction set. Python, libtorch and oneDNN are not
instrumented: of these the sanitizer sees locks, threads and memory that comes and goes. The first runs are of planted
races, without whose reports nothing that follows would mean anything: one on its own, and one in a kernel, whose
threads share the memory that each of them should have to itself.

A run that does not end is ended: the stacks of all its threads say where it was.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
BUILD = ROOT / "build" / "tsan"
CXX = shlex.split(os.environ.get("CXX", "g++"))
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-fsanitize=thread", "-Wno-attributes"]
REPORT = "WARNING: ThreadSanitizer"
LIMIT = 400.0
"""Seconds that a run may take; alone on a machine it is a minute."""

PLANTED = ROOT / "csrc" / "cpu" / "conv_wgrad.cpp", "static thread_local Scratch", "static Scratch"
"""The kernel with a race to plant, and what makes it one: a text in place of another."""


def torch_dir() -> Path:
    return Path(importlib.util.find_spec("torch").origin).parent


def sources() -> list[Path]:
    csrc = ROOT / "csrc"
    host = [csrc / "library.cpp", *csrc.glob("common/*.cpp"), *csrc.glob("cpu/*.cpp")]
    return sorted(s for s in host if not s.stem.endswith("_avx512bf16"))


def compile_one(source: Path) -> Path:
    """The object of a source; made again where the source, a header or this file is younger."""
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


def with_planted_race() -> Path:
    """A copy of a kernel's source with a race in it; written anew only where that changes it."""
    source, text, other = PLANTED
    content = source.read_text()
    assert text in content, f"{source.name} has no {text!r} any more: plant another race"
    copy, changed = BUILD / "planted" / source.name, content.replace(text, other)
    copy.parent.mkdir(parents=True, exist_ok=True)
    if not copy.exists() or copy.read_text() != changed:
        copy.write_text(changed)
    return copy


def package_of(folder: Path, objects: Sequence[Path]) -> Path:
    """A copy of the package with a library of these objects in it; returns the folder to import it from."""
    package = folder / "fusedres"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(ROOT / "fusedres", package, ignore=shutil.ignore_patterns("_C.so", "__pycache__"))
    libraries = [f"-L{torch_dir() / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
    link = [*CXX, "-shared", "-fsanitize=thread", *map(str, objects), *libraries, "-o", str(package / "_C.so")]
    subprocess.run(link, check=True)
    (package / "_build.json").write_text('{"built": true, "reason": "", "compiler": "", "torch": "", "cuda": false}')
    return folder


def build() -> tuple[Path, Path, Path]:
    """Where the instrumented package is, where the one with a planted race, and the library that is nothing but one."""
    bad = with_planted_race()
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        objects = dict(zip(files := [*sources(), bad], pool.map(compile_one, files)))
    good = [objects[source] for source in objects if source != bad]
    planted = [objects[source] for source in objects if source != PLANTED[0]]
    library = BUILD / "planted.so"
    alone = [*CXX, *FLAGS, "-fvisibility=default", "-shared", str(HERE / "planted.cpp"), "-o", str(library)]
    subprocess.run(alone, check=True)
    return package_of(BUILD, good), package_of(BUILD / "planted", planted), library


def runtime() -> str:
    """The sanitizer's library, which must be in the process from its beginning."""
    found = subprocess.run([*CXX, "-print-file-name=libtsan.so"], capture_output=True, text=True, check=True)
    return str(Path(found.stdout.strip()).resolve())


def exercise(package: Path, *arguments: str) -> str:
    """Everything that ``exercise.py`` and the sanitizer said."""
    environment = os.environ | {
        "LD_PRELOAD": runtime(),
        "PYTHONPATH": str(package),
        "OMP_NUM_THREADS": "1",
        "TSAN_OPTIONS": "exitcode=0 report_thread_leaks=0",
    }
    status, said = watched([*fixed_addresses(), sys.executable, str(HERE / "exercise.py"), *arguments], environment)
    if status or "\nran\n" not in f"\n{said}":
        sys.exit(f"the exercise failed ({status}):\n{said[-4000:]}")
    return said


def fixed_addresses() -> list[str]:
    """What a command is begun with so that its addresses are not random, of which the sanitizer cannot take all."""
    able = shutil.which("setarch") and not subprocess.run(["setarch", "-R", "true"], capture_output=True).returncode
    return ["setarch", "-R"] if able else []


def watched(command: Sequence[str], environment: dict[str, str], limit: float = LIMIT) -> tuple[int, str]:
    """A command's exit status and what it said; ends the program with all of its stacks where it takes too long.

    It writes to a file and leads a session of its own: what it leaves behind can neither be waited for nor survive.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            stacks = stacks_of(process.pid)
            output.seek(0)
            sys.exit(f"no end after {limit:.0f} seconds\n{output.read()[-4000:]}\n{stacks}")
        finally:
            end(process)
        output.seek(0)
        return process.returncode, output.read()


def end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def stacks_of(pid: int) -> str:
    """Where every thread of a process is: what the kernel tells, and the debugger's stacks where there is one."""
    lines = [f"thread {task.name}: {_known_of(task)}" for task in sorted(Path(f"/proc/{pid}/task").glob("*"))]
    if shutil.which("gdb"):
        command = ["gdb", "-p", str(pid), "-batch", "-ex", "thread apply all backtrace"]
        try:
            lines.append(subprocess.run(command, capture_output=True, text=True, timeout=120).stdout)
        except subprocess.TimeoutExpired:
            lines.append("gdb did not end either")
    return "\n".join(lines)


def _known_of(task: Path) -> str:
    known = []
    for name in ("comm", "wchan", "syscall"):
        with contextlib.suppress(OSError):  # the thread may have ended, and not everyone may read everything
            known.append((task / name).read_text().strip())
    return ", ".join(known)


def races(said: str) -> list[str]:
    """The sanitizer's reports that are about the library.

    Others are between parts of libtorch; and the linker frees a thread's own memory once the thread has ended.
    """
    reports = re.findall(rf"{REPORT}.*?={{18}}", said, re.DOTALL)
    return [report for report in reports if "_C.so" in report and "_dl_deallocate_tls" not in report]


def main() -> None:
    good, planted, library = build()
    if REPORT not in exercise(good, "planted", str(library)):
        sys.exit("ThreadSanitizer does not see the planted race")
    if not any("conv_wgrad" in report for report in races(exercise(planted, "wgrad"))):
        sys.exit("ThreadSanitizer does not see the race planted in conv_wgrad")
    if reports := races(exercise(good, "wgrad") + exercise(good, "fused")):
        sys.exit(f"{len(reports)} reports, the first:\n{reports[0]}")
    print("ThreadSanitizer: the planted races are seen, the kernels have none")


if __name__ == "__main__":
    main()
