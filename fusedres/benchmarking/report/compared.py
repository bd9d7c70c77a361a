"""Two files of results, contestant by contestant: what became slower, takes more memory, or is there no more."""

from __future__ import annotations

from dataclasses import dataclass

from ..results import Measurement, MemoryUse, quantity, times
from .source import Source

__all__ = ["HEAD", "TOLERATED", "Change", "MemoryChange", "compared", "dropped"]

TOLERATED = 1.10
"""A median that is longer by more than this is a regression, unless the quartiles of the two overlap; so is an amount
of memory that is larger by more."""

HEAD = ("", "contestant", "before", "after", "after / before", "over eager before", "after", "")


@dataclass(frozen=True)
class Change:
    """A contestant of a group that was timed before, and what became of it."""

    before: Measurement
    after: Measurement

    @property
    def ratio(self) -> float:
        """The median after over that before."""
        return self.after.seconds["median"] / self.before.seconds["median"]

    @property
    def regressed(self) -> bool:
        """Whether it is slower by more than :data:`TOLERATED`, beyond the spread of either, needs as much more memory,
        or its check turned red; or it is ours and cannot run any more, which time had nothing to do with."""
        if self.red or self.grown:
            return True
        if self.after.seconds is None:
            return self.after.ours and not self.after.missing.startswith("no time")
        return self.slower

    @property
    def slower(self) -> bool:
        return self.ratio > TOLERATED and self.after.seconds["q1"] > self.before.seconds["q3"]

    @property
    def grown(self) -> list[str]:
        return _grown(self.before, self.after)

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
            self._verdict(),
        )

    def _verdict(self) -> str:
        if self.red:
            return self.after.check
        if self.after.seconds is None:
            return f"GONE: {self.after.missing or 'not timed'}"
        return f"REGRESSION: {', '.join(['time'] * self.slower + self.grown)}" if self.regressed else ""


@dataclass(frozen=True)
class MemoryChange:
    """A form of a network whose memory was measured before, and what became of it."""

    before: MemoryUse
    after: MemoryUse

    @property
    def regressed(self) -> bool:
        return bool(self.after.missing or self.grown)

    @property
    def grown(self) -> list[str]:
        return _grown(self.before, self.after)

    def cells(self) -> tuple[str, ...]:
        """The line of the table, in the columns of :data:`HEAD`: peaks, or what is kept where there are none."""
        field = "peak" if self.before.peak and self.after.peak else "saved"
        before, after = (getattr(use, field) for use in (self.before, self.after))
        verdict = f"GONE: {self.after.missing}" if self.after.missing else ""
        return (
            f"{self.after.model}, {self.after.dtype}, batch {self.after.shape[0]}: {field} bytes",
            self.after.variant,
            quantity(before / 1e6, "MB"),
            "" if self.after.missing else quantity(after / 1e6, "MB"),
            "" if self.after.missing or not before else f"{after / before:.2f}",
            "",
            "",
            verdict or (f"REGRESSION: {', '.join(self.grown)}" if self.grown else ""),
        )


def _grown(before: Measurement | MemoryUse, after: Measurement | MemoryUse) -> list[str]:
    """The amounts of memory that are larger by more than is tolerated, in words."""
    found = []
    for name, field in (("saved for backward", "saved"), ("peak", "peak")):
        was, now = getattr(before, field), getattr(after, field)
        if was and now and now > TOLERATED * was:
            found.append(f"{name} {quantity(was / 1e6, 'MB')} to {quantity(now / 1e6, 'MB')}")
    return found


def compared(before: Source, after: Source) -> list[Change | MemoryChange]:
    """What was timed before and what became of it, in the order of the second file; then the same of memory. What the
    second file does not have at all is in neither.

    Raises:
        ValueError: where the two are of different devices, whose times say nothing of each other.
    """
    if before.machine.device != after.machine.device:
        raise ValueError(
            f"{before.name} is of {before.machine.device}, {after.name} of {after.machine.device}: they do not compare"
        )
    old = {_key(m): m for m in before.measurements if m.seconds}
    used = {_form(use): use for use in before.memory if not use.missing}
    return [
        *(Change(old[_key(m)], m) for m in after.measurements if _key(m) in old),
        *(MemoryChange(used[_form(use)], use) for use in after.memory if _form(use) in used),
    ]


def dropped(before: Source, after: Source) -> list[str]:
    """What was measured before and is not in the second file, in words: a shorter run has less in it."""
    there = set(map(_key, after.measurements))
    forms = set(map(_form, after.memory))
    return [
        *(f"{m.group}, {m.contestant}" for m in before.measurements if m.seconds and _key(m) not in there),
        *(f"memory of {u.model}, {u.variant}" for u in before.memory if not u.missing and _form(u) not in forms),
    ]


def _key(m: Measurement) -> tuple[str, str, int | None, str]:
    return m.suite, m.group, m.depth, m.contestant


def _form(use: MemoryUse) -> tuple[str, str, tuple[int, ...], str]:
    return use.model, use.dtype, use.shape, use.variant
