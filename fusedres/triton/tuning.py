"""Which tiles a convolution runs with: measured where it was tuned, else the nearest shape measured, else a heuristic.

A table holds, per problem, the best tiles and their time, and the vendor's time for the same work, which is always a
candidate. A table also holds verdicts: which backend runs a whole block (:mod:`fusedres.engine.verdict`). Tables lie
beside this file for the devices that were measured before a release (``tables/<device>.json``) and in the user's cache
for those that :func:`fusedres.tune` measured; the user's come first. Each half carries a hash of the sources that it
depends on and of Triton's version, and is ignored when that has changed. Looking up never measures: a call inside a
CUDA graph's capture costs what any other does.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..ops.activations import ACTIVATIONS
from ..ops.conv import ConvGeometry, output_size
from .precision import convolution_precision

__all__ = [
    "Entry",
    "Problem",
    "Tiles",
    "Verdict",
    "assumed",
    "bytes_and_flops",
    "cache_path",
    "configuration",
    "fixed",
    "heuristic",
    "is_heavy",
    "lookup",
    "observed",
    "pose",
    "record",
    "record_verdicts",
    "resident",
    "shared_bytes",
    "shared_memory",
    "ship",
    "source_hash",
    "space",
    "variants",
    "vendor_is_faster",
    "verdicts",
]

_TABLES = Path(__file__).parent / "tables"
# The convolutions, what they launch besides and take their tiles from, and the passes around the vendor's.
_SOURCES = ("bn_stats.py", "conv_fused.py", "conv_fused_backward.py", "join.py", "join_backward.py", "launch.py")
_SOURCES += ("precision.py", "tiles.py", "tuning.py")
_NO_KERNELS = ("interpreter.py", "kernels_doc.py", "offline.py", "shipped.py")
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

# Doublings of rows, columns and depth by which a measured problem may differ, in all, and still stand for another.
_FARTHEST = 2.0


class Tiles(NamedTuple):
    """One configuration of a matrix kernel.

    Attributes:
        rows: of a tile of the result; columns and depth likewise.
        stages: of the pipeline of loads.
        registers: of a thread, at most, so that more programs share a multiprocessor; 0: as the compiler likes.
        descriptors: whether operands that are rectangles in memory come by tensor descriptor, from compute capability
            9.0 on. What is not laid out for that comes by address all the same.
        persistent: whether there are as many programs as run at once, each of which loops over tiles, and loads the
            next one's operands while it writes the last one's result.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    registers: int = 0
    descriptors: bool = False
    persistent: bool = False

    @property
    def options(self) -> dict[str, int]:
        """The options of :func:`fusedres.triton.launch.launch`."""
        return {"warps": self.warps, "stages": self.stages, "registers": self.registers}


