"""Measuring: interleaved timing, agreement with float64 before any ratio, bytes that autograd keeps.

``python -m fusedres bench`` and ``python -m fusedres demo`` are built from these parts, and so are the suites in
``bench/``.
"""

from .memory import saved_bytes
from .timing import Timing, interleave, speedup

__all__ = ["Timing", "interleave", "saved_bytes", "speedup"]
