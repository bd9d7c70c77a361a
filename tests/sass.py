"""What nvcc made of the CUDA kernels: registers, memory and instructions, read from the built objects.

``python tests/sass.py`` records what the objects hold now as what ``tests/csrc/test_sass.py`` expects.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

__all__ = ["ARCH", "TABLE", "cuobjdump", "kernels", "nvcc_version", "objects"]

ROOT = Path(__file__).resolve().parents[1]
ARCH = "sm_90a"
TABLE = ROOT / "tests" / "csrc" / f"sass_{ARCH}.json"


def cuobjdump() -> str | None:
    """CUDA's, or the one that Triton brings along."""
    spec = importlib.util.find_spec("triton")
    beside = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec and spec.origin else Path("cuobjdump")
    return shutil.which(beside) or shutil.which("cuobjdump")


def objects() -> list[Path]:
    """The objects of all CUDA sources, or none where ninja would build one of them again."""
    build = ROOT / "build" / "fusedres"
    beside = Path(sysconfig.get_path("scripts")) / "ninja"
    ninja = str(beside) if beside.exists() else shutil.which("ninja")
    found = [build / f"obj/cuda/{source.name}.o" for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]
    if ninja is None or not (build / "build.ninja").exists() or not all(path.exists() for path in found):
        return []
    names = [str(path.relative_to(build)) for path in found]
    left = subprocess.run([ninja, "-C", str(build), "-n", *names], capture_output=True, text=True).stdout
    return found if "no work to do" in left else []


def nvcc_version() -> str | None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    return re.search(r"release [\d.]+, (V[\d.]+)", text)[1]


def kernels(tool: str, path: Path) -> dict[str, dict[str, int | bool]]:
    """By kernel: registers, bytes of stack and of shared memory, and whether it has 128-bit loads, to registers or
    straight to shared memory, and HMMA."""

    def dump(what: str) -> str:
        return subprocess.run([tool, what, "-arch", ARCH, str(path)], capture_output=True, text=True, check=True).stdout

    found: dict[str, dict[str, int | bool]] = {}
    pattern = r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)"
    for name, registers, stack, shared in re.findall(pattern, dump("-res-usage")):
        found[_short(name)] = {"registers": int(registers), "stack": int(stack), "shared": int(shared)}
    for part in dump("-sass").split("Function : ")[1:]:
        name, _, code = part.partition("\n")
        loads = {
            "loads_128_bits": bool(re.search(r"\bLDG(STS)?\.E\S*\.128", code)),
            "hmma": bool(re.search(r"\bHMMA", code)),
        }
        found[_short(name.strip())] |= loads
    return found


def _short(mangled: str) -> str:
    """The kernel's name and template arguments: the anonymous namespace's carries a hash of the path."""
    return re.search(r"([a-z][a-z_]*_kernel(?:I.*?E(?=E*v))?)", mangled)[1]


def main() -> None:
    tool, built = cuobjdump(), objects()
    if tool is None or not built:
        raise SystemExit("cuobjdump and the built objects are needed")
    table = {path.name.partition(".")[0]: kernels(tool, path) for path in built}
    TABLE.write_text(json.dumps({"nvcc": nvcc_version(), "kernels": table}, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
