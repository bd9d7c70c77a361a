"""What every op is called with: one table, for each layout, dtype and shape that the op takes.

``tests/ops/test_opcheck.py`` and ``tests/ops/test_fakes.py`` walk it; an op without an entry fails both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from slices import empty_slice
from torch import Tensor

from fusedres.ops.conv_winograd import CONV_WINOGRAD_PACK
from fusedres.testing import INPUTS

__all__ = ["SAMPLES", "SHAPE", "Draw", "Entry", "shapes_of"]

Shape = tuple[int, int, int, int]

SHAPE: Shape = (2, 5, 4, 3)
_OTHER_SHAPES: tuple[Shape, ...] = ((2, 1, 4, 3), (1, 5, 1, 1), (0, 5, 4, 3))
_SEED = torch.tensor([3])
_GEOMETRY = ([1, 1], [1, 1], [1, 1])
_FILTERS = 6


@dataclass(frozen=True)
class Draw:
    """Makes the tensors of a call: images of one layout, dtype and shape, and what goes with them."""

    layout: str
    shape: Shape = SHAPE
    dtype: torch.dtype = torch.float32

    def image(self, seed: int = 0, channels: int | None = None) -> Tensor:
        n, c, h, w = self.shape
        return INPUTS[self.layout]((n, c if channels is None else channels, h, w), self.dtype, seed)

    def destination(self, channels: int | None = None) -> Tensor:
        """To be written to: a slice of a channels_last buffer, or dense where the images are contiguous."""
        like = self.image(0, channels)
        return torch.zeros_like(like) if self.layout == "contiguous" else empty_slice(like.shape, self.dtype)[0].zero_()

    def vector(self, channels: int | None = None) -> Tensor:
        return self._positive(self.shape[1] if channels is None else channels)

    def rows(self, channels: int | None = None) -> Tensor:
        """Those of a norm."""
        return self._positive(4, self.shape[1] if channels is None else channels)

    def gain(self) -> Tensor:
        return self._positive(*self.shape[:2])

    def sums(self, count: int = 3) -> Tensor:
        return self._positive(count, self.shape[1])

    def weight(self, filters: int = _FILTERS) -> Tensor:
        memory = torch.contiguous_format if self.layout == "contiguous" else torch.channels_last
        return torch.randn(filters, self.shape[1], 3, 3).to(self.dtype, memory_format=memory)

    @property
    def count(self) -> float:
        n, _, h, w = self.shape
        return float(max(n * h * w, 1))

    @staticmethod
    def _positive(*size: int) -> Tensor:
        return torch.rand(size) + 0.5


@dataclass(frozen=True)
class Entry:
    """An op's part of the table.

    Attributes:
        calls: the arguments of some calls, which between them give and withhold every optional tensor.
        layouts: of images that the kernels take; they refuse the others. The reference takes all of them.
        dtypes: that the kernels take.
        empty: whether an image may hold no value.
        faked: whether there is a fake; there is none of what depends on the values of tensors.
    """

    calls: Callable[[Draw], list[tuple[Any, ...]]]
    layouts: tuple[str, ...] = ("channels_last", "contiguous", "sliced")
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    empty: bool = True
    faked: bool = True

    def layouts_of(self, backend: str) -> tuple[str, ...]:
        return tuple(INPUTS) if backend == "reference" and self.images else self.layouts

    def dtypes_of(self, backend: str) -> tuple[torch.dtype, ...]:
        return Entry.dtypes if backend == "reference" else self.dtypes

    @property
    def images(self) -> bool:
        """Whether the op takes images at all."""
        return self.layouts != _NO_IMAGES


def shapes_of(entry: Entry) -> tuple[Shape, ...]:
    return tuple(shape for shape in (SHAPE, *_OTHER_SHAPES) if shape[0] or entry.empty)


# ---------------------------------------------------------------------------------------------------------------------
# The calls of each op
# ---------------------------------------------------------------------------------------------------------------------


def _bn_norm(d: Draw) -> list[tuple]:
    c, buffers = d.shape[1], (d.vector(), d.vector())
    batch, samples = torch.rand(2, c), torch.rand(2, 3, c)
    return [
        *((stats, 60.0, d.vector(), d.vector(), *buffers, 0.1, 1e-5) for stats in (batch, samples)),
        (None, 1.0, None, None, *buffers, 0.0, 1e-5),
        (batch, 60.0, None, None, None, None, 0.1, 1e-5),
    ]


def _joins(d: Draw) -> list[tuple]:
    y, r = d.image(), d.image(1)
    return [
        (y, d.rows(), r, d.rows(), 1, 0.0),
        (y, None, r, None, 0, 0.0),
        (y, d.rows(), None, None, 4, 0.0, d.gain(), 0.5, _SEED),
    ]


def _bn_joins(d: Draw) -> list[tuple]:
    y, r, settings = d.image(), d.image(1), (0.3, 1e-5)
    return [
        (y, d.vector(), d.vector(), d.vector(), d.vector(), *settings, r, d.rows(), 1, 0.0, 0.5, _SEED),
        (y, None, None, None, None, *settings, None, None, 4, 0.0),
    ]


def _masks(d: Draw) -> list[tuple]:
    y, r, g = (d.image(seed) for seed in range(3))
    return [
        (g, y, d.rows(), r, d.rows(), 1, 0.0, False),
        (g, y, None, r, None, 4, 0.0, True),
        (g, y, d.rows(), None, None, 4, 0.0, True, 0.5, _SEED),
    ]


_POOL = ([3, 2], [2, 1], [1, 1])


def _pools(d: Draw) -> list[tuple]:
    y = d.image()
    return [(y, d.rows(), 1, 0.0, *_POOL, False, True), (y, None, 4, 0.0, [1, 1], [1, 1], [0, 0], True, False)]


def _pool_backwards(d: Draw) -> list[tuple]:
    y, ones = d.image(), ([1, 1], [1, 1], [0, 0])
    like = "contiguous" if d.layout == "contiguous" else "channels_last"
    grad, taken = INPUTS[like](d.shape, d.dtype, 2), INPUTS[like](d.shape, torch.float32).mul(0).to(torch.uint8)
    return [(grad, taken, y, *ones)]


def _reductions(d: Draw) -> list[tuple]:
    y, g = d.image(), d.image(2)
    plain = [call[:8] for call in _masks(d)[:2]]
    return [*plain, (g, y, None, None, None, 4, 0.0, True, d.gain(), 0.5, _SEED)]


def _applications(d: Draw) -> list[tuple]:
    y, r, g = (d.image(seed) for seed in range(3))
    both = (g, y, d.rows(), r, d.rows(), 1, 0.0)
    gained = (d.gain(), 0.5, _SEED, d.gain())
    return [
        (*both, d.sums(), d.count, True, True, True),
        (*both, d.sums(), d.count, True, False, False),
        (*both, d.sums(4), d.count, True, True, True, *gained, d.image(3), d.destination()),
        (g, y, None, None, None, 1, 0.0, None, d.count, False, False, False),
    ]


def _backwards(d: Draw) -> list[tuple]:
    y, r, g = (d.image(seed) for seed in range(3))
    both = (g, y, d.rows(), r, d.rows(), 1, 0.0)
    return [
        (*both, False, d.count, True, True, True),
        (*both, True, d.count, True, True, True, 0.5, _SEED, d.image(3), d.destination()),
        (g, y, None, None, None, 1, 0.0, False, d.count, False, False, False),
    ]


def _gated(d: Draw) -> list[tuple]:
    return [(d.image(), d.image(1), d.image(2), threshold) for threshold in (None, 0.5)]


def _gated_backward(d: Draw) -> list[tuple]:
    g, logits, f, x = (d.image(seed) for seed in range(4))
    return [(g, logits, f, x, None, True, True), (g, logits, None, None, 0.5, True, False)]


def _fprops(d: Draw) -> list[tuple]:
    x, weight = d.image(), d.weight()
    bare = (x, None, 0, 0.0, weight, None, *_GEOMETRY, False)
    whole = (x, d.rows(), 4, 0.0, weight, d.vector(_FILTERS).to(d.dtype), *_GEOMETRY, True)
    return [bare, whole, (*whole, d.destination(_FILTERS))]


def _fused_joins(d: Draw) -> list[tuple]:
    bare, whole = (call[:-1] for call in _fprops(d)[:2])
    return [
        (*whole, d.rows(_FILTERS), d.image(1, _FILTERS), d.rows(_FILTERS), 1, 0.0),
        (*bare, None, None, None, 0, 0.0, d.destination(_FILTERS)),
    ]


def _pending(d: Draw) -> tuple[tuple, tuple]:
    """A gradient behind a norm, and the input that is pending before the convolution."""
    g, y = d.image(2, _FILTERS), d.image(1, _FILTERS)
    return (g, y, d.rows(_FILTERS)), (d.image(), d.rows(), 4, 0.0)


def _dgrads(d: Draw) -> list[tuple]:
    gradient, pending = _pending(d)
    whole = (*gradient, d.weight(), *pending, *_GEOMETRY)
    bare = (gradient[0], None, None, d.weight(), pending[0], None, 0, 0.0, *_GEOMETRY)
    return [whole, bare, (*whole, d.image(3), d.destination())]


def _wgrads(d: Draw) -> list[tuple]:
    gradient, pending = _pending(d)
    bare = (gradient[0], None, None, pending[0], None, 0, 0.0)
    return [(*call, *_GEOMETRY, torch.zeros_like(d.weight())) for call in ((*gradient, *pending), bare)]


def _conv_wgrads(d: Draw) -> list[tuple]:
    (g, *_), (x, rows, act, param) = _pending(d)
    return [(g, x, norm, act, param, *_GEOMETRY, torch.zeros_like(d.weight())) for norm in (rows, None)]


def _winograds(d: Draw) -> list[tuple]:
    packed, channels_last = CONV_WINOGRAD_PACK.reference(d.weight()), Draw("channels_last", d.shape, d.dtype)
    side = channels_last.image(1, _FILTERS)
    whole = (d.image(), packed, _FILTERS, d.vector(_FILTERS).to(d.dtype), side, 1, 0.0, [1, 1])
    return [whole, (d.image(), packed, _FILTERS, None, None, 1, 0.0, [1, 1])]


def _epilogues(d: Draw) -> list[tuple]:
    conv = d.image(), d.weight(), d.vector(_FILTERS), d.vector(_FILTERS)
    return [(*conv, side, *_GEOMETRY) for side in (d.image(1, _FILTERS), None)]


def _excites(d: Draw) -> list[tuple]:
    n, c = d.shape[:2]
    means, mask = torch.randn(n, c), torch.tensor([[0.0], [2.0]])[torch.arange(n) % 2]
    w1, w2 = torch.randn(4, c).to(d.dtype), torch.randn(c, 4).to(d.dtype)
    b1, b2 = torch.randn(4).to(d.dtype), torch.randn(c).to(d.dtype)
    pointwise = (w1[:, :, None, None], None, w2[:, :, None, None], None)
    return [
        (means, d.rows(), w1, b1, w2, b2, 1, 0.0, "sigmoid", mask),
        (means, None, *pointwise, 4, 0.0, "hardsigmoid", None),
    ]


_NO_IMAGES = ("contiguous",)
_DENSE = ("channels_last", "contiguous")
_FLOAT32 = (torch.float32,)
_READ_IN_PLACE = ("channels_last", "sliced")
_WEIGHTS = [0.5, -0.25]

SAMPLES: dict[str, Entry] = {
    "all_finite": Entry(lambda d: [(d.image(),)], _DENSE, faked=False),
    "bn_grad_rows": Entry(lambda d: [(d.rows(), sums, 7.0) for sums in (d.sums(2), None)], _NO_IMAGES, dtypes=_FLOAT32),
    "bn_join": Entry(_bn_joins, empty=False),
    "bn_norm": Entry(_bn_norm, _NO_IMAGES, dtypes=_FLOAT32),
    "bn_stats": Entry(lambda d: [(d.image(),), (d.image(), True), (d.image(), False, d.destination())], empty=False),
    "conv_epilogue": Entry(_epilogues, ("channels_last",), dtypes=(torch.bfloat16,)),
    "conv_fused_dgrad": Entry(_dgrads, _READ_IN_PLACE, _FLOAT32, empty=False),
    "conv_fused_fprop": Entry(_fprops, _READ_IN_PLACE, _FLOAT32, empty=False),
    "conv_fused_join": Entry(_fused_joins, _READ_IN_PLACE),
    "conv_fused_wgrad": Entry(_wgrads, _READ_IN_PLACE),
    "conv_wgrad": Entry(_conv_wgrads, ("channels_last",), empty=False),
    "conv_winograd": Entry(_winograds, _READ_IN_PLACE, _FLOAT32, empty=False),
    "conv_winograd_pack": Entry(
        lambda d: [(INPUTS[d.layout]((35, d.shape[1], 3, 3), d.dtype),)], tuple(INPUTS), _FLOAT32
    ),
    "excite": Entry(_excites, _NO_IMAGES),
    "fingerprint": Entry(lambda d: [([d.image(), d.image(1)],)], tuple(INPUTS), faked=False),
    "gated_join": Entry(_gated, _DENSE),
    "gated_join_backward": Entry(_gated_backward, _DENSE),
    "join": Entry(_joins),
    "join_backward": Entry(_backwards),
    "join_backward_apply": Entry(_applications),
    "join_backward_mask": Entry(_masks),
    "join_backward_reduce": Entry(_reductions),
    "join_pool": Entry(_pools),
    "join_pool_backward": Entry(_pool_backwards),
    "join_stats": Entry(_joins, empty=False),
    "rk_combine": Entry(lambda d: [(d.image(), [d.image(1), d.image(2)], _WEIGHTS), (d.image(), [], [])], _DENSE),
    "rk_combine_backward": Entry(lambda d: [(d.image(), _WEIGHTS)], _DENSE),
    "rk_error": Entry(lambda d: [(d.image(), d.image(1), [d.image(2), d.image(3)], _WEIGHTS, 1e-3, 1e-3)], _DENSE),
}
