"""What nvcc made of the CUDA kernels: registers, memory and instructions, read from the built objects.

``python tests/sass.py`` records what the objects hold now as what ``tests/csrc/test_sass.py`` expects.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
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
    """The objects of all CUDA sources, or none where one is missing or older than its source."""
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    headers = [*(ROOT / "csrc" / "cuda").glob("*.h"), *(ROOT / "csrc" / "common").glob("*.h")]
    newest_header = max(path.stat().st_mtime for path in headers)
    found = []
    for source in sources:
        path = ROOT / "build" / "fusedres" / "obj" / "cuda" / f"{source.name}.o"
        if not path.exists() or path.stat().st_mtime < max(source.stat().st_mtime, newest_header):
            return []
        found.append(path)
    return found


def nvcc_version() -> str | None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    return re.search(r"release [\d.]+, (V[\d.]+)", text)[1]


def kernels(tool: str, path: Path) -> dict[str, dict[str, int | bool]]:
    """By kernel: registers, bytes of stack and of shared memory, and whether it has 128-bit loads and HMMA."""

    def dump(what: str) -> str:
        return subprocess.run([tool, what, "-arch", ARCH, str(path)], capture_output=True, text=True, check=True).stdout

    found: dict[str, dict[str, int | bool]] = {}
    pattern = r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)"
    for name, registers, stack, shared in re.findall(pattern, dump("-res-usage")):
        found[_short(name)] = {"registers": int(registers), "stack": int(stack), "shared": int(shared)}
    for part in dump("-sass").split("Function : ")[1:]:
        name, _, code = part.partition("\n")
        loads = {"loads_128_bits": bool(re.search(r"\bLDG\.E\.128", code)), "hmma": bool(re.search(r"\bHMMA", code))}
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
