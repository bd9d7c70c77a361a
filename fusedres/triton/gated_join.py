"""The gated join in Triton: flat memory, since every element is treated alike.

Must move, at least: forward, three operands and one result; backward, the gradient, the logits and, for the logits'
gradient, both sides, and each gradient that is needed.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch, register

__all__ = ["check_alike", "gated_join", "gated_join_backward"]

_ELEMENTS = 2048  # two loads of 16 bytes per thread and operand


@triton.jit
def gate(logits, threshold, BINARY: tl.constexpr):
    """The sigmoid, and the factor of the branch."""
    s = 1.0 / (1.0 + tl.exp(-logits))
    m = s
    if BINARY:
        m = tl.where(s > threshold, 1.0, 0.0)
    return s, m


@triton.jit
def gated_join_fwd_kernel(f, logits, x, out, threshold, length, BINARY: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < length
    _, m = gate(tl.load(logits + at, mask=inside, other=0.0).to(tl.float32), threshold, BINARY)
    branch = tl.load(f + at, mask=inside, other=0.0).to(tl.float32)
    skip = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (m * branch + (1.0 - m) * skip).to(out.dtype.element_ty), mask=inside)


@triton.jit
def gated_join_bwd_kernel(
    grad, logits, f, x, grad_f, grad_logits, grad_x, threshold, length, BINARY: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < length
    s, m = gate(tl.load(logits + at, mask=inside, other=0.0).to(tl.float32), threshold, BINARY)
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    if grad_f is not None:
        tl.store(grad_f + at, (m * g).to(grad_f.dtype.element_ty), mask=inside)
    if grad_x is not None:
        tl.store(grad_x + at, ((1.0 - m) * g).to(grad_x.dtype.element_ty), mask=inside)
    if grad_logits is not None:
        difference = tl.load(f + at, mask=inside, other=0.0).to(tl.float32)
        difference -= tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        slope = g * difference * (s * (1.0 - s))
        tl.store(grad_logits + at, slope.to(grad_logits.dtype.element_ty), mask=inside)


def check_alike(op: str, first: Tensor, others: dict[str, Tensor | None]) -> None:
    """All of one shape, dtype and dense layout, so that memory may be walked flat."""
    for name, t in others.items():
        if t is not None and (t.shape != first.shape or t.dtype != first.dtype or t.stride() != first.stride()):
            raise ValueError(
                f"{op}: {name} of shape {tuple(t.shape)}, strides {t.stride()} and {t.dtype} does not fit the first "
                f"operand of shape {tuple(first.shape)}, strides {first.stride()} and {first.dtype}"
            )


def gated_join(f: Tensor, logits: Tensor, x: Tensor, threshold: float | None) -> Tensor:
    """See :mod:`fusedres.ops.gated_join`."""
    check_alike("gated_join", f, {"logits": logits, "x": x})
    out = f.new_empty_strided(f.shape, f.stride())
    if f.numel():
        args = {"f": f, "logits": logits, "x": x, "out": out, "threshold": threshold or 0.0, "length": f.numel()}
        meta = {"BINARY": threshold is not None, "BLOCK": _ELEMENTS}
        launch(gated_join_fwd_kernel, (cdiv(f.numel(), _ELEMENTS),), args, meta, stages=1)
    return out


def gated_join_backward(
    grad: Tensor,
    logits: Tensor,
    f: Tensor | None,
    x: Tensor | None,
    threshold: float | None,
    need_f: bool,
    need_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :mod:`fusedres.ops.gated_join`."""
    check_alike("gated_join_backward", grad, {"logits": logits, "f": f, "x": x})
    needed = {"grad_f": need_f, "grad_logits": f is not None and x is not None, "grad_x": need_x}
    grads = {name: grad.new_empty_strided(grad.shape, grad.stride()) for name, need in needed.items() if need}
    if grad.numel() and grads:
        args = {"grad": grad, "logits": logits, "f": f, "x": x, **{name: grads.get(name) for name in needed}}
        args |= {"threshold": threshold or 0.0, "length": grad.numel()}
        meta = {"BINARY": threshold is not None, "BLOCK": _ELEMENTS}
        launch(gated_join_bwd_kernel, (cdiv(grad.numel(), _ELEMENTS),), args, meta, stages=1)
    return tuple(grads[name] if name in grads else grad.new_empty(0) for name in needed)


register("gated_join", gated_join)
register("gated_join_backward", gated_join_backward)
