"""What :func:`fusedres.patch` looks for: one file per family of structures.

A pattern is a module with ``find(view)``, a generator of the regions it sees in a
:class:`~fusedres.patch.view.View`. To add a family, add its file and name it in :data:`PATTERNS`. The order is that of
preference: a node belongs to the first region that claims it, so larger structures come first. What several families
share is in :mod:`~fusedres.patch.patterns.sums`.
"""

from __future__ import annotations

from . import chain, dense, excitation, gated, norm, preact, residual

__all__ = ["PATTERNS"]

PATTERNS = (dense, gated, preact, residual, chain, norm, excitation)
