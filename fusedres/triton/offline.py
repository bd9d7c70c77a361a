"""Compiling kernels for GPUs that are not there, and reading what they need from the machine code.

:func:`compiled` takes a :class:`~fusedres.triton.launch.Launch`, as :func:`~fusedres.triton.launch.recorded` collects
them, and compiles the specialisation that the launch would run: the same types, divisibilities, constants and options.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import Launch

__all__ = ["CAPABILITIES", "SHARED_MEMORY", "Resources", "compiled", "specialisation"]

CAPABILITIES = (80, 90, 100)

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes that one program may have, by compute capability (CUDA C++ Programming Guide, "Compute Capabilities")."""

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_BULK = "cp.async.bulk.tensor"
_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.uint8: "u8",
}


class Resources(NamedTuple):
    """What a compiled kernel needs.

    Attributes:
        registers: of a thread.
        shared: bytes of shared memory of a program.
        local: bytes of local memory of a thread: stack frame and spilled registers.
        matrix: its matrix instructions: ``wgmma``, ``tcgen05``, ``mma`` or nothing.
        bulk: how many copies by tensor descriptor are in its code.
        step: instructions in the innermost loop around matrix instructions, 0 where there is none.
        ahead: whether that loop also stores results, and first begins to copy what its next turn multiplies.
    """

    registers: int
    shared: int
    local: int
    matrix: str
    bulk: int
    step: int
    ahead: bool


def compiled(launch: Launch, capability: int) -> Resources:
    """Compiles the launched specialisation for ``sm_<capability>``."""
    signature, constants, attributes = specialisation(launch)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    ptx = result.asm["ptx"]
    matrix = _matrix(ptx)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        registers, local = _usage(_dump("-res-usage", file.name))
        loop = _loop(_dump("-sass", file.name)) if matrix else []  # disassembling takes as long as compiling
    return Resources(registers, result.metadata.shared, local, matrix, ptx.count(_BULK), len(loop), _loads_ahead(loop))


def specialisation(launch: Launch) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], list]]:
    """What of a launch the compiler sees: types, constants and divisibilities of its kernel's parameters."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        if name in launch.meta:
            signature[name], constants[(index,)] = "constexpr", launch.meta[name]
            continue
        value = launch.args[name]
        fixed = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if value is None or fixed:
            signature[name], constants[(index,)] = "constexpr", value
            continue
        signature[name] = _type_of(value)
        divides = isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)
        if divides and not parameter.do_not_specialize:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _type_of(value: Any) -> str:
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_TYPES[value.base.dtype]}[{','.join(map(str, value.block_shape))}]>"
    if isinstance(value, Tensor):
        return "*" + _TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _dump(what: str, path: str) -> str:
    return subprocess.run([str(_TOOLS / "cuobjdump"), what, path], capture_output=True, text=True, check=True).stdout


def _usage(text: str) -> tuple[int, int]:
    """Registers, and bytes of local memory, as the assembler recorded them."""
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text).groups()
    return int(registers), int(stack) + int(local)


_PRODUCT = re.compile(r"\b[A-Z]+MMA\b")  # HMMA, HGMMA, UTCHMMA; not HFMA2.MMA, which is none


def _loop(text: str) -> list[str]:
    """The shortest loop with matrix instructions: up to a branch backwards, and without an exit."""
    code = [(int(at, 16), line) for at, line in re.findall(r"/\*([0-9a-f]{4,})\*/ +([^;/]*);", text)]
    loops = []
    for at, line in code:
        target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", line)
        if target and int(target[1], 16) < at:
            body = [inside for where, inside in code if int(target[1], 16) <= where <= at]
            if any(map(_PRODUCT.search, body)) and not any("EXIT" in each for each in body):
                loops.append(body)
    return min(loops, key=len, default=[])


def _loads_ahead(loop: list[str]) -> bool:
    """Whether the first copy by tensor descriptor stands between matrix instructions and the first store."""
    copies = [i for i, line in enumerate(loop) if "UTMALDG" in line]
    stores = [i for i, line in enumerate(loop) if re.search(r"\bSTG\b", line)]
    products = [i for i, line in enumerate(loop) if _PRODUCT.search(line)]
    return bool(copies and stores) and products[0] < copies[0] < stores[0]


def _matrix(ptx: str) -> str:
    for name, instruction in (("tcgen05", "tcgen05.mma"), ("wgmma", "wgmma.mma_async"), ("mma", "mma.sync")):
        if instruction in ptx:
            return name
    return ""
