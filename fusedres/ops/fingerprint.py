"""A cheap sign that tensors were written to: a hash (FNV-1a, 64 bits) of up to sixteen values of each.

.. math:: h \\leftarrow (h \\oplus bits(t_i)) \\cdot p \\bmod 2^{64}

over values spread evenly in the order of memory. PyTorch counts writes to a tensor, but not those through ``.data`` or
a NumPy view, as old code for averaged weights makes them; those change every value, so a few tell. Only dense tensors
are sampled, of any other the first value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import declare

__all__ = ["FINGERPRINT"]

_SAMPLES = 16
_OFFSET, _PRIME, _MASK = 14695981039346656037, 1099511628211, 2**64 - 1
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _sampled_bits(t: Tensor) -> list[int]:
    dense = t.is_contiguous() or (t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last))
    length = t.numel() if dense else min(t.numel(), 1)
    samples = min(length, _SAMPLES)
    positions = [i * (length - 1) // max(samples - 1, 1) for i in range(samples)]
    if not positions:
        return []
    flat = t.detach().as_strided((length,), (1,))
    mask = 2 ** (8 * t.element_size()) - 1
    return [bits & mask for bits in flat[positions].view(_BITS[t.element_size()]).tolist()]


def _reference(tensors: list[Tensor]) -> int:
    value = _OFFSET
    for t in tensors:
        for bits in _sampled_bits(t):
            value = ((value ^ bits) * _PRIME) & _MASK
    return value - 2**64 if value >= 2**63 else value


def _fake(tensors: list[Tensor]) -> int:
    raise NotImplementedError("a fingerprint depends on the values of its tensors")


FINGERPRINT = declare("fingerprint", "(Tensor[] tensors) -> int", reference=_reference, fake=_fake, kernels=("cpu",))
