"""Two files of results, contestant by contestant: what became slower."""

from __future__ import annotations

from dataclasses import dataclass

from ..results import Measurement, times
from .source import Source

__all__ = ["HEAD", "TOLERATED", "Change", "compared"]

TOLERATED = 1.10
"""A median that is longer by more than this is a regression, unless the quartiles of the two overlap."""

HEAD = ("", "contestant", "before", "after", "after / before", "over eager before", "after", "")


@dataclass(frozen=True)
class Change:
    """A contestant of a group that both files have, timed in both."""

    before: Measurement
    after: Measurement

    @property
    def ratio(self) -> float:
        """The median after over that before."""
        return self.after.seconds["median"] / self.before.seconds["median"]

    @property
    def regressed(self) -> bool:
        """Whether it is slower by more than :data:`TOLERATED`, beyond the spread of either, or its check turned red."""
        if self.red:
            return True
        return self.ratio > TOLERATED and self.after.seconds["q1"] > self.before.seconds["q3"]

    @property
    def red(self) -> bool:
        return self.after.check not in ("", "ok")

    def cells(self) -> tuple[str, ...]:
        """The line of the table, in the columns of :data:`HEAD`."""
        before, after = (f"{1e3 * m.seconds['median']:.3g} ms" if m.seconds else "" for m in (self.before, self.after))
        return (
            self.after.group,
            self.after.contestant,
            before,
            after,
            "" if self.after.seconds is None else f"{self.ratio:.2f}",
            times(self.before.speedup.get("eager")),
            times(self.after.speedup.get("eager")),
            self.after.check if self.red else "REGRESSION" if self.regressed else "",
        )


def compared(before: Source, after: Source) -> list[Change]:
    """What both have timed, and what was timed before and is red after, in the order of the second.

    Raises:
        ValueError: where the two are of different devices, whose times say nothing of each other.
    """
    if before.machine.device != after.machine.device:
        raise ValueError(
            f"{before.name} is of {before.machine.device}, {after.name} of {after.machine.device}: they do not compare"
        )
    old = {_key(m): m for m in before.measurements if m.seconds}
    return [
        Change(old[_key(m)], m)
        for m in after.measurements
        if _key(m) in old and (m.seconds or m.check.startswith("RED"))
    ]


def _key(m: Measurement) -> tuple[str, str, int | None, str]:
    return m.suite, m.group, m.depth, m.contestant
