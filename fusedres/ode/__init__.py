"""Ordinary differential equations: explicit Runge-Kutta solvers whose updates are one pass each, and the adjoint."""

from .odeint import odeint
from .tableau import METHODS

__all__ = ["METHODS", "odeint"]
