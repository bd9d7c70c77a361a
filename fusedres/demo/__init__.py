"""``python -m fusedres demo``: a ResNet-50 on photographs and a small training on digits, stock beside patched."""

from .main import add_arguments, run

__all__ = ["add_arguments", "run"]
