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
    """By kernel: registers, bytes of stack and of shared memory; whether it has 128-bit loads, to registers or straight
    to shared memory, and HMMA; and how many 128-bit loads to registers a thread starts before it waits for one."""

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
            "loads_in_flight": _in_flight(code),
            "hmma": bool(re.search(r"\bHMMA", code)),
        }
        found[_short(name.strip())] |= loads
    return found


def _in_flight(code: str) -> int:
    """The most 128-bit loads between whose first and last nothing reads what one of them loads.

    Straight along the code, so that a loop counts once; a jump over a load, as at a tensor's end, changes nothing.
    """
    most, loading = 0, []
    for line in code.splitlines():
        instruction = re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line)
        if instruction is None:
            continue
        text = re.sub(r"\.reuse|\.64", "", instruction[1])
        load = re.search(r"\bLDG\.E\S*\.128\S* R(\d+), (.*)", text)
        read = {int(r) for r in re.findall(r"\bR(\d+)", load[2] if load else text)}
        if any(first <= register < first + 4 for register in read for first in loading):
            loading = []
        if load:
            loading.append(int(load[1]))
            most = max(most, len(loading))
    return most


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
