"""Very deep networks train, in little memory: some real steps of networks of about a thousand layers.

He et al. (2016) train 1202 layers with post-activation blocks ("Deep Residual Learning for Image Recognition", section
4.2) and 1001 with pre-activation ("Identity Mappings in Deep Residual Networks", section 4). Each network here runs in
a process of its own, whose peak resident set is what it needs, everything included.
"""

from __future__ import annotations

import re
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from .. import models
from ..console import console, lacks, make_table, stages
from ..demo.data import digits
from ..demo.training import fit
from ..patch import patch
from .output import COLOURS, add_output_arguments, new_figure, save_figure, write
from .peak import in_child

__all__ = ["Deep", "add_arguments", "deep_training", "run", "save_plot"]


@dataclass(frozen=True)
class Deep:
    """Some steps of one network.

    Attributes:
        losses: of every step.
        seconds: that every step took.
        peak: the process's largest resident set, in bytes.
        params: how many parameters the network has.
    """

    network: str
    losses: tuple[float, ...]
    seconds: tuple[float, ...]
    peak: int
    params: int

    @property
    def falls(self) -> bool:
        """Whether the last third of the losses is below the first third, in the median."""
        third = max(len(self.losses) // 3, 1)
        return median(self.losses[-third:]) < median(self.losses[:third])


def deep_training(network: str, steps: int = 20, *, batch: int = 32, rate: float = 0.001, memory: str = "auto") -> Deep:
    """Trains a network on scikit-learn's digits, 16 x 16, for a few steps, in a process of its own.

    Args:
        network: a function of ``fusedres.models`` and the depth that it is called with: ``"cifar_resnet(1202)"``.
        steps: how many.
        batch: images per step.
        rate: the learning rate; small, since so deep a network begins with logits far too large, which He et al. meet
            with a warm-up.
        memory: as in :func:`fusedres.patch`.

    Raises:
        ValueError: for a network that does not exist or does not take this depth.
        RuntimeError: where the training fails, out of memory for one.
    """
    with torch.device("meta"):
        _factory(network)()  # a wrong depth is told here
    child = in_child(_train, network, steps, batch, rate, memory, torch.get_num_threads())
    losses, seconds, params = child.result
    return Deep(network, losses, seconds, child.peak, params)


def _factory(network: str) -> Callable[[], torch.nn.Module]:
    match = re.fullmatch(r"(\w+)\((\d+)\)", network.replace(" ", ""))
    if match is None or not callable(getattr(models, match[1], None)):
        raise ValueError(f"network must be a function of fusedres.models with a depth, not {network!r}")
    factory, depth = getattr(models, match[1]), int(match[2])
    return lambda: factory(depth, in_channels=1, fused=False)


def _train(
    network: str, steps: int, batch: int, rate: float, memory: str, threads: int
) -> tuple[tuple[float, ...], tuple[float, ...], int]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = _factory(network)().to(memory_format=torch.channels_last)
    patch(model, memory=memory)
    data = digits()
    epochs = -(-steps // (len(data.train_images) // batch))
    losses, seconds = [], []
    start = perf_counter()
    for step in islice(fit(model, data, epochs, batch=batch, rate=rate), steps):
        losses.append(step.loss)
        seconds.append(perf_counter() - start)
        start = perf_counter()
    return tuple(losses), tuple(seconds), sum(p.numel() for p in model.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------

_NETWORKS = ["cifar_preresnet(1001)", "cifar_resnet(1202)"]


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("networks", nargs="*", default=_NETWORKS, help=f"(default {' '.join(_NETWORKS)})")
    parser.add_argument("--steps", type=int, default=20, help="of the training (default %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="images per step (default %(default)s)")
    parser.add_argument("--rate", type=float, default=0.001, help="learning rate (default %(default)s)")
    parser.add_argument("--memory", choices=("auto", "low"), default="auto", help="as in fusedres.patch")
    parser.add_argument("--limit", type=float, default=8.0, metavar="GIB", help="of peak memory (default %(default)s)")
    add_output_arguments(parser, "depth")


def run(args: Namespace) -> int:
    """Exit status 1 where a loss does not fall or a peak is above the limit."""
    if lacks("depth", "sklearn", "matplotlib"):
        return 2
    found = []
    try:
        with stages(len(args.networks), "depth") as begin:
            for network in args.networks:
                begin(network)
                settings = {"batch": args.batch, "rate": args.rate, "memory": args.memory}
                found.append(deep_training(network, args.steps, **settings))
    except (ValueError, RuntimeError) as error:
        console.print(f"fusedres depth: {error}")
        return 2
    head = ("network", "parameters", "first loss", "last loss", "falls", "peak memory", "within", "seconds per step")
    console.print(make_table(f"{args.steps} steps of {args.batch} digits", head, [_row(d, args.limit) for d in found]))
    write(args, [asdict(d) for d in found], lambda path: save_plot(path, found, args.limit, args.batch))
    return 0 if all(d.falls and d.peak <= args.limit * 2**30 for d in found) else 1


def _row(d: Deep, limit: float) -> tuple[str, ...]:
    return (
        d.network,
        f"{d.params / 1e6:.1f} million",
        f"{d.losses[0]:.3f}",
        f"{d.losses[-1]:.3f}",
        "yes" if d.falls else "no",
        f"{d.peak / 2**30:.2f} GiB",
        f"{limit:g} GiB" if d.peak <= limit * 2**30 else f"no: {limit:g} GiB",
        f"{median(d.seconds):.2f}",
    )


_LINES = (COLOURS["fused"], COLOURS["other"], COLOURS["inductor"], COLOURS["stock"])


def save_plot(path: Path, found: Sequence[Deep], limit: float, batch: int) -> None:
    """The losses, and the peak memory beside its limit."""
    figure, ((left, right),) = new_figure(1, 2, (11.0, 4.6), width_ratios=(2, 1))
    for i, d in enumerate(found):
        left.plot(range(1, len(d.losses) + 1), d.losses, "o-", ms=3, color=_LINES[i % 4], label=d.network)
    left.set(title=f"training loss on handwritten digits, {batch} per step", xlabel="step", ylabel="cross-entropy")
    left.grid(alpha=0.3)
    left.legend()
    peaks = [d.peak / 2**30 for d in found]
    bars = right.bar(
        [d.network.replace("(", "\n(") for d in found], peaks, 0.5, color=[_LINES[i % 4] for i in range(len(found))]
    )
    right.bar_label(
        bars, [f"{p:.2f} GiB,\n{median(d.seconds):.2f} s per step" for p, d in zip(peaks, found)], fontsize=8
    )
    right.axhline(limit, color="black", ls="--", lw=1)
    right.set(title="peak resident memory", ylabel=f"GiB (line: {limit:g})", ylim=(0, 1.15 * max(limit, *peaks)))
    right.set_xlim(-0.8, len(found) - 0.2)
    save_figure(figure, path)
