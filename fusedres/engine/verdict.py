"""Which backend runs a block where only a measurement on its device can say.

On a GPU the automatic choice is stock until :func:`fusedres.tune` has measured the block there: whether each backend
has stock's numbers, and whether it is faster. What is kept is a verdict per mode, dtype, shape and structure of the
block, in the tables of :mod:`fusedres.triton.tuning`; the verdict of the nearest size of the same block stands for
others. A lookup never measures.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.activations import IDENTITY
from ..select import why_not
from ..triton.precision import convolution_precision
from ..triton.tuning import Verdict, device_name, verdicts
from .dense import DenseProgram
from .pending import compute_dtype
from .program import Link, Operands, Program

__all__ = ["Like", "Posed", "forget", "judged", "posed", "structure_of", "winner"]

# Doublings of the values per channel by which a measured size may differ and still stand for another.
_FARTHEST = 1.0

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
_KEY = re.compile(r"(.+_n)(\d+)_(\d+)x(\d+)(_.+)")

_Shapes = tuple[tuple[int, ...] | None, ...]


class Like(NamedTuple):
    """A tensor but for its numbers."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(t: Tensor) -> Like:
        return Like(tuple(t.shape), t.stride(), t.dtype, t.device)

    def drawn(self, generator: torch.Generator) -> Tensor:
        """Normal numbers in these strides."""
        values = torch.randn(self.shape, device=self.device, generator=generator)
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device).copy_(values)


class Posed(NamedTuple):
    """A block as it was called.

    Attributes:
        residual: what the shortcut reads where that is not ``x``.
        tensors: the operands of the program's slots.
        training: whether it was called for gradients.
    """

    program: Program | DenseProgram
    x: Like
    residual: Like | None
    tensors: Operands
    training: bool


def winner(
    program: Program | DenseProgram, x: Tensor, residual: Tensor | None, tensors: Operands, training: bool
) -> str:
    """The backend with the verdict for this call, ``"stock"`` without one."""
    name = device_name(x.device)
    if not (_observers or verdicts(name)):
        return "stock"
    call = (program, _shapes_of(tensors), *_case(x, training))
    for seen in _observers:
        beside = None if residual is None else Like.of(residual)
        seen.setdefault(_key(*call), Posed(program, Like.of(x), beside, tensors, training))
    return _winner(name, x.device.type, *call)


_observers: list[dict[str, Posed]] = []


@contextmanager
def posed() -> Iterator[dict[str, Posed]]:
    """Collects, by key, the blocks that ask for a verdict inside the ``with`` block."""
    seen: dict[str, Posed] = {}
    _observers.append(seen)
    try:
        yield seen
    finally:
        _observers.remove(seen)


def forget() -> None:
    """Looks verdicts up anew; after the tables have changed."""
    _winner.cache_clear()


# ---------------------------------------------------------------------------------------------------------------------
# Keys
# ---------------------------------------------------------------------------------------------------------------------


def _shapes_of(tensors: Operands) -> _Shapes:
    return tuple(None if t is None else tuple(t.shape) for t in tensors)


def _case(x: Tensor, training: bool) -> tuple[tuple[int, ...], str]:
    """The input's shape, and mode, dtypes and layout in words; of a compiler's symbols, what they stand for here."""
    dtype = compute_dtype(x)
    tf32 = x.device.type == "cuda" and convolution_precision(dtype) == "tf32"
    dtypes = f"{_NAMES.get(x.dtype, x.dtype)}-{'tf32' if tf32 else _NAMES.get(dtype, '')}"
    layout = "nhwc" if x.is_contiguous(memory_format=torch.channels_last) else "nchw"
    shape = tuple(size.node.hint if isinstance(size, torch.SymInt) else size for size in x.shape)
    return shape, f"{'training' if training else 'inference'}_{dtypes}_{layout}"


def _key(program: Program | DenseProgram, shapes: _Shapes, shape: tuple[int, ...], case: str) -> str:
    """The call in one word, for tables."""
    n, c, h, w = shape
    return f"{case}_n{n}_{h}x{w}_c{c}_{structure_of(program, shapes)}"


