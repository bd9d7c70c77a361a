"""The time that is left, and what fits into it."""

from __future__ import annotations

from time import perf_counter

__all__ = ["TimeBudget"]


class TimeBudget:
    """Decides whether something that takes its time still fits.

    Args:
        deadline: on the clock of ``perf_counter``; infinity for no limit, minus infinity for nothing at all.
        reserve: seconds that everything else still needs.
    """

    def __init__(self, deadline: float = float("inf"), reserve: float = 0.0) -> None:
        self._deadline = deadline
        self._reserve = reserve
        self._scale: dict[str, float] = {}

    @classmethod
    def of(cls, seconds: float, reserve: float = 0.0) -> TimeBudget:
        """So many seconds from now."""
        return cls(perf_counter() + seconds, reserve)

    def within(self, reserve: float) -> TimeBudget:
        """The same deadline and the same experience, with so many seconds kept for everything else."""
        other = TimeBudget(self._deadline, reserve)
        other._scale = self._scale
        return other

    def left(self) -> float:
        """Seconds, the reserve not counted."""
        return self._deadline - self._reserve - perf_counter()

    def refuses(self, kind: str, expected: float) -> str | None:
        """``None`` where work of this kind, expected to take so many seconds, fits; else why not, in words."""
        if self._deadline == float("-inf"):
            return "not asked for"
        expected *= self._scale.get(kind, 1.0)
        left = self.left()
        return None if expected <= left else f"no time: needs about {expected:.0f} s of {max(left, 0):.0f} s left"

    def spent(self, kind: str, expected: float, seconds: float) -> None:
        """Learns from work of this kind how long the next of it will take."""
        if expected > 0:
            self._scale[kind] = seconds / expected