class Problem(NamedTuple):
    """A convolution's pass as the tables know it.

    Attributes:
        kind: ``"fprop"``, ``"dgrad"`` or ``"wgrad"``.
        shape: of the convolution's input, ``(N, C, H, W)``.
        filters: output channels.
        kernel_size: ``(R, S)``.
        prologue: whether an operand is pending.
        tf32: whether products of float32 are TensorFloat-32's, which are several times as fast; see :func:`pose`.
    """

    kind: str
    dtype: torch.dtype
    shape: tuple[int, int, int, int]
    filters: int
    kernel_size: tuple[int, int]
    geometry: ConvGeometry
    prologue: bool
    tf32: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the convolution's output."""
        return output_size(self.shape[2:], self.kernel_size, self.geometry)

    @property
    def gemm(self) -> tuple[int, int, int]:
        """Rows, columns and depth of the matrix product, over all taps."""
        n, c, h, w = self.shape
        p, q = self.size
        if self.kind == "fprop":
            return n * p * q, self.filters, c * self.taps
        if self.kind == "dgrad":
            return (n * p * q if self.taps == 1 else n * h * w), c, self.filters * self.taps
        return self.filters, c * self.taps, n * p * q

    @property
    def taps(self) -> int:
        """Of the kernel; a program steps through them one at a time."""
        return math.prod(self.kernel_size)

    @property
    def product(self) -> tuple[int, int, int]:
        """Rows, columns and depth of one tap's matrix product, from which tiles are cut."""
        rows, columns, depth = self.gemm
        if self.kind == "wgrad":
            return rows, columns // self.taps, depth
        return rows, columns, depth // self.taps

    def steps(self, deep: int) -> int:
        """Turns of a program's loop, each of which multiplies tiles of this depth."""
        depth = math.ceil(self.product[2] / deep)
        return depth if self.kind == "wgrad" else depth * self.taps

    @property
    def key(self) -> str:
        """The problem in one word, for tables."""
        n, c, h, w = self.shape
        g = self.geometry
        pairs = "".join(f"_{name}{a}x{b}" for name, (a, b) in (("s", g.stride), ("p", g.padding), ("d", g.dilation)))
        kernel = f"{self.kernel_size[0]}x{self.kernel_size[1]}"
        end = "_pending" if self.prologue else ""
        name = "tf32" if self.tf32 else _NAMES[self.dtype]
        return f"{self.kind}_{name}_n{n}_c{c}_{h}x{w}_k{self.filters}_{kernel}{pairs}{end}"

    @property
    def family(self) -> tuple[Any, ...]:
        """What two problems must share for one's tiles to say anything about the other's."""
        return self.kind, self.dtype, self.tf32, self.kernel_size, self.geometry, self.prologue


def pose(
    kind: str,
    dtype: torch.dtype,
    shape: Sequence[int],
    filters: int,
    kernel_size: Sequence[int],
    geometry: ConvGeometry,
    prologue: bool,
) -> Problem:
    """The problem as it is now that PyTorch says how float32 is multiplied."""
    tf32 = convolution_precision(dtype) == "tf32"
    return Problem(kind, dtype, tuple(shape), filters, tuple(kernel_size), geometry, prologue, tf32)


_KEY = re.compile(
    r"(fprop|dgrad|wgrad)_(fp32|tf32|bf16|fp16)_n(\d+)_c(\d+)_(\d+)x(\d+)_k(\d+)_(\d+)x(\d+)_s(\d+)x(\d+)_p(\d+)x(\d+)"
    r"_d(\d+)x(\d+)(_pending)?"
)


def problem_of(key: str) -> Problem:
    """The problem that has this key."""
    kind, name, *numbers, prologue = _KEY.fullmatch(key).groups()
    n, c, h, w, k, r, s, *pairs = map(int, numbers)
    dtype = next((dtype for dtype, short in _NAMES.items() if short == name), torch.float32)
    g = ConvGeometry((pairs[0], pairs[1]), (pairs[2], pairs[3]), (pairs[4], pairs[5]), 1)
    return Problem(kind, dtype, (n, c, h, w), k, (r, s), g, prologue is not None, name == "tf32")


def bytes_and_flops(problem: Problem) -> tuple[int, int]:
    """What a pass must move, at least, and compute: every operand once, every result once.

    ``fprop``: input, weights, output. ``dgrad``: the output's gradient, weights, the input's gradient; with a prologue
    also the output and the input, from which the norms' gradients are made. ``wgrad``: input and output's gradient,
    with a prologue also the output, and the weights' gradient.
    """
    n, c, h, w = problem.shape
    p, q = problem.size
    inputs, outputs = n * c * h * w, n * problem.filters * p * q
    read = n * c * p * q if problem.kernel_size == (1, 1) else inputs  # strided, it touches no other pixels
    moved = outputs + problem.filters * c * math.prod(problem.kernel_size)
    moved += inputs if problem.kind == "dgrad" else read  # a gradient is written whole, with zeros between
    if problem.prologue and problem.kind != "fprop":
        moved += outputs + (read if problem.kind == "dgrad" else 0)
    return moved * problem.dtype.itemsize, 2 * outputs * c * math.prod(problem.kernel_size)