def structure_of(program: Program | DenseProgram, shapes: _Shapes) -> str:
    """What a block does, whatever it is called with; ``shapes`` are its operands'."""
    end = f"_{program.memory}" if program.memory != "auto" else ""
    if isinstance(program, DenseProgram):
        return "dense:" + "/".join(_chain_of(layer, shapes) for layer in program.layers) + end
    text = _chain_of(program.branch, shapes)
    if program.shortcut is not None:
        text += "|" + _chain_of(program.shortcut, shapes) + ("|shared" if program.shares else "")
        text += f"|{program.act.name}" + ("|in place" if program.in_place else "")
    return text + end


def _chain_of(chain: tuple[Link, ...], shapes: _Shapes) -> str:
    return ">".join(_link_of(link, shapes) for link in chain)


def _link_of(link: Link, shapes: _Shapes) -> str:
    words = []
    if link.norm is not None:
        words.append("norm" if link.norm.batch_statistics else "constant norm")
    if link.gain is not None:
        words.append("gain" if link.gain.excite is None else f"excite{shapes[link.gain.excite.first][0]}")
    if link.act != IDENTITY:
        words.append(link.act.name)
    if link.dropout:
        words.append("dropout")
    if link.pool is not None:
        (kh, kw), (sh, sw), (ph, pw), ceil = link.pool
        words.append(f"maxpool{kh}x{kw}s{sh}x{sw}p{ph}x{pw}" + ("ceil" if ceil else ""))
    if link.conv is not None:
        g = link.conv.geometry
        pairs = "".join(f"{name}{a}x{b}" for name, (a, b) in (("s", g.stride), ("p", g.padding), ("d", g.dilation)))
        size = "x".join(map(str, shapes[link.conv.first]))
        words.append(f"conv{size}{pairs}g{g.groups}" + ("" if shapes[link.conv.first + 1] is None else "b"))
    return "+".join(words)


# ---------------------------------------------------------------------------------------------------------------------
# Lookup
# ---------------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def _winner(
    name: str, device_type: str, program: Program | DenseProgram, shapes: _Shapes, shape: tuple[int, ...], case: str
) -> str:
    found = _nearest(_key(program, shapes, shape, case), verdicts(name))
    if found is None or why_not(found.backend, device_type, torch.float32) is not None:
        return "stock"
    return found.backend


def judged(program: Program | DenseProgram, tensors: Operands, device: torch.device) -> set[str]:
    """The backends that verdicts of this device name for a block, in any mode, dtype and size."""
    structure = _any_mode(structure_of(program, _shapes_of(tensors)))
    table = verdicts(device_name(device))
    return {v.backend for key, v in table.items() if _any_mode(_structure_in(key)) == structure}


def _structure_in(key: str) -> str:
    return _split(key)[2].split("_", 2)[2]


def _any_mode(structure: str) -> str:
    """A structure without what differs between training and inference, or is a matter of memory."""

    def link(match: re.Match[str]) -> str:
        words = [word for word in match[0].split("+") if word not in ("dropout", "gain")]
        return "+".join("norm" if word == "constant norm" else word for word in words)

    return re.sub(r"[^>|/:]+", link, structure.removesuffix("_low"))


def _nearest(key: str, table: dict[str, Verdict]) -> Verdict | None:
    if key in table:
        return table[key]
    case, values, rest = _split(key)
    near = []
    for other in table:
        other_case, other_values, other_rest = _split(other)
        if (other_case, other_rest) == (case, rest):
            near.append((abs(math.log2(values / other_values)), other))
    distance, nearest = min(near, default=(math.inf, ""))
    return table[nearest] if distance <= _FARTHEST else None


def _split(key: str) -> tuple[str, int, str]:
    """A key's case, its values per channel, its structure."""
    case, n, h, w, rest = _KEY.fullmatch(key).groups()
    return case, int(n) * int(h) * int(w), rest
