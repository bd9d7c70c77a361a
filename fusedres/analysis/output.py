"""What the commands of the analyses share: options, the file of results, the figure."""

from __future__ import annotations

import json
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..console import console

__all__ = ["COLOURS", "KIND_STYLES", "add_output_arguments", "new_figure", "save_figure", "shape_argument", "write"]

COLOURS = {"stock": "#8a8a8a", "inductor": "#d08a2e", "fused": "#2a6fb0", "fused_low": "#7fb2dd", "other": "#5b8c5a"}
"""One colour per contestant in every figure."""

KIND_STYLES = {
    "plain": {"color": "#b04a3a", "marker": "s", "markersize": 3},
    "residual": {"color": "#2a6fb0", "marker": "o", "markersize": 3},
    "pre-activation": {"color": "#5b8c5a", "marker": "^", "markersize": 3},
}
"""One line per kind of network in every figure."""


def add_output_arguments(parser: ArgumentParser, name: str) -> None:
    """``--json FILE`` and ``--out FILE``."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        default=Path(f"fusedres-{name}.png"),
        help="the figure (default %(default)s)",
    )


def write(args: Namespace, results: Any, draw: Callable[[Path], None]) -> None:
    """Writes the results, if they were asked for, and the figure, and says where."""
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=2) + "\n")
        console.print(f"results: {args.json.resolve()}")
    draw(args.out)
    console.print(f"figure: {args.out.resolve()}")


def new_figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (8.0, 4.8), **options: Any) -> Any:
    """A matplotlib figure and an array ``[rows, columns]`` of axes, without a window system."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **options)


def save_figure(figure: Any, path: Path) -> None:
    """Writes the figure and forgets it."""
    from matplotlib import pyplot

    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def shape_argument(text: str) -> tuple[int, ...]:
    """``"8,3,224,224"`` or ``"8x3x224x224"`` as a tuple; for ``argparse``."""
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if len(shape) != 4 or min(shape) < 1:
        raise ArgumentTypeError(f"a shape is N,C,H,W, four positive numbers, got {text!r}")
    return shape