# ---------------------------------------------------------------------------------------------------------------------
# The space, and what is taken of it without a measurement
# ---------------------------------------------------------------------------------------------------------------------

_MULTIPROCESSORS = 132  # an H100's
_REGISTERS = 255  # of a thread, at most
_ADDRESSES = 40  # registers of a thread that addresses, masks and a norm's rows take
_RESERVED = 1024  # bytes of shared memory that every program takes beside its own
_SHARED = {8: 163 * 1024, 9: 227 * 1024, 10: 227 * 1024}


def shared_bytes(problem: Problem, tiles: Tiles) -> int:
    """Shared memory of the pipeline: tiles of both operands per stage, and of the raw output beside its gradient."""
    operands = tiles.rows * tiles.depth + tiles.depth * tiles.columns
    if problem.kind == "dgrad" and problem.prologue:
        operands += tiles.rows * tiles.depth
    if problem.kind == "wgrad" and problem.prologue:
        operands += tiles.rows * tiles.depth
    # A persistent program's pipeline runs on while the result passes through shared memory on its way out.
    result = tiles.rows * tiles.columns if tiles.persistent else 0
    return (operands * tiles.stages + result) * problem.dtype.itemsize


def space(problem: Problem, capability: int = 9) -> list[Tiles]:
    """The candidates for a problem, pruned by a model of registers, shared memory and waves, the likeliest first.

    Of those that differ in the number of stages alone, the heuristic's comes first.
    """
    usual = heuristic(problem).stages
    found = []
    for m in (64, 128, 256):
        for n in (32, 64, 128, 256):
            for k in (32, 64):
                for warps in (4, 8):
                    for stages in (2, 3, 4):
                        tiles = Tiles(m, n, k, warps, stages, 128 if warps == 8 else 0)
                        if _fits(problem, tiles, capability) and _suits(problem, tiles):
                            found.append(tiles)
    return sorted(found, key=lambda tiles: (_cost(problem, tiles), abs(tiles.stages - usual)))


def variants(problem: Problem, tiles: Tiles, capability: int = 9) -> list[Tiles]:
    """Other ways to load the same tiles and to walk over them, which are tried on the best ones.

    None before compute capability 9.0, where the compiler turns descriptors into 64-bit addresses, which spill. And no
    persistent programs without descriptors: addresses of the next tile take the registers that this one's result needs,
    and dgrad then loads with fewer tiles in flight. Nor from 10.0 on, where results pass from tensor memory through
    registers, which spill in that loop.
    """
    if capability < 9:
        return []
    found = [tiles._replace(descriptors=True)]
    if capability == 9 and _is_short(problem, tiles):
        found.append(tiles._replace(descriptors=True, persistent=True))
    return [each for each in found if _fits(problem, each, capability)]


def _is_short(problem: Problem, tiles: Tiles) -> bool:
    """Whether a persistent program has something to gain: more tiles than run at once, and few steps in each."""
    rows, columns, _ = problem.product
    blocks = math.ceil(rows / tiles.rows) * math.ceil(columns / tiles.columns)
    several = blocks > _MULTIPROCESSORS * resident(problem, tiles)
    return problem.kind != "wgrad" and problem.steps(tiles.depth) <= 4 and several


def resident(problem: Problem, tiles: Tiles, capability: int = 9) -> int:
    """How many programs share a multiprocessor, by registers and shared memory."""
    by_registers = 65536 // ((tiles.registers or _REGISTERS) * 32 * tiles.warps)
    by_memory = _SHARED.get(capability, _SHARED[8]) // (shared_bytes(problem, tiles) + _RESERVED)
    return max(1, min(by_registers, by_memory))


