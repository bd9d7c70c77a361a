"""Networks that people have: by name, what :func:`fusedres.patch` finds in them, and whether their numbers stay."""

from .networks import LIBRARIES, ZOO, all_networks, build

__all__ = ["LIBRARIES", "ZOO", "all_networks", "build"]
