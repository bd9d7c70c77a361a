"""Builds ``fusedres/_C.so``: writes a ``build.ninja``, then ninja runs g++ and nvcc.

One library on LibTorch's stable ABI, so one binary loads in every torch from 2.10 on, in CPU and in CUDA builds. That
is also why ``torch.utils.cpp_extension`` is not used: it refuses to compile CUDA against a CPU build of torch. torch
itself is never imported here, only its headers are read and its libraries linked.

Beside the library lies ``fusedres/_build.json``, which says how it was built or why it was not;
``fusedres.env_report()`` reads it. The environment variables that steer the build are described in ``fusedres/env.py``.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # before setuptools 70.1 it was the package wheel's
    try:
        from wheel.bdist_wheel import bdist_wheel
    except ImportError:  # a build in place needs none
        bdist_wheel = None

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "fusedres"  # not setuptools' own, which is a new temporary folder in every editable install
DEFAULT_ARCHS = "80;90a;100+PTX"
MINIMUM_TORCH = (2, 10)
CUTLASS = "nvidia-cutlass==4.2.*"
CUTLASS_ARCH = "90a"  # the only one that its kernels are for

IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mprefer-vector-width=512"]
AVX512 += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # gcc 12 warns about its own avx512fintrin.h
ISA_FLAGS = {"scalar": [], "avx2": AVX2, "avx512": AVX512} if IS_X86 else {"scalar": []}

DEFINES = ["-DTORCH_TARGET_VERSION=0x020A000000000000"]  # the stable ABI of torch 2.10
WARNINGS = ["-Wall", "-Wextra"]
HOST_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    # Not -ffast-math: NaN and infinity behave as they do in stock PyTorch.
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    *WARNINGS,
    *([] if IS_X86 else ["-DFUSEDRES_NO_X86"]),
]
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "-DUSE_CUDA",
    "--expt-relaxed-constexpr",
    "-lineinfo",
    "-Xcompiler=" + ",".join(["-fPIC", "-fvisibility=hidden", *WARNINGS]),
    "-Xptxas=-warn-spills",
]


# ---------------------------------------------------------------------------------------------------------------------
# What there is to build with
# ---------------------------------------------------------------------------------------------------------------------


class Unavailable(Exception):
    """A part of the toolchain is missing; the message says which, for the user."""


@dataclass(frozen=True)
class Cuda:
    """The CUDA compiler and the architectures that it compiles for, as in ``FUSEDRES_CUDA_ARCHS``.

    ``cutlass`` are the folders of CUTLASS's headers, where its convolutions are built too.
    """

    nvcc: str
    archs: tuple[str, ...]
    cutlass: tuple[Path, ...] = ()

    @property
    def gencode(self) -> list[str]:
        flags = []
        for arch in self.archs:
            number = arch.removesuffix("+PTX")
            code = f"[sm_{number},compute_{number}]" if arch.endswith("+PTX") else f"sm_{number}"
            flags.append(f"-gencode=arch=compute_{number},code={code}")
        return flags


def torch_dir() -> Path:
    """torch's folder, without importing it (seconds)."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit(
            "fusedres: torch is needed to build the compiled kernels and is not installed for this Python.\n"
            "  Install torch>=2.10 first, then: pip install --no-build-isolation fusedres\n"
            "  Or install without the kernels: FUSEDRES_SKIP_BUILD=1"
        )
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < MINIMUM_TORCH:
        sys.exit(f"fusedres: torch>=2.10 is needed to build the compiled kernels, found {version}")
    return Path(spec.origin).parent


def find_cxx() -> list[str]:
    """The C++ compiler's command: ``CXX``, which may bring arguments, or the first one on the path."""
    if requested := os.environ.get("CXX"):
        command = shlex.split(requested)
        if shutil.which(command[0]) is None:
            raise Unavailable(f"no C++ compiler: CXX={requested} was not found")
        return command
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name):
            return [name]
    raise Unavailable("no C++ compiler: none of g++, clang++ and c++ is on the path")


def find_nvcc() -> str:
    toolkits = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    candidates = [os.environ.get("CUDACXX"), *(f"{home}/bin/nvcc" for home in toolkits if home)]
    for candidate in [*candidates, "nvcc", "/usr/local/cuda/bin/nvcc"]:
        if candidate and (found := shutil.which(candidate)):
            return found
    raise Unavailable("nvcc was not found (looked at CUDACXX, CUDA_HOME, the path and /usr/local/cuda)")


