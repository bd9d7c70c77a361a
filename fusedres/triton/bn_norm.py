"""A batch norm's rows in Triton: one small program per 128 channels, partial statistics merged on the way.

Must move, at least: the statistics once, 4 rows and the running statistics. A handful of FLOPs per channel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch, register

__all__ = ["bn_norm"]


@triton.jit(do_not_specialize=["parts"])
def bn_norm_kernel(
    stats,
    gamma,
    beta,
    running_mean,
    running_var,
    out,
    count,
    momentum,
    eps,
    parts,
    C,
    BC: tl.constexpr,
):
    columns = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = columns < C
    if stats is None:
        mean = tl.load(running_mean + columns, mask=inside, other=0.0).to(tl.float32)
        var = tl.load(running_var + columns, mask=inside, other=1.0).to(tl.float32)
    else:
        mean = tl.zeros((BC,), tl.float32)
        for k in range(parts):
            mean += tl.load(stats + k * C + columns, mask=inside, other=0.0)
        mean = tl.div_rn(mean, tl.zeros((BC,), tl.float32) + parts)
        m2 = tl.zeros((BC,), tl.float32)
        for k in range(parts):
            between = tl.load(stats + k * C + columns, mask=inside, other=0.0) - mean
            part = tl.load(stats + (parts + k) * C + columns, mask=inside, other=0.0)
            m2 += part + (count / parts) * between * between
        var = tl.div_rn(m2, tl.zeros((BC,), tl.float32) + count)
        if running_mean is not None:
            old = tl.load(running_mean + columns, mask=inside, other=0.0).to(tl.float32)
            new = (1.0 - momentum) * old + momentum * mean
            tl.store(running_mean + columns, new.to(running_mean.dtype.element_ty), mask=inside)
        if running_var is not None:
            unbiased = tl.div_rn(m2, tl.zeros((BC,), tl.float32) + (count - 1.0))
            old = tl.load(running_var + columns, mask=inside, other=0.0).to(tl.float32)
            new = (1.0 - momentum) * old + momentum * unbiased
            tl.store(running_var + columns, new.to(running_var.dtype.element_ty), mask=inside)
    rstd = tl.div_rn(tl.full((BC,), 1.0, tl.float32), tl.sqrt_rn(var + eps))
    scale = rstd
    if gamma is not None:
        scale = rstd * tl.load(gamma + columns, mask=inside, other=0.0).to(tl.float32)
    shift = -mean * scale
    if beta is not None:
        shift += tl.load(beta + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + columns, mean, mask=inside)
    tl.store(out + C + columns, rstd, mask=inside)
    tl.store(out + 2 * C + columns, scale, mask=inside)
    tl.store(out + 3 * C + columns, shift, mask=inside)


def bn_norm(
    stats: Tensor | None,
    count: float,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> Tensor:
    """See :mod:`fusedres.ops.bn_norm`."""
    if stats is None and (running_mean is None or running_var is None):
        raise ValueError("bn_norm: neither batch statistics nor running statistics are given")
    like = running_mean if stats is None else stats
    channels = like.shape[-1]
    out = like.new_empty((4, channels), dtype=torch.float32)
    args = {"stats": None if stats is None else stats.contiguous(), "gamma": gamma, "beta": beta}
    args |= {"running_mean": running_mean, "running_var": running_var, "out": out, "count": float(count)}
    args |= {"momentum": float(momentum), "eps": float(eps), "C": channels}
    args |= {"parts": stats.shape[1] if stats is not None and stats.dim() == 3 else 1}
    launch(bn_norm_kernel, (cdiv(channels, 128),), args, {"BC": 128}, warps=4, stages=1)
    return out


register("bn_norm", bn_norm)
