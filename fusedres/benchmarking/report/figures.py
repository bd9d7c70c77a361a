"""Figures of results. Each draws what the files of one device hold, and is left out where they hold nothing for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

from ...analysis.memory import CAVEATS
from ...analysis.output import COLOURS, new_figure
from ..results import Measurement
from .source import Source, memory_of

__all__ = ["FIGURES", "Figure", "draw"]


@dataclass(frozen=True)
class Figure:
    """A figure that a page may have.

    Attributes:
        name: of its file.
        title: above it.
        wants: what it is drawn from, for a page that lacks it.
        draw: from a device's files to a matplotlib figure; ``None`` where they have nothing for it.
        note: what a reader must know of it.
    """

    name: str
    title: str
    wants: str
    draw: Callable[[Sequence[Source]], Any | None]
    note: str = ""


def draw(figure: Figure, sources: Sequence[Source], path: Path, digest: str) -> bool:
    """Writes a figure as SVG, or as PNG if the path says so; False where there is nothing to draw.

    Args:
        digest: of the data, which the file then carries, so that a test can tell a stale one.
    """
    drawn = figure.draw(sources)
    if drawn is None:
        return False
    import matplotlib
    from matplotlib import pyplot

    drawn.suptitle(figure.title)
    drawn.supxlabel(fill("; ".join(_provenance(sources)), 150, break_on_hyphens=False), fontsize=7, color="#555555")
    path.parent.mkdir(parents=True, exist_ok=True)
    # The same data give the same file: no date, and names from a fixed seed.
    with matplotlib.rc_context({"svg.hashsalt": "fusedres", "svg.fonttype": "none"}):
        options = {"metadata": {"Date": None, "Description": digest}} if path.suffix == ".svg" else {"dpi": 110}
        drawn.savefig(path, **options)
    pyplot.close(drawn)
    return True


def _provenance(sources: Sequence[Source]) -> list[str]:
    """Device, versions, commit and date, each once, with the files."""
    found: dict[str, list[str]] = {}
    for source in sources:
        found.setdefault(str(source.machine), []).append(source.name)
    return [f"{machine} ({', '.join(names)})" for machine, names in found.items()]


def _measured(sources: Sequence[Source], *suites: str) -> list[Measurement]:
    return [m for source in sources for m in source.measurements if m.suite in suites]


def _in_order(values: Iterable[Any]) -> list[Any]:
    """Each value once, in the order in which it first came."""
    return list(dict.fromkeys(values))


# ---------------------------------------------------------------------------------------------------------------------
# Contestants
# ---------------------------------------------------------------------------------------------------------------------

_KNOWN = {
    "fusedres": COLOURS["fused"],
    "eager": COLOURS["stock"],
    "eager channels_last": COLOURS["stock"],
    "torch.compile": COLOURS["inductor"],
    "stock": COLOURS["stock"],
    "patched": COLOURS["fused"],
    'patched, memory="low"': COLOURS["fused_low"],
    **{f"{form} (cuda)": COLOURS["fused"] for form in ("fusedres", "patched")},
    **{f"{form} (triton)": COLOURS["fused_low"] for form in ("fusedres", "patched")},
}
_OTHERS = ("#5b8c5a", "#b04a3a", "#7a5c99", "#3a9d9d", "#c9b23c", "#8c564b", "#e377c2", "#17384f")


def _colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each contestant, the same in every figure for those that are in most."""
    others = iter(_OTHERS * 4)
    return {name: _KNOWN.get(name) or next(others) for name in names}