def cuda_archs(nvcc: str) -> tuple[str, ...]:
    """The architectures asked for, or those of the default list that this nvcc knows."""
    if requested := os.environ.get("FUSEDRES_CUDA_ARCHS"):
        return tuple(requested.split(";"))
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    known = set(re.findall(r"compute_(\d+)", listed))
    archs = tuple(arch for arch in DEFAULT_ARCHS.split(";") if re.match(r"\d+", arch)[0] in known)
    if not archs:
        raise Unavailable(f"{nvcc} knows none of the architectures {DEFAULT_ARCHS}")
    return archs


def check_nvcc_works(nvcc: str, cxx: list[str]) -> None:
    """Compiles and links an empty source, once: an nvcc can be there and refuse the host compiler, or lack parts."""
    key = hashlib.sha256(f"{nvcc} {os.stat(nvcc).st_mtime} {cxx}".encode()).hexdigest()[:16]
    probe = BUILD / f"probe_{key}.so"
    if probe.exists():
        return
    source = BUILD / "probe.cu"
    source.write_text("__global__ void probe() {}\n")
    command = [nvcc, "-ccbin", cxx[-1], "-shared", "-cudart=static", "-Xcompiler=-fPIC", "-o", str(probe), str(source)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        lines = (result.stderr + result.stdout).strip().splitlines()
        raise Unavailable(f"{nvcc} cannot compile an empty kernel: {lines[0] if lines else 'no message'}")


def find_cuda(cxx: list[str]) -> Cuda:
    """The CUDA toolchain, as ``FUSEDRES_CUDA`` asks for it: ``0`` never, ``1`` or fail, ``auto`` where it works."""
    mode = os.environ.get("FUSEDRES_CUDA", "auto").lower()
    if mode not in ("auto", "0", "1"):
        sys.exit(f"fusedres: FUSEDRES_CUDA must be auto, 0 or 1, got {mode!r}")
    if mode == "0":
        raise Unavailable("built with FUSEDRES_CUDA=0")
    try:
        nvcc = find_nvcc()
        check_nvcc_works(nvcc, cxx)
        archs = cuda_archs(nvcc)
    except Unavailable as error:
        if mode == "1":
            sys.exit(f"fusedres: FUSEDRES_CUDA=1, but {error}")
        raise
    return Cuda(nvcc, archs, find_cutlass(archs))


def wants_cutlass() -> bool:
    return os.environ.get("FUSEDRES_CUTLASS", "0") == "1"


def find_cutlass(archs: tuple[str, ...]) -> tuple[Path, ...]:
    """The folders of CUTLASS's headers, from the package nvidia-cutlass; none where nobody asked for it."""
    if not wants_cutlass():
        return ()
    if CUTLASS_ARCH not in archs:
        sys.exit(f"fusedres: FUSEDRES_CUTLASS=1 needs {CUTLASS_ARCH} among the architectures, which are {archs}")
    spec = importlib.util.find_spec("cutlass_library")
    if spec is None or spec.origin is None:
        sys.exit(f"fusedres: FUSEDRES_CUTLASS=1 needs CUTLASS's headers: pip install '{CUTLASS}'")
    source = Path(spec.origin).parent / "source"
    return source / "include", source / "tools" / "util" / "include"


def find_ninja() -> str | None:
    """ninja beside this Python (its environment need not be active), otherwise on the path, if anywhere."""
    beside = Path(sysconfig.get_path("scripts")) / "ninja"
    return str(beside) if beside.exists() else shutil.which("ninja")


# ---------------------------------------------------------------------------------------------------------------------
# The ninja file
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compile:
    """One object file: its source, the rule that compiles it, and the flags that only it gets."""

    rule: str
    source: Path
    variant: str = ""
    flags: tuple[str, ...] = ()

    @property
    def object(self) -> str:
        relative = self.source.relative_to(ROOT / "csrc")
        return f"obj/{relative}{self.variant and '.' + self.variant}.o"


def host_compiles(archs: tuple[str, ...]) -> list[Compile]:
    """Baseline code once; ``*_kernel.cpp`` once per instruction set, into its own namespace; bf16 kernels once."""
    csrc = ROOT / "csrc"
    compiles = [Compile("cxx", csrc / "library.cpp", flags=(f'-DFUSEDRES_CUDA_ARCHS="{";".join(archs)}"',))]
    for source in sorted([*csrc.glob("common/*.cpp"), *csrc.glob("cpu/*.cpp")]):
        if source.stem.endswith("_kernel"):
            for isa, flags in ISA_FLAGS.items():
                defines = (f"-DFUSEDRES_ISA={isa}", f"-DFUSEDRES_ISA_{isa.upper()}")
                compiles.append(Compile("cxx", source, isa, (*defines, *flags)))
        elif source.stem.endswith("_avx512bf16"):
            if IS_X86:
                compiles.append(Compile("cxx", source, flags=(*AVX512, "-mavx512bf16")))
        else:
            compiles.append(Compile("cxx", source))
    return compiles


def ninja_escaped(text: str) -> str:
    return re.sub(r"([$ :])", r"$\1", text)


def command_text(parts: list[str]) -> str:
    """A shell command as ninja's right-hand side: quoted for the shell, ``$`` doubled for ninja, its own names kept."""
    names = {"$in", "$out", "$out.d", "$flags"}
    return " ".join(part if part in names else shlex.quote(part).replace("$", "$$") for part in parts)


def rules_and_compiles(torch: Path, cxx: list[str], cuda: Cuda | None) -> tuple[dict[str, list[str]], list[Compile]]:
    """The commands of the build by name, and what is compiled by them; the rule ``link`` takes all objects."""
    includes = [*DEFINES, f"-I{ROOT / 'csrc'}", "-isystem", f"{torch / 'include'}"]
    strict = os.environ.get("FUSEDRES_WERROR") == "1"
    track_headers = ["-MD", "-MF", "$out.d"]
    in_out = ["-c", "$in", "-o", "$out"]
    libraries = [f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu"]

    compile_host = [*cxx, *HOST_FLAGS, *(["-Werror"] if strict else []), *includes, "$flags", *track_headers, *in_out]
    rules = {"cxx": compile_host}
    compiles = host_compiles(cuda.archs if cuda else ())
    # --no-as-needed: nothing refers to libtorch.so itself, but in a CUDA build it is what brings in libtorch_cuda.so,
    # and with it the stream symbol that the CUDA kernels refer to weakly.
    linker = ["--exclude-libs,ALL", "-z,defs", "--no-as-needed"]
    if cuda:
        nvcc = [cuda.nvcc, "-ccbin", cxx[-1]]
        strict_flags = ["-Xcompiler=-Werror", "-Xptxas=-Werror", "-Werror=all-warnings"] if strict else []
        flags = [*NVCC_FLAGS, *strict_flags, *cuda.gencode, *includes]
        rules["nvcc"] = [*nvcc, *flags, *track_headers, *in_out]
        compiles += [Compile("nvcc", source) for source in sorted(ROOT.glob("csrc/cuda/*.cu"))]
        if cuda.cutlass:
            headers = [item for folder in cuda.cutlass for item in ("-isystem", str(folder))]
            hopper = Cuda(cuda.nvcc, (CUTLASS_ARCH,)).gencode
            # With assertions its loops hold function calls, which keep the matrix instructions from overlapping.
            flags = [*NVCC_FLAGS, "-DNDEBUG", *strict_flags, *hopper, *includes, *headers]
            rules["cutlass"] = [*nvcc, *flags, *track_headers, *in_out]
            compiles += [Compile("cutlass", source) for source in sorted(ROOT.glob("csrc/cutlass/*.cu"))]
        # nvcc links, since it knows where its own static run time lies.
        linker_flags = [f"-Xlinker={flag}" for flag in linker]
        rules["link"] = [*nvcc, "-shared", "-cudart=static", "-nodlink", "-o", "$out", "$in", *linker_flags, *libraries]
    else:
        rules["link"] = [*cxx, "-shared", "-o", "$out", "$in", *(f"-Wl,{flag}" for flag in linker), *libraries]
    return rules, compiles


def ninja_file(rules: dict[str, list[str]], compiles: list[Compile]) -> str:
    """Everything ninja needs to know. A command that changed rebuilds its outputs; so does a changed header."""
    lines = ["ninja_required_version = 1.5", ""]
    for name, command in rules.items():
        lines += [f"rule {name}", f"  command = {command_text(command)}", f"  description = {name} $out"]
        lines += [] if name == "link" else ["  depfile = $out.d", "  deps = gcc"]
        lines += [""]
    for step in compiles:
        lines += [f"build {step.object}: {step.rule} {ninja_escaped(str(step.source))}"]
        lines += [f"  flags = {command_text(list(step.flags))}"] if step.flags else []
    lines += ["", f"build _C.so: link {' '.join(step.object for step in compiles)}", "default _C.so", ""]
    return "\n".join(lines)


def built_without_ninja(rules: dict[str, list[str]], compiles: list[Compile], jobs: int) -> bool:
    """Compiles everything, ``jobs`` at a time, and links it: for a machine without ninja. Nothing old is used again."""

    def run(rule: str, inputs: list[str], out: str, flags: tuple[str, ...] = ()) -> bool:
        values = {"$in": inputs, "$out": [out], "$out.d": [f"{out}.d"], "$flags": flags}
        command = [word for part in rules[rule] for word in values.get(part, [part])]
        (BUILD / out).parent.mkdir(parents=True, exist_ok=True)
        print(f"{rule} {out}", flush=True)
        return subprocess.run(command, cwd=BUILD).returncode == 0

    with ThreadPoolExecutor(jobs) as pool:
        done = list(pool.map(lambda step: run(step.rule, [str(step.source)], step.object, step.flags), compiles))
    return all(done) and run("link", [step.object for step in compiles], "_C.so")


# ---------------------------------------------------------------------------------------------------------------------
# The build
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class BuildRecord:
    """What ``_build.json`` holds. ``reason`` and ``cuda_reason`` say why a part was not built."""

    built: bool = False
    reason: str = ""
    compiler: str = ""
    torch: str = ""
    cuda: bool = False
    cuda_reason: str = ""
    archs: str = ""
    cutlass: bool = False


def build_library() -> BuildRecord:
    """Builds ``_C.so`` in :data:`BUILD`, or records why it cannot be. A source that does not compile ends the build."""
    if os.environ.get("FUSEDRES_SKIP_BUILD") == "1":
        return BuildRecord(reason="the build was skipped (FUSEDRES_SKIP_BUILD=1)")
    if sys.platform != "linux":
        return BuildRecord(reason=f"the compiled kernels are built on Linux only, this is {sys.platform}")
    try:
        cxx = find_cxx()
    except Unavailable as error:
        return BuildRecord(reason=str(error))

    torch, ninja = torch_dir(), find_ninja()
    BUILD.mkdir(parents=True, exist_ok=True)
    cuda, cuda_reason = None, ""
    try:
        cuda = find_cuda(cxx)
    except Unavailable as error:
        cuda_reason = str(error)
    rules, compiles = rules_and_compiles(torch, cxx, cuda)
    jobs = os.environ.get("MAX_JOBS")
    if ninja is None:
        done = built_without_ninja(rules, compiles, int(jobs or os.cpu_count() or 1))
    else:
        (BUILD / "build.ninja").write_text(ninja_file(rules, compiles))
        done = subprocess.run([ninja, "-C", str(BUILD), *(["-j", jobs] if jobs else [])]).returncode == 0
    if not done:
        sys.exit("fusedres: the kernels do not compile, see the errors above (FUSEDRES_SKIP_BUILD=1 installs without)")
    compiler = subprocess.run([*cxx, "--version"], capture_output=True, text=True).stdout.partition("\n")[0]
    archs = ";".join(cuda.archs) if cuda else ""
    torch_version = importlib.metadata.version("torch")
    cutlass = cuda is not None and bool(cuda.cutlass)
    return BuildRecord(True, "", compiler, torch_version, cuda is not None, cuda_reason, archs, cutlass)


def replace_if_changed(target: Path, content: bytes) -> None:
    """Writes under another name first: a running process keeps the library that it has loaded."""
    if not target.exists() or target.read_bytes() != content:
        fresh = target.with_name(target.name + ".new")
        fresh.write_bytes(content)
        fresh.replace(target)


class BuildLibrary(build_ext):
    """``build_ext`` for the one library, which is not a Python module."""

    def run(self) -> None:
        record = build_library()
        package = self.package_dir
        package.mkdir(parents=True, exist_ok=True)
        if record.built:
            replace_if_changed(package / "_C.so", (BUILD / "_C.so").read_bytes())
        else:
            print(f"fusedres: installing without the compiled kernels: {record.reason}", file=sys.stderr)
            (package / "_C.so").unlink(missing_ok=True)
        replace_if_changed(package / "_build.json", (json.dumps(asdict(record), indent=2) + "\n").encode())

    @property
    def package_dir(self) -> Path:
        in_place = self.inplace or self.editable_mode
        return ROOT / "fusedres" if in_place else Path(self.build_lib) / "fusedres"

    def get_outputs(self) -> list[str]:
        return [str(path) for name in ("_C.so", "_build.json") if (path := self.package_dir / name).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


COMMANDS = {"build_ext": BuildLibrary}

if bdist_wheel is not None:

    class AnyPythonWheel(bdist_wheel):
        """The library does not touch Python's ABI: one wheel serves every Python 3."""

        def get_tag(self) -> tuple[str, str, str]:
            return "py3", "none", super().get_tag()[2]

    COMMANDS["bdist_wheel"] = AnyPythonWheel


def requirements_of_this_run() -> list[str]:
    """CUTLASS's headers, where pip asks what an isolated build needs (by ``egg_info``).

    Not in other runs: setuptools would fetch them by itself, network or not, where :func:`find_cutlass` says what is
    missing.
    """
    return [CUTLASS] if wants_cutlass() and "egg_info" in sys.argv else []


setup(
    setup_requires=requirements_of_this_run(),
    ext_modules=[Extension("fusedres._C", sources=[])],
    cmdclass=COMMANDS,
)
