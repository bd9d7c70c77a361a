"""The Runge-Kutta methods, as their coefficients.

.. math:: k_i = f\\Big(t + c_i h,\\; y + h \\sum_{j<i} a_{ij} k_j\\Big) \\qquad y_1 = y + h \\sum_i b_i k_i
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["METHODS", "Tableau"]

Row = tuple[float, ...]


@dataclass(frozen=True)
class Tableau:
    """One explicit method.

    Attributes:
        order: of the method.
        c: the stages' times, in steps.
        a: per stage, the weights of the stages before it.
        b: the result's weights.
        error: the weights of the error estimate, for a method that chooses its steps.
        middle: the weights of the state in the middle of the step, for its continuous extension.
    """

    name: str
    order: int
    c: Row
    a: tuple[Row, ...]
    b: Row
    error: Row | None = None
    middle: Row | None = None

    @property
    def adaptive(self) -> bool:
        return self.error is not None

    @property
    def first_same_as_last(self) -> bool:
        """Whether the last stage is evaluated at the result, so that the next step has its first stage already."""
        return self.c[-1] == 1 and (*self.a[-1], 0.0) == self.b

    def within(self, x: float) -> Row:
        """The weights of the state at ``x`` steps into the step, ``0 <= x <= 1``.

        The quartic through both ends, with their derivatives, and through the middle (Shampine 1986, "Some Practical
        Runge-Kutta Formulas").
        """
        assert self.middle is not None
        last = len(self.b) - 1
        return tuple(
            _quartic(x, float(i == 0), float(i == last), self.b[i], self.middle[i]) for i in range(len(self.b))
        )


def _quartic(x: float, slope0: float, slope1: float, end: float, middle: float) -> float:
    """At ``x``, the quartic that starts from 0 with ``slope0`` and passes ``middle`` to ``end`` with ``slope1``."""
    a = 2 * (slope1 - slope0) - 8 * end + 16 * middle
    b = 5 * slope0 - 3 * slope1 + 14 * end - 32 * middle
    c = slope1 - 4 * slope0 - 5 * end + 16 * middle
    return x * (slope0 + x * (c + x * (b + x * a)))


_EULER = Tableau("euler", 1, c=(0.0,), a=((),), b=(1.0,))

_MIDPOINT = Tableau("midpoint", 2, c=(0.0, 1 / 2), a=((), (1 / 2,)), b=(0.0, 1.0))

# Kutta's 3/8 rule, not the classical method: its error is a little smaller.
_RK4 = Tableau(
    "rk4",
    4,
    c=(0.0, 1 / 3, 2 / 3, 1.0),
    a=((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
    b=(1 / 8, 3 / 8, 3 / 8, 1 / 8),
)

_DOPRI5_B = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0)

# Dormand and Prince (1980, "A Family of Embedded Runge-Kutta Formulae", table 2, RK5(4)7M); the fourth-order result
# that the error is measured against, and the middle, are Shampine's (1986).
_DOPRI5_B4 = (1951 / 21600, 0.0, 22642 / 50085, 451 / 720, -12231 / 42400, 649 / 6300, 1 / 60)

_DOPRI5 = Tableau(
    "dopri5",
    5,
    c=(0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    a=(
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        _DOPRI5_B[:-1],
    ),
    b=_DOPRI5_B,
    error=tuple(fifth - fourth for fifth, fourth in zip(_DOPRI5_B, _DOPRI5_B4)),
    middle=(
        6025192743 / 30085553152 / 2,
        0.0,
        51252292925 / 65400821598 / 2,
        -2691868925 / 45128329728 / 2,
        187940372067 / 1594534317056 / 2,
        -1776094331 / 19743644256 / 2,
        11237099 / 235043384 / 2,
    ),
)

METHODS: dict[str, Tableau] = {method.name: method for method in (_EULER, _MIDPOINT, _RK4, _DOPRI5)}
"""The methods by the name that torchdiffeq gives them: ``euler``, ``midpoint`` and ``rk4`` take the steps that they are
told to, ``dopri5`` chooses them by the error that it estimates."""
