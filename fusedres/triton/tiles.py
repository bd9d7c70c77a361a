"""What the kernels are made of: activations, addresses, a norm's rows, dropout's mask."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["activate", "activation_gradient", "keep_factor", "load_gain", "load_row", "pointers"]


# ---------------------------------------------------------------------------------------------------------------------
# Activations: fusedres/ops/activations.py, code by code. Comparisons are written so that NaN travels as in stock.
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def activate(z, param, ACT: tl.constexpr):
    """``act(z)``."""
    if ACT == 1:
        z = tl.where(z <= 0, 0.0, z)
    elif ACT == 2:
        z = tl.where(z <= 0, 0.0, tl.where(z >= 6, 6.0, z))
    elif ACT == 3:
        z = tl.where(z > 0, z, z * param)
    elif ACT == 4:
        z = z / (1.0 + tl.exp(-z))
    elif ACT == 5:
        ramp = z + 3.0
        z = z * tl.where(ramp <= 0, 0.0, tl.where(ramp >= 6, 6.0, ramp)) * 0.16666666666666666
    elif ACT == 6:
        z = z * 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
    else:
        tl.static_assert(ACT == 0, "an activation that the kernels do not know")
    return z


@triton.jit
def activation_gradient(z, g, param, ACT: tl.constexpr):
    """``act'(z) * g``; zero where the activation is flat, whatever ``g`` is."""
    if ACT == 1:
        g = tl.where(z <= 0, 0.0, g)
    elif ACT == 2:
        g = tl.where(z <= 0, 0.0, tl.where(z >= 6, 0.0, g))
    elif ACT == 3:
        g = tl.where(z > 0, g, g * param)
    elif ACT == 4:
        s = 1.0 / (1.0 + tl.exp(-z))
        g = g * (s * (1.0 + z * (1.0 - s)))
    elif ACT == 5:
        g = tl.where(z <= -3, 0.0, tl.where(z < 3, g * (z * 0.3333333333333333 + 0.5), g))
    elif ACT == 6:
        cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        g = g * (cdf + z * 0.3989422804014327 * tl.exp(-0.5 * z * z))
    else:
        tl.static_assert(ACT == 0, "an activation that the kernels do not know")
    return g


# ---------------------------------------------------------------------------------------------------------------------
# Addresses
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def pointers(base, row, BLOCK: tl.constexpr, columns, pitch, C, HW, NHWC: tl.constexpr):
    """Pointers to a tile of a 4-d tensor: pixels ``row .. row + BLOCK - 1`` of all images, and these channels.

    ``row`` is an int64 scalar. In channels_last it moves the base, so that the tile's own offsets stay in 32 bits.
    """
    local = tl.arange(0, BLOCK)
    if NHWC:
        result = base + row * pitch + (local * pitch)[:, None] + columns[None, :]
    else:
        rows = row + local
        image = rows // HW
        result = base + (image * C * HW + rows - image * HW)[:, None] + columns.to(tl.int64)[None, :] * HW
    return result


@triton.jit
def load_row(rows, INDEX: tl.constexpr, columns, C, fallback):
    """Row ``INDEX`` of an ``[R, C]`` tensor at these channels, or ``fallback`` in every channel without one."""
    if rows is None:
        result = tl.full(columns.shape, fallback, tl.float32)
    else:
        result = tl.load(rows + INDEX * C + columns, mask=columns < C, other=0.0)
    return result


@triton.jit
def load_gain(gain, row, BLOCK: tl.constexpr, columns, C, HW, mask):
    """The tile of an ``[N, C]`` tensor that belongs to these pixels and channels."""
    image = (row + tl.arange(0, BLOCK)) // HW
    return tl.load(gain + (image * C)[:, None] + columns[None, :], mask=mask, other=0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Dropout
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def keep_factor(seed, threshold, scale, row, BLOCK: tl.constexpr, columns, C, QUADS: tl.constexpr):
    """``scale`` where an element is kept, else 0: fusedres/ops/dropout.py, the same words.

    With QUADS, four neighbouring channels share one counter (C and the first channel divide by 4); else every element
    draws four words and uses one.
    """
    if seed.dtype.is_ptr():
        seed = tl.load(seed)
    rows = row + tl.arange(0, BLOCK)
    if QUADS:
        quads: tl.constexpr = columns.shape[0] // 4
        first = tl.min(columns, 0) // 4
        q = (rows * (C // 4))[:, None] + (first + tl.arange(0, quads))[None, :]
        w0, w1, w2, w3 = _philox(seed, q)
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
        words = tl.reshape(words, (BLOCK, columns.shape[0]))
    else:
        i = (rows * C)[:, None] + columns[None, :]
        w0, w1, w2, w3 = _philox(seed, i >> 2)
        lane = i & 3
        words = tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))
    return tl.where(words.to(tl.int64) >= threshold, scale, 0.0)


@triton.jit
def _philox(seed, q):
    low = (q & 0xFFFFFFFF).to(tl.uint32)
    high = (q >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    return tl.philox(seed, low, high, zero, zero)
