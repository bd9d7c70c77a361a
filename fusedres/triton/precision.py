"""How float32 is multiplied: as TensorFloat-32 where PyTorch lets the vendor's library do so.

PyTorch says it in words (``fp32_precision``, of one operator, of a backend or of everything) and in older flags
(``allow_tf32``). The words follow the flags; a flag raises where words have been set that no flag can express, so only
words are read. A word that is not set is the one above it.
"""

from __future__ import annotations

import torch

__all__ = ["convolution_precision", "matmul_precision"]


def convolution_precision(dtype: torch.dtype) -> str:
    """``"tf32"`` or ``"ieee"``, as ``tl.dot`` takes it, for a convolution of this dtype."""
    return "tf32" if dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


def matmul_precision(dtype: torch.dtype) -> str:
    """The same for a dense layer."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
