"""Builds CUDA sources for the emulator: a shared library or a program that runs them on the CPU.

    python emulate.py kernel.cu -o kernel.so                 # a shared library
    python emulate.py main.cu --program -o main              # a program
    python emulate.py main.cu --program --mode check -o main # with every load and store checked

Objects are kept by the hash of what they are made of, so that a second build of the same sources does nothing.
See README.md beside this file.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from translate import TranslationError, translate  # noqa: E402

__all__ = ["MODES", "build", "compiler"]

# How kernels are compiled, how the machine is, and what is linked. -fno-tree-sra: a 16-byte access stays one access.
_PLAIN = ["-O1", "-g1", "-fno-strict-aliasing"]
_ACCESSES = ["-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0", "-fno-tree-sra"]
MODES = {
    "fast": (["-O2", "-g1", "-fno-strict-aliasing"], ["-O2"], []),
    "check": ([*_PLAIN, *_ACCESSES, "-DEMU_CHECK"], ["-O2", "-DEMU_CHECK"], []),
    "asan": ([*_PLAIN, "-fsanitize=address", "-DEMU_ASAN"], ["-O1", "-DEMU_ASAN"], ["-fsanitize=address"]),
    "tsan": ([*_PLAIN, "-fsanitize=thread", "-DEMU_TSAN"], ["-O1", "-DEMU_TSAN"], ["-fsanitize=thread"]),
}
_COMMON = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno"]
_WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-unused-function"]


def compiler() -> list[str] | None:
    """The command of g++, which the instrumentation needs; ``None`` where it is not there."""
    command = shlex.split(os.environ.get("CXX", "g++"))
    return command if shutil.which(command[0]) else None


def build(
    sources: Sequence[Path | str],
    output: Path | str,
    *,
    mode: str = "fast",
    program: bool = False,
    includes: Sequence[Path | str] = (),
    system_includes: Sequence[Path | str] = (),
    defines: Sequence[str] = (),
    libraries: Sequence[str] = (),
    cache: Path | str | None = None,
) -> Path:
    """Translates, compiles and links; returns ``output``.

    Args:
        sources: ``.cu`` files.
        output: the shared library, or the program.
        mode: ``"fast"``; ``"check"``: every load and store is checked; ``"asan"``, ``"tsan"``: under GCC's sanitizers.
        includes: folders of the sources' own headers, which may hold CUDA C++ too.
        system_includes: folders of headers that are plain C++.
        defines: macros, as ``NAME`` or ``NAME=value``.
        libraries: further arguments of the linker.
        cache: where objects are kept; a temporary folder by default.

    Raises:
        RuntimeError: where something does not compile, with the compiler's message.
    """
    cxx = compiler()
    if cxx is None:
        raise RuntimeError("g++ was not found")
    cache = Path(cache or Path(tempfile.gettempdir()) / f"cuda_emulator.{os.getuid()}")
    cache.mkdir(parents=True, exist_ok=True)
    kernel_flags, machine_flags, link_flags = MODES[mode]
    flags = [*_COMMON, *_WARNINGS, "-isystem", str(HERE / "include"), *(f"-I{folder}" for folder in includes)]
    flags += [*(item for folder in system_includes for item in ("-isystem", str(folder)))]
    flags += [f"-D{define}" for define in ("CUDA_EMULATOR", *defines)]
    runtime = sorted((HERE / "src").glob("*.cpp"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(_kernel_object, cxx, Path(s), [*flags, *kernel_flags], cache) for s in sources]
        jobs += [pool.submit(_machine_object, cxx, s, machine_flags, cache) for s in runtime]
        objects = [job.result() for job in jobs]
    output = Path(output)
    key = output.with_name(output.name + ".key")
    shape = ["-rdynamic"] if program else ["-shared"]
    command = [*cxx, *shape, "-o", str(output), *map(str, objects), *link_flags, "-ldl", "-lpthread", *libraries]
    if not (output.exists() and key.exists() and key.read_text() == str(command)):
        fresh = output.with_name(f"{output.name}.{os.getpid()}")
        _run([str(fresh) if part == str(output) else part for part in command])
        fresh.replace(output)
        key.write_text(str(command))
    return output


def _kernel_object(cxx: list[str], source: Path, flags: list[str], cache: Path) -> Path:
    text = _run([*cxx, "-E", "-x", "c++", *flags, str(source)])
    key = _hash(text, cxx, flags)
    target = cache / f"{source.stem}.{key}.o"
    if not target.exists():
        translated = cache / f"{source.stem}.{key}.ii"
        translated.write_text(translate(text))
        _compile([*cxx, *flags, "-fpreprocessed", "-x", "c++-cpp-output", "-c", str(translated)], target)
    return target


def _machine_object(cxx: list[str], source: Path, mode_flags: list[str], cache: Path) -> Path:
    headers = sorted([*(HERE / "include").rglob("*.h"), *(HERE / "src").glob("*.h")])
    flags = [*_COMMON, *_WARNINGS, *mode_flags, f"-I{HERE / 'include'}", f"-I{HERE / 'src'}"]
    key = _hash("".join(p.read_text() for p in [source, *headers]), cxx, flags)
    target = cache / f"emu_{source.stem}.{key}.o"
    if not target.exists():
        _compile([*cxx, *flags, "-c", str(source)], target)
    return target


def _compile(command: list[str], target: Path) -> None:
    fresh = target.with_name(f"{target.name}.{os.getpid()}")
    _run([*command, "-o", str(fresh)])
    fresh.replace(target)


def _run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command[:1])} failed on {command[-1]}:\n{result.stderr}")
    return result.stdout


def _hash(text: str, *parts: object) -> str:
    return hashlib.sha256(repr((text, parts)).encode()).hexdigest()[:20]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sources", nargs="+", type=Path)
    parser.add_argument("-o", "--output", required=True, type=Path)
    parser.add_argument("--mode", choices=MODES, default="fast")
    parser.add_argument("--program", action="store_true", help="link a program instead of a shared library")
    parser.add_argument("-I", dest="includes", action="append", default=[], help="folder of the sources' headers")
    parser.add_argument("-D", dest="defines", action="append", default=[])
    args = parser.parse_args()
    options = {"mode": args.mode, "program": args.program, "includes": args.includes, "defines": args.defines}
    try:
        build(args.sources, args.output, **options)
    except (RuntimeError, TranslationError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
