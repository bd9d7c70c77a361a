"""The environment: every ``FUSEDRES_*`` variable, the compiled library, and what this machine offers.

``import fusedres`` never raises for want of a compiler, a GPU or Triton. What is missing is remembered here, in words,
and told by :func:`env_report` (``python -m fusedres env``).
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import re
from argparse import ArgumentParser, Namespace
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

__all__ = ["VARIABLES", "Backend", "EnvReport", "Variable", "env_report", "library_missing", "load_library"]

_PACKAGE = Path(__file__).resolve().parent
_MINIMUM_TORCH = (2, 10)


# ---------------------------------------------------------------------------------------------------------------------
# The variables
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variable:
    """An environment variable: when it is read (``"build"`` or ``"run"``), its default, and what it does."""

    name: str
    when: str
    default: str
    meaning: str


# The build also honours CXX, CUDACXX, CUDA_HOME, CUDA_PATH and MAX_JOBS (how many compilers run at once).
VARIABLES = (
    Variable("FUSEDRES_SKIP_BUILD", "build", "0", "1: install without the compiled library"),
    Variable("FUSEDRES_CUDA", "build", "auto", "CUDA kernels: auto (where nvcc works), 0 (never), 1 (or fail)"),
    Variable("FUSEDRES_CUDA_ARCHS", "build", "80;90a;100+PTX", "GPU architectures, separated by semicolons"),
    Variable(
        "FUSEDRES_CUTLASS",
        "build",
        "0",
        "1: also CUTLASS's convolutions for compute capability 9.0, with the headers of the package nvidia-cutlass",
    ),
    Variable("FUSEDRES_WERROR", "build", "0", "1: compiler warnings and register spills are errors"),
    Variable(
        "FUSEDRES_ISA",
        "run",
        "the best there is",
        "instruction set of the CPU kernels: scalar, avx2, avx512 or avx512bf16",
    ),
    Variable("FUSEDRES_CACHE", "run", "~/.cache/fusedres", "folder of the tables that tuning writes"),
    Variable("FUSEDRES_COMMIT", "run", "asks git", "the commit that results name, where there is no git to ask"),
)


# ---------------------------------------------------------------------------------------------------------------------
# The compiled library
# ---------------------------------------------------------------------------------------------------------------------


def _build_record() -> dict:
    """What ``setup.py`` wrote about the build, empty where it never ran."""
    path = _PACKAGE / "_build.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _load(path: Path, torch_version: str) -> str | None:
    """Loads the library at ``path`` into torch and returns ``None``, or why it cannot be loaded."""
    if tuple(int(part) for part in re.findall(r"\d+", torch_version)[:2]) < _MINIMUM_TORCH:
        return f"the compiled library needs torch 2.10 or newer, this is {torch_version}"
    if not path.exists():
        return "the compiled library is not there: " + (_build_record().get("reason") or "it was never built")
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"the compiled library does not load: {error}"
    return None


@functools.cache
def library_missing() -> str | None:
    """``None`` where the compiled library is loaded, else why it is not. The first call loads it."""
    return _load(_PACKAGE / "_C.so", torch.__version__)


def load_library() -> bool:
    """Loads the compiled library, once; False where it cannot be, for which :func:`library_missing` has the reason."""
    return library_missing() is None


# ---------------------------------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Backend:
    """A backend on this machine: whether it is available, and how, or why not."""

    name: str
    available: bool
    detail: str


@dataclass(frozen=True)
class EnvReport:
    """Versions, backends and hardware, as :func:`env_report` finds them."""

    versions: dict[str, str]
    backends: tuple[Backend, ...]
    cpu: str
    instruction_sets: tuple[str, ...]
    instruction_set: str
    threads: int
    gpus: tuple[str, ...]

    def to_dict(self) -> dict:
        """The report as plain dicts, lists and strings, ready for JSON."""
        return json.loads(json.dumps(asdict(self)))

    def __str__(self) -> str:
        instruction_sets = f"{', '.join(self.instruction_sets) or 'unknown'}; in use: {self.instruction_set}"
        hardware = {
            "cpu": f"{self.cpu}, {self.threads} threads",
            "instruction sets": instruction_sets,
            "gpus": ", ".join(self.gpus) or "none",
        }
        backends = {b.name: f"{'available' if b.available else 'not available'}: {b.detail}" for b in self.backends}
        sections = {"versions": self.versions, "hardware": hardware, "backends": backends}
        width = max(len(key) for section in sections.values() for key in section)
        lines = []
        for title, section in sections.items():
            lines += [title, *(f"  {key:<{width}}  {value}" for key, value in section.items())]
        return "\n".join(lines)


def env_report() -> EnvReport:
    """Versions, backends, and why one is absent. Never raises.

    Example:
        >>> print(fusedres.env_report())  # doctest: +SKIP
    """
    detected, in_use, problem = _instruction_sets()
    backends = (
        Backend("reference", True, "plain PyTorch, any device and dtype"),
        _cpu_backend(in_use, problem),
        _triton_backend(),
        _cuda_backend(),
        Backend("library", True, _vendor_libraries()),
    )
    gpus = tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    return EnvReport(_versions(), backends, _cpu_model(), detected, in_use, torch.get_num_threads(), gpus)


def _versions() -> dict[str, str]:
    record = _build_record()
    return {
        "fusedres": _version_of("fusedres"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version_of("triton"),
        "compiler": record.get("compiler") or "none: the library was not built",
        "cuda of torch": torch.version.cuda or "none",
        "cuda of fusedres": _cuda_of(record),
    }


def _cuda_of(record: dict) -> str:
    if not record.get("cuda"):
        return "none"
    return f"built for {record['archs']}{', with CUTLASS' if record.get('cutlass') else ''}"


def _version_of(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _instruction_sets() -> tuple[tuple[str, ...], str, str | None]:
    """Those that the kernels can use here, the one in use, and what is wrong with ``FUSEDRES_ISA``, if anything."""
    if not load_library():
        return (), "none", None
    detected = tuple(torch.ops.fusedres.cpu_isas())
    try:
        return detected, torch.ops.fusedres.cpu_isa(), None
    except RuntimeError:
        wrong = os.environ.get("FUSEDRES_ISA")
        return detected, "none", f"FUSEDRES_ISA={wrong}, but this machine has {', '.join(detected)}"


def _cpu_backend(isa: str, problem: str | None) -> Backend:
    reason = library_missing() or problem
    return Backend("cpu", reason is None, reason or f"compiled kernels, {isa}")


def _triton_backend() -> Backend:
    reason = triton_missing()
    return Backend("triton", reason is None, reason or f"kernels compiled at their first call; {_measurements()}")


def _measurements() -> str:
    """What the tables know about blocks on the current device."""
    from .triton.tuning import device_name, verdicts

    found = verdicts(device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu")))
    if not found:
        return "no block measured on this device: see fusedres.tune"
    won = sum(verdict.backend != "stock" for verdict in found.values())
    return f"{won} of {len(found)} measured blocks are faster fused"


def triton_missing() -> str | None:
    """``None`` where the Triton kernels run here, else why they do not."""
    from .triton import missing

    if reason := missing():
        return reason
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if torch.version.cuda is None:
        return "torch was built without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no usable GPU"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"the kernels need compute capability 8.0 or newer, the GPU has {capability[0]}.{capability[1]}"
    return None


def _cuda_backend() -> Backend:
    reason = cuda_missing()
    return Backend("cuda", reason is None, reason or f"compiled kernels for {_build_record()['archs']}")


def cuda_missing() -> str | None:
    """``None`` where the CUDA kernels run here, else every reason why they do not."""
    reasons = [reason for reason in (_torch_lacks_cuda(), library_missing() or _built_without_cuda()) if reason]
    if reasons:
        return "; ".join(reasons)
    archs = _build_record()["archs"]
    capability = torch.cuda.get_device_capability()
    if not runs_on(archs, capability):
        return f"the library was built for {archs}, the GPU is {capability[0]}.{capability[1]}"
    return None


def _torch_lacks_cuda() -> str | None:
    if torch.version.cuda is None:
        return "this torch has no CUDA" if torch.version.hip is None else "this torch has ROCm in place of CUDA"
    if not torch.cuda.is_available():
        return f"torch sees no usable GPU{_driver_says()}"
    return None


def _driver_says() -> str:
    """What CUDA answers when it is asked for a GPU, in parentheses, or nothing."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f" ({str(error).partition(chr(10))[0]})"
    return ""


