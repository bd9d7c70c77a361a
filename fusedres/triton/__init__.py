"""The Triton backend: kernels for NVIDIA GPUs, written in Triton, under the names ``fusedres::<op>_triton``.

Importing this package never needs Triton: :func:`missing` says in words why the kernels are not there. They are
imported and registered once, on first use (:func:`load`), since importing Triton takes longer than importing fusedres.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util

__all__ = ["KERNEL_MODULES", "MINIMUM_VERSION", "load", "missing"]

MINIMUM_VERSION = (3, 6)

KERNEL_MODULES = (
    "bn_stats",
    "bn_norm",
    "join",
    "join_backward",
    "join_pool",
    "conv_fused",
    "conv_fused_backward",
    "gated_join",
    "rk_combine",
    "excite",
)
"""The modules of this package that hold kernels, by the stem of their op."""


@functools.cache
def missing() -> str | None:
    """``None`` where Triton is there, else why its kernels are not."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        import triton
    except Exception as error:  # a broken installation can fail in any way
        return f"Triton does not import: {error}"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < MINIMUM_VERSION:
        return f"the kernels need Triton {'.'.join(map(str, MINIMUM_VERSION))} or newer, this is {triton.__version__}"
    return None


@functools.cache
def load() -> bool:
    """Imports the kernels, which registers them; False where they are :func:`missing`."""
    if missing() is not None:
        return False
    for name in KERNEL_MODULES:
        importlib.import_module(f"{__name__}.{name}")
    return True