def _cost(problem: Problem, tiles: Tiles) -> float:
    """Relative: operands read per result, times what padding and a last wave that is not full add to the work.

    wgrad's waves are full: its sum is split for that.
    """
    rows, columns, _ = problem.product
    blocks = math.ceil(rows / tiles.rows) * math.ceil(columns / tiles.columns)
    read = (1 / tiles.rows + 1 / tiles.columns) * blocks * tiles.rows * tiles.columns / (rows * columns)
    if problem.kind == "wgrad":
        return read
    resident = _MULTIPROCESSORS * max(1, 65536 // ((tiles.registers or _REGISTERS) * 32 * tiles.warps))
    waves = blocks / resident
    return read * math.ceil(waves) / waves


def _fits(problem: Problem, tiles: Tiles, capability: int) -> bool:
    threads = 32 * tiles.warps
    return (
        tiles.rows * tiles.columns // threads >= 16
        and _live(problem, tiles) <= (tiles.registers or _REGISTERS) - _ADDRESSES
        and shared_bytes(problem, tiles) <= _SHARED.get(capability, _SHARED[8])
    )


def _live(problem: Problem, tiles: Tiles) -> float:
    """Registers of a thread with values in them: the sums, and what the prologue or the epilogue has beside them.

    A prologue holds the tile that it makes, in float32, and each tensor that it makes it from. wgrad has one for either
    operand, one after the other. dgrad's epilogue reads a tile of the input. The compiler has the last word: offline,
    the first candidates of ResNet-50's convolutions do not spill, and tiles a step larger do.
    """
    threads = 32 * tiles.warps
    sums = tiles.rows * tiles.columns / threads
    wide = 1 + problem.dtype.itemsize / 4
    left, right = (wide * tiles.depth * length / threads for length in (tiles.rows, tiles.columns))
    beside = 0.0
    if problem.prologue:
        beside = {"fprop": left, "dgrad": 2 * left, "wgrad": max(2 * left, right)}[problem.kind]
    return sums + max(beside, sums if problem.kind == "dgrad" else 0)


def _suits(problem: Problem, tiles: Tiles) -> bool:
    """Whether less than half of a tile is padding, and the pipeline is no longer than the loop."""
    rows, columns, depth = problem.product
    return (
        tiles.columns < 2 * max(columns, 32)
        and tiles.rows < 2 * max(rows, 64)
        and tiles.depth < 2 * max(depth, 32)
        and tiles.stages - 1 <= problem.steps(tiles.depth)
    )


def shared_memory(device: torch.device) -> int:
    """Bytes of it that a program may have on a device: less on many than on others of the same major capability."""
    if device.type != "cuda":
        return _SHARED[8]
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def heuristic(problem: Problem, heavy: bool = False) -> Tiles:
    """Tiles that run everywhere without a spill: 8 warps of 128 registers, so that two programs share a multiprocessor.

    One then computes while the other stores. A gradient's prologue reads two tensors and four rows, a forward's
    epilogue may read a residual; 128 rows and 128 columns would not fit. Float32 has room for fewer columns, and for a
    shorter pipeline where it is multiplied in registers, not by TensorFloat-32's instructions.

    Args:
        heavy: :func:`is_heavy`; then half a tile, by 4 warps of up to 224 registers.
    """
    _, columns, depth = problem.product
    single = problem.dtype == torch.float32
    in_registers = single and not problem.tf32
    deep = 32 if single or depth <= 32 else 64
    most = 64 if single or problem.kind == "wgrad" else 128
    n = min(most, 128 if columns > 64 else 64 if columns > 32 else 32)
    if problem.kind == "wgrad":
        tiles = Tiles(64, n, deep if problem.kernel_size == (1, 1) else 32, 8, 2 if in_registers else 3, 128)
    elif problem.kind == "dgrad":
        tiles = Tiles(64, n, deep, 8, 2, 128)
    else:
        stages = 2 if in_registers or problem.steps(deep) <= 2 else 3
        tiles = Tiles(64 if most == 64 or n == 128 else 128, n, deep, 8, stages, 128)
    return _half(problem, tiles) if heavy else tiles


def is_heavy(device: torch.device, acts: Sequence[int], residual: bool) -> bool:
    """Whether what is done with a tile takes more than the 128 registers that are enough with ReLU.

    An activation of more than one kink does. So does a residual from compute capability 10.0 on, where sums pass from
    tensor memory through registers.

    Args:
        acts: the codes of the activations, of the prologue and the epilogue.
        residual: whether the epilogue adds one.
    """
    return any(act not in _LIGHT for act in acts) or (residual and _capability(device) >= 10)


_LIGHT = {ACTIVATIONS[name].code for name in ("identity", "relu", "leaky_relu")}


def _half(problem: Problem, tiles: Tiles) -> Tiles:
    halved = {"rows": tiles.rows // 2} if tiles.rows > 64 else {"columns": max(32, tiles.columns // 2)}
    # With 224 registers, two programs to a multiprocessor, sm_80's assembler spills nothing; with 232 it does.
    stages = 3 if problem.kind == "fprop" and problem.dtype != torch.float32 else tiles.stages
    return tiles._replace(**halved, warps=4, stages=stages, registers=224)


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A measured problem: the best tiles with their time, and the vendor's time, in milliseconds."""

    tiles: Tiles
    milliseconds: float
    vendor_milliseconds: float


class Verdict(NamedTuple):
    """What came of measuring a block: the backend to run it, and milliseconds of the fastest of ours and of stock.

    Attributes:
        wrong: backends whose numbers were not stock's within the error budget, which are never chosen.
    """

    backend: str
    milliseconds: float
    stock_milliseconds: float
    wrong: tuple[str, ...] = ()


@cache
def source_hash() -> str:
    """A hash of the convolutions' sources and of the compiler's version: what measured times depend on."""
    return _hash([Path(__file__).parent / name for name in _SOURCES])


@cache
def verdict_hash() -> str:
    """The same of all kernels and of the engine that calls them: what a block's verdict depends on."""
    folder = Path(__file__).parent
    kernels = [path for path in sorted(folder.glob("*.py")) if path.name not in _NO_KERNELS]
    return _hash([*kernels, *sorted((folder.parent / "engine").glob("*.py"))])


def _hash(paths: list[Path]) -> str:
    try:
        from triton import __version__ as version
    except ImportError:  # another backend's verdicts need none
        version = "no Triton"
    digest = hashlib.sha256(version.encode())
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@cache
def device_name(device: torch.device) -> str:
    """The device's name as a file name."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()


def cache_path(name: str) -> Path:
    """The user's table for a device of this name: under ``FUSEDRES_CACHE``, by default ``~/.cache/fusedres``."""
    folder = os.environ.get("FUSEDRES_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "fusedres")
    return Path(folder) / f"tuned-{name}.json"


class _Table(NamedTuple):
    entries: dict[str, Entry]
    verdicts: dict[str, Verdict]


def _read(path: Path) -> _Table:
    """A table; empty where it is missing or damaged, and so is each half where it is of other sources."""
    try:
        text = json.loads(path.read_text())
        entries, found = {}, {}
        if text.get("source") == source_hash():
            entries = {key: Entry(Tiles(*tiles), *times) for key, (tiles, *times) in text["entries"].items()}
        if text.get("verdict source") == verdict_hash():
            rows = text["verdicts"].items()
            found = {key: Verdict(backend, *times, tuple(wrong)) for key, (backend, *times, wrong) in rows}
        return _Table(entries, found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return _Table({}, {})


@cache
def _table(name: str) -> _Table:
    shipped, own = _read(_TABLES / f"{name}.json"), _read(cache_path(name))
    return _Table(shipped.entries | own.entries, shipped.verdicts | own.verdicts)


def verdicts(name: str) -> dict[str, Verdict]:
    """Every verdict for a device of this name, by the key of :mod:`fusedres.engine.verdict`."""
    return _table(name).verdicts


def record(name: str, measured: dict[str, Entry]) -> Path:
    """Adds entries to the user's table for a device of this name, atomically; returns its path."""
    before = _read(cache_path(name))
    return _write(name, before._replace(entries=before.entries | measured))


def record_verdicts(name: str, measured: dict[str, Verdict]) -> Path:
    """Adds verdicts to the user's table for a device of this name, atomically; returns its path."""
    before = _read(cache_path(name))
    return _write(name, before._replace(verdicts=before.verdicts | measured))


def ship(name: str) -> Path:
    """Writes all that is known of devices of this name where it is part of the package; returns that path.

    For a release, after :func:`fusedres.tune` has run from a checkout on such a device.
    """
    return _write(name, _table(name), _TABLES / f"{name}.json")


def _write(name: str, table: _Table, path: Path | None = None) -> Path:
    path = path or cache_path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = {
        "source": source_hash(),
        "entries": {key: [list(e.tiles), *e[1:]] for key, e in sorted(table.entries.items())},
        "verdict source": verdict_hash(),
        "verdicts": {key: [*v[:3], list(v.wrong)] for key, v in sorted(table.verdicts.items())},
    }
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(text, indent=1))
    temporary.replace(path)
    _table.cache_clear()
    _looked_up.cache_clear()
    return path


def lookup(problem: Problem, device: torch.device) -> Entry | None:
    """The entry of this problem on this device, or of the nearest one that was measured, if any is near."""
    return _looked_up(problem, device_name(device))


@cache
def _looked_up(problem: Problem, name: str) -> Entry | None:
    table = _table(name).entries
    if problem.key in table:
        return table[problem.key]
    others = [(key, problem_of(key)) for key in table if key.startswith(problem.kind)]
    near = [(_distance(problem, other), key) for key, other in others if other.family == problem.family]
    distance, key = min(near, default=(math.inf, ""))
    return table[key] if distance <= _FARTHEST else None


def _distance(a: Problem, b: Problem) -> float:
    return sum(abs(math.log2(max(x, 1) / max(y, 1))) for x, y in zip(a.gemm, b.gemm))


# ---------------------------------------------------------------------------------------------------------------------
# What the launchers ask
# ---------------------------------------------------------------------------------------------------------------------

_observers: list[set[Problem]] = []
_fixed: list[Tiles] = []
_assumed: list[int] = []


@contextmanager
def observed() -> Iterator[set[Problem]]:
    """Collects the problems whose tiles are asked for inside the ``with`` block."""
    problems: set[Problem] = set()
    _observers.append(problems)
    try:
        yield problems
    finally:
        _observers.remove(problems)


@contextmanager
def fixed(tiles: Tiles) -> Iterator[None]:
    """Every problem runs with these tiles inside the ``with`` block: to compile or check what no table has chosen."""
    _fixed.append(tiles)
    try:
        yield
    finally:
        _fixed.pop()


@contextmanager
def assumed(capability: int) -> Iterator[None]:
    """Tensors that are on no GPU are taken for ones on a GPU of this major compute capability, which 9 is without."""
    _assumed.append(capability)
    try:
        yield
    finally:
        _assumed.pop()


def _capability(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0]
    return _assumed[-1] if _assumed else 9


def configuration(problem: Problem, device: torch.device, heavy: bool = False) -> Tiles:
    """The tiles to run a problem with; ``heavy`` is :func:`is_heavy`, and tells what has not been measured."""
    for problems in _observers:
        problems.add(problem)
    if _fixed:
        return _fixed[-1]
    with contextlib.suppress(RuntimeError):  # no usable device to name
        entry = lookup(problem, device)
        if entry is not None:
            return entry.tiles
    return heuristic(problem, heavy)


def vendor_is_faster(problem: Problem, device: torch.device) -> bool | None:
    """What was measured for this problem or one near it; ``None`` where nothing was."""
    entry = lookup(problem, device)
    return None if entry is None else entry.vendor_milliseconds < entry.milliseconds