def _built_without_cuda() -> str | None:
    record = _build_record()
    return None if record.get("cuda") else f"the library was built without CUDA: {record.get('cuda_reason')}"


def cutlass_missing() -> str | None:
    """``None`` where CUTLASS's convolutions run here, else why they do not."""
    if reason := cuda_missing():
        return reason
    if not _build_record().get("cutlass"):
        return "the library was built without CUTLASS (FUSEDRES_CUTLASS=1 builds with it)"
    capability = torch.cuda.get_device_capability()
    if capability != (9, 0):
        return f"CUTLASS's kernels are for compute capability 9.0, the GPU has {capability[0]}.{capability[1]}"
    return None


def runs_on(archs: str, capability: tuple[int, int]) -> bool:
    """Whether code built for ``archs`` (``"80;90a;100+PTX"``) runs on a GPU of this compute capability.

    Machine code runs on later devices of the same generation, unless its architecture ends in ``a`` (only that device
    has it) or ``f`` (that generation's family); PTX is compiled at load time for any later one.
    """
    for arch in archs.split(";"):
        number, suffix, ptx = re.fullmatch(r"(\d+)([af]?)(\+PTX)?", arch).groups()
        built = divmod(int(number), 10)
        if built == capability:
            return True
        if suffix != "a" and built[0] == capability[0] and built[1] <= capability[1]:
            return True
        if ptx and not suffix and built <= capability:
            return True
    return False


def _vendor_libraries() -> str:
    names = ["ATen"]
    if torch.backends.mkldnn.is_available():
        names.append("oneDNN")
    if torch.backends.cudnn.is_available():
        names.append(f"cuDNN {torch.backends.cudnn.version()}")
    return ", ".join(names)


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


# ---------------------------------------------------------------------------------------------------------------------
# python -m fusedres env
# ---------------------------------------------------------------------------------------------------------------------


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: Namespace) -> int:
    report = env_report()
    print(json.dumps(report.to_dict(), indent=2) if args.json else report)
    return 0