def _bars(axis: Any, groups: Sequence[str], heights: dict[str, dict[str, float]], label: str) -> None:
    """Bars side by side: for each contestant one in every group that it has a number for."""
    width = min(0.84 / len(heights), 0.28)
    colours = _colours(heights)
    for place, name in enumerate(sorted(heights, key=_place)):
        values = heights[name]
        positions = [i + width * (place - (len(heights) - 1) / 2) for i, group in enumerate(groups) if group in values]
        numbers = [values[group] for group in groups if group in values]
        bars = axis.bar(positions, numbers, 0.92 * width, label=name, color=colours[name])
        axis.bar_label(bars, [_short(number) for number in numbers], fontsize=6, rotation=90, padding=2)
    axis.set_xticks(range(len(groups)), [_folded(group) for group in groups], fontsize=8)
    axis.set_xlim(-0.6, len(groups) - 0.4)
    axis.set_ylabel(label)
    axis.margins(y=0.1 + 0.08 * -(-len(heights) // 4))  # room for the numbers, and for a legend in four columns


def _place(name: str) -> int:
    """What is compared with comes first, ours last."""
    return 0 if name in ("eager", "stock") else 2 if name.startswith(("fusedres", "patched")) else 1


def _short(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def _folded(text: str) -> str:
    return "\n".join(fill(part, 16, break_on_hyphens=False) for part in text.split("\n"))


def _panels(count: int, columns: int = 2, size: tuple[float, float] = (6.2, 3.8)) -> tuple[Any, list[Any]]:
    """A figure of so many panels, and their axes."""
    columns = min(columns, count)
    rows = -(-count // columns)
    # Room for the line of provenance that is added below.
    figure, axes = new_figure(rows, columns, (size[0] * columns, size[1] * rows + 0.6))
    flat = list(axes.flat)
    for axis in flat[count:]:
        axis.set_visible(False)
    return figure, flat[:count]


def _legend(axis: Any, **options: Any) -> None:
    axis.legend(fontsize=7, frameon=False, **options)


# ---------------------------------------------------------------------------------------------------------------------
# The figures
# ---------------------------------------------------------------------------------------------------------------------


def _kind(m: Measurement) -> str:
    return f"{m.workload}, {m.dtype}{' autocast' if m.autocast else ''}"


def throughput(sources: Sequence[Source]) -> Any | None:
    """Images per second by network, a panel for each workload."""
    measured = [m for m in _measured(sources, "model") if m.images_per_second is not None]
    if not measured:
        return None
    kinds = _in_order(map(_kind, measured))
    figure, axes = _panels(len(kinds), size=(7.4, 3.8))
    for axis, kind in zip(axes, kinds):
        ours = [m for m in measured if _kind(m) == kind]
        name_of = lambda m: f"{m.subject}\nbatch {m.shape[0]}"  # noqa: E731
        heights: dict[str, dict[str, float]] = {}
        for m in ours:
            heights.setdefault(m.contestant, {})[name_of(m)] = m.images_per_second
        _bars(axis, _in_order(map(name_of, ours)), heights, "images/s")
        axis.set_title(kind, fontsize=9)
        _legend(axis, ncols=min(4, len(heights)), loc="upper right")
    return figure


_STOCK = ("eager", "vendor with passes around it", "reference")
"""What a block or an operation may have beside it; the first that it has counts. In a GPU's file operations have the
library's own formulas in plain PyTorch, or a convolution the vendor's with stock PyTorch's passes around it."""


def speedup_by_shape(sources: Sequence[Source]) -> Any | None:
    """Times faster than what stock PyTorch runs, by the shape of the input, a line for each block or operation and each
    of our forms."""
    measured = [m for m in _measured(sources, "block", "op") if m.ours and _beside(m)]
    if not measured:
        return None
    kind_of = lambda m: f"{m.suite}s: {_kind(m)}, beside {_beside(m)}"  # noqa: E731
    kinds = _in_order(map(kind_of, measured))
    figure, axes = _panels(len(kinds), size=(7.0, 4.2))
    for axis, kind in zip(axes, kinds):
        ours = [m for m in measured if kind_of(m) == kind]
        shapes = sorted(_in_order(m.shape for m in ours), key=_elements)
        for line in _in_order(map(_line, ours)):
            points = {m.shape: m.speedup[_beside(m)] for m in ours if _line(m) == line}
            known = [i for i, shape in enumerate(shapes) if shape in points]
            axis.plot(known, [points[shapes[i]] for i in known], "o-", ms=3, lw=1, label=line)
        axis.axhline(1.0, color="#999999", lw=0.8, ls="--")
        axis.set_xticks(
            range(len(shapes)), ["x".join(map(str, s)) for s in shapes], rotation=35, ha="right", fontsize=7
        )
        axis.set_ylabel("times faster")
        axis.set_title(kind, fontsize=9)
        _legend(axis, ncols=2)
    return figure


def _beside(m: Measurement) -> str:
    """What a speed-up is over; nothing where there is none."""
    return next((name for name in _STOCK if name in m.speedup), "")


def _line(m: Measurement) -> str:
    form = m.contestant.removeprefix("fusedres").strip(" ()")
    return ", ".join(part for part in (m.subject, m.variant, form) if part)


def _elements(shape: Sequence[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def memory(sources: Sequence[Source]) -> Any | None:
    """Bytes that autograd keeps, and peak memory, by network and form."""
    found = [m for m in memory_of(sources) if not m.missing]
    panels = [
        (field, title)
        for field, title in (("saved", "kept for backward"), ("peak", "peak beyond parameters and input"))
        if any(getattr(m, field) for m in found)
    ]
    if not panels:
        return None
    figure, axes = _panels(len(panels), size=(8.0, 4.2))
    for axis, (field, title) in zip(axes, panels):
        name_of = lambda m: f"{m.model}\n{m.dtype}\nbatch {m.shape[0]}"  # noqa: E731
        heights: dict[str, dict[str, float]] = {}
        known = [m for m in found if getattr(m, field)]
        for m in known:
            heights.setdefault(m.variant, {})[name_of(m)] = getattr(m, field) / 1e6
        _bars(axis, _in_order(map(name_of, known)), heights, "MB")
        axis.set_title(title, fontsize=9)
        _legend(axis)
    return figure


def roofline(sources: Sequence[Source]) -> Any | None:
    """Operations per second over operations per byte, under what the device can do at best."""
    measured = [m for m in _measured(sources, "op", "block", "model") if m.moved and m.flops and m.seconds]
    roofs = [source.results.roofline for source in sources if source.results.roofline]
    if not measured or not roofs:
        return None
    roof = roofs[0]
    figure, (axis,) = _panels(1, size=(8.4, 5.2))
    intensities = [m.flops / m.moved for m in measured]
    ridges = [arithmetic / roof["bandwidth"] for arithmetic in roof["arithmetic"].values()]
    low, high = min(*intensities, *ridges) / 3, 3 * max(*intensities, *ridges)
    for dtype, arithmetic in roof["arithmetic"].items():
        ridge = arithmetic / roof["bandwidth"]
        points = sorted({low, min(max(ridge, low), high), high})
        heights = [min(arithmetic, x * roof["bandwidth"]) / 1e9 for x in points]
        axis.plot(points, heights, color="#444444", lw=1)
        axis.annotate(dtype, (points[-1], heights[-1]), fontsize=7, ha="right", va="bottom")
    names = _in_order(m.contestant for m in measured)
    colours = _colours(names)
    markers = dict(zip(("op", "block", "model"), "os^"))
    for name in names:
        for suite, marker in markers.items():
            points = [m for m in measured if m.contestant == name and m.suite == suite]
            if points:
                axis.scatter(
                    [m.flops / m.moved for m in points],
                    [m.flops_per_second / 1e9 for m in points],
                    s=16,
                    marker=marker,
                    color=colours[name],
                    alpha=0.8,
                    label=f"{name}, {suite}s",
                )
    axis.set(xscale="log", yscale="log", xlabel="FLOP per byte that must move", ylabel="GFLOP/s")
    axis.set_title(f"{roof['name']}: {roof['bandwidth'] / 1e9:.0f} GB/s", fontsize=9)
    _legend(axis, loc="lower right")
    return figure


def first_step(sources: Sequence[Source]) -> Any | None:
    """Seconds to the end of the first step, on a logarithmic scale."""
    measured = [m for m in _measured(sources, "first step") if m.first_step is not None]
    measured = measured or [m for m in _measured(sources, "model") if m.first_step is not None]
    if not measured:
        return None
    figure, (axis,) = _panels(1, size=(9.0, 4.2))
    name_of = lambda m: f"{m.subject}\n{_kind(m)}\nbatch {m.shape[0]}"  # noqa: E731
    heights: dict[str, dict[str, float]] = {}
    for m in measured:
        heights.setdefault(m.contestant, {})[name_of(m)] = m.first_step
    _bars(axis, _in_order(map(name_of, measured)), heights, "seconds")
    axis.set_yscale("log")
    _legend(axis)
    return figure


def growth(sources: Sequence[Source]) -> Any | None:
    """Time and kept bytes of a training step, over batch and over depth."""
    measured = [m for m in _measured(sources, "growth") if m.seconds]
    variants = [v for v in ("batch", "depth") if any(m.variant == v for m in measured)]
    if not variants:
        return None
    panels = [(variant, field) for variant in variants for field in ("time", "kept for backward")]
    figure, axes = _panels(len(panels))
    for axis, (variant, field) in zip(axes, panels):
        ours = [m for m in measured if m.variant == variant]
        names = _in_order(m.contestant for m in ours)
        colours = _colours(names)
        for name in names:
            points = sorted((_x(m), _y(m, field)) for m in ours if m.contestant == name)
            axis.plot(*zip(*points), "o-", ms=4, color=colours[name], label=name)
        axis.set(xlabel=variant, ylabel="ms" if field == "time" else "MB", ylim=(0, None), xlim=(0, None))
        axis.set_title(f"{ours[0].subject}, {field}", fontsize=9)
        _legend(axis)
    return figure


def _x(m: Measurement) -> int:
    return m.shape[0] if m.variant == "batch" else m.depth


def _y(m: Measurement, field: str) -> float:
    return 1e3 * m.seconds["median"] if field == "time" else (m.saved or 0) / 1e6


FIGURES = (
    Figure("throughput", "Throughput by network", "measurements of whole networks", throughput),
    Figure("speedup", "Speed-up by shape", "measurements of blocks or operations beside stock", speedup_by_shape),
    Figure("memory", "Memory of a training step", "counted or measured memory", memory, CAVEATS),
    Figure("roofline", "Roofline", "the device's peaks, and bytes and operations of what was timed", roofline),
    Figure("first-step", "Time to the first training step", "first steps: `python -m fusedres growth`", first_step),
    Figure("growth", "Cost as batch and depth grow", "steps of growing cost: `python -m fusedres growth`", growth),
)
"""In the order in which a page has them."""
