"""The demo's one figure: the loss curves on each other, and the speeds beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from .training import Training

__all__ = ["save_figure"]

_COLOURS = {"eager": "#8a8a8a", "torch.compile": "#d08a2e", "fusedres": "#2a6fb0"}


def save_figure(
    path: Path, trainings: Mapping[str, Training], speeds: Mapping[str, Mapping[str, float]], caption: str
) -> None:
    """Writes the figure.

    Args:
        trainings: the runs by name; the first is drawn broad, the others thin on top of it.
        speeds: images/s by workload and contestant.
        caption: the machine, below the figure.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    _draw_losses(left, trainings)
    _draw_speeds(right, speeds)
    figure.supxlabel(caption, fontsize=8, color="#666666")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw_losses(axes, trainings: Mapping[str, Training]) -> None:
    styles: Sequence[dict] = (
        {"color": _COLOURS["eager"], "linewidth": 5, "alpha": 0.5},
        {"color": _COLOURS["fusedres"], "linewidth": 1.2},
        {"color": "black", "linewidth": 0.8, "linestyle": ":"},
    )
    for (name, training), style in zip(trainings.items(), styles):
        axes.plot(training.losses, label=name, **style)
    axes.set(title="CIFAR ResNet-20 on handwritten digits", xlabel="step", ylabel="training loss")
    axes.legend()


def _draw_speeds(axes, speeds: Mapping[str, Mapping[str, float]]) -> None:
    for place, (name, colour) in enumerate(_COLOURS.items()):
        found = [(i, values[name]) for i, values in enumerate(speeds.values()) if name in values]
        if not found:
            continue
        positions = [i + 0.27 * (place - 1) for i, _ in found]
        bars = axes.bar(positions, [value for _, value in found], 0.25, label=name, color=colour)
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
    axes.set(title="ResNet-50, batch of 8 photographs, 224 x 224", ylabel="images/s")
    axes.set_xticks(range(len(speeds)), list(speeds), fontsize=8)
    axes.legend()
