"""A sign that tensors were written to: a hash (FNV-1a, 64 bits, in four lanes) of some of their values.

.. math:: h_{i \\bmod 4} \\leftarrow (h_{i \\bmod 4} \\oplus bits(t[i \\bmod n_1, i \\bmod n_2, \\dots])) \\cdot p
    \\bmod 2^{64}, \\qquad i < \\max_d n_d

PyTorch counts writes to a tensor, but not those through ``.data`` or a NumPy view, as old code for averaged weights and
for pruning makes them. So of a tensor ``[n_1, n_2, ...]`` the values on its wrapped diagonal are looked at: all of a
norm's parameters and statistics, and of a convolution's weight one at least of every filter, input channel, row and
column. What changes fewer values than these, and goes past PyTorch, may go unseen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import declare

__all__ = ["FINGERPRINT"]

_LANES = 4
_OFFSET, _PRIME, _MASK = 14695981039346656037, 1099511628211, 2**64 - 1
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _sampled_bits(t: Tensor) -> list[int]:
    if not t.numel():
        return []
    t, count = t.detach(), max(t.shape, default=1)
    diagonal = t[tuple(torch.arange(count, device=t.device) % size for size in t.shape)].reshape(-1)
    mask = 2 ** (8 * t.element_size()) - 1
    return [bits & mask for bits in diagonal.view(_BITS[t.element_size()]).tolist()]


def _reference(tensors: list[Tensor]) -> int:
    lanes = [_OFFSET] * _LANES
    for t in tensors:
        for i, bits in enumerate(_sampled_bits(t)):
            lanes[i % _LANES] = ((lanes[i % _LANES] ^ bits) * _PRIME) & _MASK
    value = _OFFSET
    for lane in lanes:
        value = ((value ^ lane) * _PRIME) & _MASK
    return value - 2**64 if value >= 2**63 else value


def _fake(tensors: list[Tensor]) -> int:
    raise NotImplementedError("a fingerprint depends on the values of its tensors")


FINGERPRINT = declare("fingerprint", "(Tensor[] tensors) -> int", reference=_reference, fake=_fake, kernels=("cpu",))
