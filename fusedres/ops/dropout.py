"""Dropout's mask from a counter, so that it is recomputed where it is needed and never stored.

Element ``i`` of a ``[N, C, H, W]`` tensor, counted in NHWC order whatever its layout, ``i = ((n H + h) W + w) C + c``,
has the random word

.. math:: u_i = philox4x32_{10}\\big(key = seed,\\; counter = \\lfloor i / 4 \\rfloor\\big)[i \\bmod 4]

(Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3", section 3.3, ten rounds) and is kept, and scaled by
``1 / (1 - p)``, where :math:`u_i \\ge \\lfloor 2^{32} p \\rfloor` (Srivastava et al. 2014, "Dropout", section 4). Every
backend draws the same words.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["draw_seed", "dropped", "keep_scale", "philox", "philox4x32"]

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF


def draw_seed() -> Tensor:
    """A seed from PyTorch's default generator: an int64 tensor of one element, on the CPU."""
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64)


def _high_and_low(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """The two halves of a 64-bit product of 32-bit words that int64 tensors hold; halving the word avoids overflow."""
    high = (multiplier * (word >> 16) + (multiplier * (word & 0xFFFF) >> 16)) >> 16
    return high & _WORD, (multiplier * word) & _WORD


def philox4x32(words: list[Tensor], keys: list[int]) -> list[Tensor]:
    """Ten rounds over four-word counters under a two-word key; words are int64 in ``[0, 2^32)``."""
    for _ in range(_ROUNDS):
        high0, low0 = _high_and_low(_MULTIPLIERS[0], words[0])
        high1, low1 = _high_and_low(_MULTIPLIERS[1], words[2])
        words = [high1 ^ words[1] ^ keys[0], low1, high0 ^ words[3] ^ keys[1], low0]
        keys = [(key + step) & _WORD for key, step in zip(keys, _WEYL)]
    return words


def philox(seed: int, first: int, count: int, device: torch.device) -> Tensor:
    """Words ``first .. first + count - 1`` of the stream of ``seed``, as int64 in ``[0, 2^32)``."""
    counters = torch.arange(first // 4, (first + count + 3) // 4, dtype=torch.int64, device=device)
    zero = torch.zeros_like(counters)
    words = philox4x32([counters & _WORD, counters >> 32, zero, zero], [seed & _WORD, (seed >> 32) & _WORD])
    start = first % 4
    return torch.stack(words, 1).flatten()[start : start + count]


def keep_scale(shape: torch.Size, p: float, seed: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The mask times its scale: ``1 / (1 - p)`` where an element of a tensor of this shape is kept, else 0."""
    n, c, h, w = shape
    words = philox(int(seed), 0, n * c * h * w, device).view(n, h, w, c).permute(0, 3, 1, 2)
    kept = words >= int(p * 2**32)
    return kept.to(dtype) * (1 / (1 - p) if p < 1 else 0.0)


def dropped(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """``x`` times its mask; ``x`` itself where ``p`` is 0.

    Raises:
        ValueError: for ``p`` outside of [0, 1], and without a seed where ``p`` is not 0.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"dropout must be in [0, 1], got {p}")
    if p == 0:
        return x
    if seed is None:
        raise ValueError(f"seed must be given where dropout is not 0, got dropout={p}")
    return x * keep_scale(x.shape, p, seed, x.dtype, x.device)
