"""Tables of results, as Markdown: README's headline tables and those of ``docs/benchmarks.md``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from .. import architectures
from ..results import CONTRARY, HEAD, Measurement, MemoryUse, Row, quantity, ratio_of_times, times
from .source import Source

__all__ = ["headline", "markdown", "provenance", "result_files", "tables_of"]

Table = tuple[str, Sequence[str], list[tuple[str, ...]]]
"""A title, the head and the lines."""


def result_files(root: Path) -> list[Path]:
    """The committed files that README's tables come from: for each machine its full run, or the quick one where there
    is no other, that of the architectures, and a GPU's."""
    files = []
    for folder in sorted(path for path in (root / "bench" / "results").glob("*") if path.is_dir()):
        files += [path for path in (folder / "full.json", folder / "quick.json") if path.exists()][:1]
        files += [path for path in (folder / "architectures.json", folder / "gpu.json") if path.exists()]
    return files


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table."""
    rows = [tuple(head), tuple("---" for _ in head), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def provenance(source: Source, prefix: str = "") -> str:
    """The machine, and the file with a link to it; where its commit is not all that was measured, this too.

    Args:
        prefix: of the link.
    """
    machine = source.machine
    changed = f". **{machine.commit}**: measured with changes that were not committed" if machine.changed else ""
    return f"{machine} ([{source.name}]({prefix}{source.name})){changed}"


def headline(source: Source, prefix: str = "") -> str:
    """A file's headline rows, or a line for each workload of each network that it has measured without such rows; above
    them where they are from. Nothing where it has neither.

    Args:
        prefix: of the link to the file.
    """
    if rows := source.results.rows:
        of_architectures = Path(source.name).stem == "architectures"
        head, cells = (architectures.HEAD, architectures.cells) if of_architectures else (HEAD, Row.cells)
        table = markdown(head, map(cells, rows))
    elif lines := _network_lines(source):
        table = markdown(_NETWORK_HEAD, lines)
    else:
        return ""
    return f"{provenance(source, prefix)}{_CONTRARY_MEANS if CONTRARY in table else ''}\n\n{table}"


_CONTRARY_MEANS = (
    f". {CONTRARY} a ratio is taken within a turn before its median, and here the medians themselves say the contrary: "
    "the two are closer than this machine was steady."
)


_NETWORK_HEAD = (
    "",
    "eager",
    "torch.compile",
    "fastest other",
    "fusedres",
    "images/s",
    "over eager",
    "over compile",
    "over fastest other",
    "check",
)


def _network_lines(source: Source) -> list[tuple[str, ...]]:
    groups: dict[str, dict[str, Measurement]] = {}
    for m in source.measurements:
        if m.suite == "model":
            groups.setdefault(m.group, {})[m.contestant] = m
    return [_network_line(group, found) for group, found in groups.items()]


def _network_line(group: str, found: dict[str, Measurement]) -> tuple[str, ...]:
    """The fastest of our forms beside the others, of which some form, such as a graph of eager, may be the fastest."""
    timed = sorted((m for m in found.values() if m.seconds), key=lambda m: m.seconds["median"])
    ours, other = (next((m for m in timed if m.ours is whose), None) for whose in (True, False))
    red = [f"{m.contestant}: {m.check}" for m in found.values() if m.check not in ("", "ok")]
    stock = [_brief(found.get(name)) for name in ("eager", "torch.compile")]
    if ours is None:
        return (group, *stock, _brief(other, named=True), *[""] * 5, "; ".join(red))
    beside = ("eager", "torch.compile", other.contestant if other else "")
    numbers = (_brief(ours, named=True), _number(ours.images_per_second), *(_over(ours, found.get(n)) for n in beside))
    return (group, *stock, _brief(other, named=True), *numbers, "; ".join(red) or ours.check)


def _over(ours: Measurement, other: Measurement | None) -> str:
    if other is None or other.seconds is None:
        return ""
    medians = (m.seconds["median"] for m in (other, ours))
    return ratio_of_times(ours.speedup.get(other.contestant), *medians)


def _brief(m: Measurement | None, named: bool = False) -> str:
    if m is None or m.seconds is None:
        return "" if m is None else m.missing
    return _seconds(m.seconds["median"]) + (f" ({m.contestant})" if named else "")


# ---------------------------------------------------------------------------------------------------------------------
# Measurements
# ---------------------------------------------------------------------------------------------------------------------

_TITLES = {
    "model": "Whole networks",
    "block": "Blocks",
    "op": "Single operations",
    "ode": "Differential equations",
    "growth": "Cost as batch and depth grow",
    "first step": "Time to the first step",
    "ddp": "Side by side, and in DistributedDataParallel",
    "compiled": "Patched, and compiled as well",
    "overhead": "One small image",
}

_HEAD = ("", "contestant", "time", "images/s", "over eager", "over compile", "GB/s", "TFLOP/s", "of roofline", "check")
_GROWTH_HEAD = ("", "contestant", "time", "over eager", "saved for backward", "check")
_FIRST_HEAD = ("", "contestant", "first step")
_ENGINES_HEAD = ("", "contestant", "time", "images/s", "over", "check")
_MEMORY_HEAD = ("", "form", "saved for backward", "of stock", "peak", "of stock")


def tables_of(source: Source) -> list[Table]:
    """The tables of a file: measurements by suite, then memory."""
    found: list[Table] = []
    for suite, title in _TITLES.items():
        measured = [m for m in source.measurements if m.suite == suite]
        if measured:
            head, cells = {
                "growth": (_GROWTH_HEAD, _growth_cells),
                "first step": (_FIRST_HEAD, _first_cells),
                "ddp": (_ENGINES_HEAD, _engine_cells),
                "compiled": (_ENGINES_HEAD, _engine_cells),
                "overhead": (_ENGINES_HEAD, _engine_cells),
            }.get(suite, (_HEAD, _cells))
            found.append((title, head, [cells(m) for m in measured]))
    if source.memory:
        found.append(("Memory of a training step", _MEMORY_HEAD, _memory_lines(source.memory)))
    return found


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1:
            return quantity(seconds * factor, unit)
    return quantity(seconds * 1e9, "ns")


def _median(m: Measurement) -> str:
    """The median with its quartiles, or why there is none."""
    if m.seconds is None:
        return m.missing
    low, high = (100 * (m.seconds[quartile] / m.seconds["median"] - 1) for quartile in ("q1", "q3"))
    return f"{_seconds(m.seconds['median'])} ({low:+.0f}%, {high:+.0f}%)"


def _number(value: float | None, scale: float = 1.0, digits: int = 1) -> str:
    return "" if value is None else f"{value / scale:.{digits}f}"


def _cells(m: Measurement) -> tuple[str, ...]:
    return (
        m.group,
        m.contestant,
        _median(m),
        _number(m.images_per_second),
        times(m.speedup.get("eager")),
        times(m.speedup.get("torch.compile")),
        _number(m.bytes_per_second, 1e9, 0),
        _number(m.flops_per_second, 1e12) if m.flops else "",
        "" if m.of_roofline is None else f"{100 * m.of_roofline:.0f}%",
        m.check,
    )


def _engine_cells(m: Measurement) -> tuple[str, ...]:
    over = ", ".join(f"{name}: {times(ratio)}" for name, ratio in m.speedup.items())
    return (m.group, m.contestant, _median(m), _number(m.images_per_second), over, m.check)


def _growth_cells(m: Measurement) -> tuple[str, ...]:
    depth = f", depth {m.depth}" if m.depth is not None else ""
    saved = "" if m.saved is None else quantity(m.saved / 1e6, "MB")
    return (m.group + depth, m.contestant, _median(m), times(m.speedup.get("eager")), saved, m.check)


def _first_cells(m: Measurement) -> tuple[str, ...]:
    return (m.group, m.contestant, m.missing or _seconds(m.first_step))


def _memory_lines(memory: Sequence[MemoryUse]) -> list[tuple[str, ...]]:
    stock = {(m.model, m.shape, m.dtype): m for m in memory if m.variant == "stock" and not m.missing}
    return [_memory_cells(m, stock.get((m.model, m.shape, m.dtype))) for m in memory]


def _memory_cells(m: MemoryUse, stock: MemoryUse | None) -> tuple[str, ...]:
    cells: list[str] = []
    for field in ("saved", "peak"):
        value, base = getattr(m, field), getattr(stock, field) if stock else 0
        cells += [quantity(value / 1e6, "MB") if value else "", f"{value / base:.2f}" if value and base else ""]
    if m.missing:
        cells[0] = m.missing
    batch = "x".join(map(str, m.shape)) if len(m.shape) > 1 else f"batch {m.shape[0]}"
    return (f"{m.model}, {m.dtype}, {batch}", m.variant, *cells)
