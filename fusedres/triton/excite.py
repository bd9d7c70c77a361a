"""The excitation in Triton: two dense layers for sixteen samples per program, in one launch for what is six in stock.

A few values, so all that counts is launches: the weights are read by every program, from L2, and the hidden layer stays
in registers. Must move, at least: means, weights and gain once. ``4 N C H`` FLOPs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.excite import EXCITE, GATES
from .launch import cdiv, launch, next_power_of_2, register
from .precision import matmul_precision
from .tiles import activate, load_row

__all__ = ["excite"]

_SAMPLES = 16  # the fewest rows of a product
_COLUMNS = 64
_WIDEST = 512  # of a hidden layer that registers hold


@triton.jit
def excite_kernel(
    means,
    norm,
    w1,
    b1,
    w2,
    b2,
    mask,
    gain,
    act_param,
    N,
    C,
    HIDDEN,
    ACT: tl.constexpr,
    HARD: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BH: tl.constexpr,
    BC: tl.constexpr,
):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = (rows < N)[:, None]
    units = tl.arange(0, BH)
    hidden = tl.zeros((BM, BH), tl.float32)
    for start in range(0, C, BC):
        columns = start + tl.arange(0, BC)
        s = tl.load(means + (rows * C)[:, None] + columns[None, :], mask=inside & (columns < C)[None, :], other=0.0)
        s = load_row(norm, 2, columns, C, 1.0)[None, :] * s + load_row(norm, 3, columns, C, 0.0)[None, :]
        at = w1 + (units * C)[None, :] + columns[:, None]
        w = tl.load(at, mask=(units < HIDDEN)[None, :] & (columns < C)[:, None], other=0.0)
        hidden = tl.dot(s.to(w.dtype), w, hidden, input_precision=PRECISION)
    if b1 is not None:
        hidden += tl.load(b1 + units, mask=units < HIDDEN, other=0.0).to(tl.float32)[None, :]
    hidden = activate(hidden, act_param, ACT).to(w2.dtype.element_ty)
    survives = tl.full((BM,), 1.0, tl.float32)
    if mask is not None:
        survives = tl.load(mask + rows, mask=rows < N, other=0.0)
    for start in range(0, C, BC):
        columns = start + tl.arange(0, BC)
        at = w2 + (columns * HIDDEN)[None, :] + units[:, None]
        w = tl.load(at, mask=(units < HIDDEN)[:, None] & (columns < C)[None, :], other=0.0)
        z = tl.dot(hidden, w, input_precision=PRECISION)
        if b2 is not None:
            z += tl.load(b2 + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]
        if HARD:
            ramp = z + 3.0
            z = tl.where(ramp <= 0, 0.0, tl.where(ramp >= 6, 6.0, ramp)) * 0.16666666666666666
        else:
            z = 1.0 / (1.0 + tl.exp(-z))
        at = gain + (rows * C)[:, None] + columns[None, :]
        tl.store(at, z * survives[:, None], mask=inside & (columns < C)[None, :])


def excite(
    means: Tensor,
    norm: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    act: int,
    act_param: float,
    gate: str,
    mask: Tensor | None,
) -> Tensor:
    """See :mod:`fusedres.ops.excite`; a hidden layer that registers cannot hold is the library's."""
    samples, channels = means.shape
    hidden = w1.shape[0]
    for name, w, shape in (("w1", w1, (hidden, channels)), ("w2", w2, (channels, hidden))):
        if w.shape[:2] != shape or w.numel() != hidden * channels or w.dtype != w1.dtype:
            raise ValueError(
                f"excite: {name} of shape {tuple(w.shape)}, {w.dtype} does not fit means of shape {tuple(means.shape)} "
                f"and w1 of shape {tuple(w1.shape)}, {w1.dtype}"
            )
    if gate not in GATES:
        raise ValueError(f"excite: gate must be one of {', '.join(map(repr, GATES))}, got {gate!r}")
    if hidden > _WIDEST:
        return EXCITE.reference(means, norm, w1, b1, w2, b2, act, act_param, gate, mask)
    means = means.contiguous()
    gain = torch.empty_like(means)
    if not gain.numel():
        return gain
    wide = next_power_of_2(max(hidden, 16))
    args = {"means": means, "norm": norm, "w1": w1.flatten(1).contiguous(), "b1": b1, "w2": w2.flatten(1).contiguous()}
    args |= {"b2": b2, "mask": None if mask is None else mask.contiguous(), "gain": gain}
    args |= {"act_param": float(act_param), "N": samples, "C": channels, "HIDDEN": hidden}
    meta = {"ACT": act, "HARD": gate == "hardsigmoid", "PRECISION": matmul_precision(w1.dtype)}
    # The tile of weights waits in shared memory, twice, of which some devices have 99 KiB.
    columns = _COLUMNS if wide * w1.element_size() <= 1024 else _COLUMNS // 2
    meta |= {"BM": _SAMPLES, "BH": wide, "BC": columns}
    launch(excite_kernel, (cdiv(samples, _SAMPLES),), args, meta, warps=4 if wide <= 128 else 8, stages=2)
    return gain


register("excite", excite)
