"""The degradation of plain networks with depth, and its absence in residual ones.

He et al. (2016, "Deep Residual Learning for Image Recognition", figures 1 and 6): past some depth, a plain network's
*training* error rises with depth, although the deeper network could copy the shallower one; with identity shortcuts it
does not. Here on scikit-learn's handwritten digits, in minutes.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from ..console import console, lacks, make_table, stages
from ..demo.data import Digits, digits
from ..demo.training import fit
from .networks import KINDS, depth_network
from .output import KIND_STYLES, add_output_arguments, new_figure, save_figure, write

__all__ = ["DepthRun", "add_arguments", "degradation", "run", "save_plot", "small_digits"]


@dataclass(frozen=True)
class DepthRun:
    """One network's training.

    Attributes:
        losses: the mean training loss of each epoch.
        errors: the share of training images that each epoch classified wrongly, each before its own update.
    """

    kind: str
    depth: int
    losses: tuple[float, ...]
    errors: tuple[float, ...]


def degradation(
    depths: Sequence[int] = (20, 56, 110),
    kinds: Sequence[str] = ("plain", "residual"),
    *,
    epochs: int = 8,
    data: Digits | None = None,
    seed: int = 0,
    begin: Callable[[str], None] = lambda stage: None,
) -> tuple[DepthRun, ...]:
    """Trains a network of every kind and depth on the same images, from the same seed, by the same schedule.

    The networks are those of :mod:`fusedres.analysis.networks`: the same layers and initial weights with and without
    the skip, patched.

    Args:
        depths: ``6n + 2`` each.
        kinds: of ``"plain"``, ``"residual"``, ``"pre-activation"``.
        epochs: over the training images.
        data: images ``[N, C, H, W]`` and classes; by default scikit-learn's digits, 8 x 8.
        begin: is told what comes next, for a progress bar.

    Raises:
        ValueError: for an unknown kind, a depth that is not ``6n + 2``, or less than one epoch.
    """
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    data = small_digits() if data is None else data
    runs = []
    for depth in depths:
        for kind in kinds:
            begin(f"{kind}, {depth} layers")
            runs.append(_train(kind, depth, epochs, data, seed))
    return tuple(runs)


def small_digits() -> Digits:
    """scikit-learn's digits in their own size."""
    data = digits()
    return replace(data, **{name: F.avg_pool2d(getattr(data, name), 2) for name in ("train_images", "test_images")})


def _train(kind: str, depth: int, epochs: int, data: Digits, seed: int) -> DepthRun:
    torch.manual_seed(seed)
    channels, classes = data.train_images.shape[1], int(data.train_classes.max()) + 1
    model = depth_network(kind, depth, in_channels=channels, num_classes=classes)
    steps = list(fit(model.to(memory_format=torch.channels_last), data, epochs))
    each = len(steps) // epochs
    by_epoch = [steps[i : i + each] for i in range(0, len(steps), each)]
    losses, errors = (
        tuple(sum(getattr(step, field) for step in epoch) / each for epoch in by_epoch) for field in ("loss", "error")
    )
    return DepthRun(kind, depth, losses, errors)


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--depths", type=int, nargs="+", default=[20, 56, 110], help="6n + 2 (default 20 56 110)")
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=["plain", "residual"], help="default: the first two"
    )
    parser.add_argument("--epochs", type=int, default=8, help="over 1437 images (default %(default)s)")
    add_output_arguments(parser, "degradation")


def run(args: Namespace) -> int:
    if lacks("degradation", "sklearn", "matplotlib"):
        return 2
    try:
        with stages(len(args.depths) * len(args.kinds), "degradation") as begin:
            runs = degradation(args.depths, args.kinds, epochs=args.epochs, begin=begin)
    except ValueError as error:
        console.print(f"fusedres degradation: {error}")
        return 2
    head = ("network", "layers", "first epoch's error", "last epoch's error", "last epoch's loss")
    rows = [(r.kind, str(r.depth), f"{r.errors[0]:.1%}", f"{r.errors[-1]:.1%}", f"{r.losses[-1]:.3f}") for r in runs]
    console.print(make_table(f"training error on handwritten digits, {args.epochs} epochs", head, rows))
    write(args, [asdict(r) for r in runs], lambda path: save_plot(path, runs))
    return 0


def save_plot(path: Path, runs: Sequence[DepthRun]) -> None:
    """Training error by epoch, a panel per kind of network; and the last epoch's by depth."""
    kinds = list(dict.fromkeys(r.kind for r in runs))
    figure, (axes,) = new_figure(1, len(kinds) + 1, (4.4 * (len(kinds) + 1), 4.4), sharey=True)
    figure.suptitle("training error on handwritten digits")
    for axis, kind in zip(axes, kinds):
        of_kind = [r for r in runs if r.kind == kind]
        for r, width in zip(of_kind, _widths(len(of_kind))):
            axis.plot(
                _epochs(r), [100 * e for e in r.errors], lw=width, color=KIND_STYLES[kind]["color"], label=r.depth
            )
        axis.set(title=kind, xlabel="epoch")
        axis.legend(title="layers")
        last = [(r.depth, 100 * r.errors[-1]) for r in of_kind]
        axes[-1].plot(*zip(*last), label=kind, **{**KIND_STYLES[kind], "markersize": 6})
    axes[0].set_ylabel("training error, %")
    axes[-1].set(title="last epoch", xlabel="layers", ylim=(0, None))
    axes[-1].legend()
    for axis in axes:
        axis.grid(alpha=0.3)
    save_figure(figure, path)


def _epochs(r: DepthRun) -> range:
    return range(1, len(r.errors) + 1)


def _widths(count: int) -> list[float]:
    """Deeper is broader."""
    return [0.8 + 2.2 * i / max(count - 1, 1) for i in range(count)]
