"""Parameters and multiply-adds, per block and in total; and the survey's table of block types with its cells filled.

He et al. (2016, "Deep Residual Learning for Image Recognition", table 1) count a network's cost in multiply-adds of its
convolutions and linear layers; so does this. Norms, activations and additions are not counted.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import nn as blocks
from ..console import console, lacks, make_table, stages
from ..explain_cli import load_model
from ..patch import unpatch
from ..select import use_backend
from .blocks import blocks_of
from .output import COLOURS, add_output_arguments, new_figure, save_figure, shape_argument, write
from .phantom import Recorder, phantom_input, phantom_model

__all__ = ["BlockType", "Count", "ParamsFlops", "add_arguments", "block_types", "params_flops", "run", "save_plot"]

OUTSIDE = "(outside of blocks)"


@dataclass(frozen=True)
class Count:
    """How many parameters, and how many multiply-adds a forward of the given input takes."""

    params: int
    multiply_adds: int

    def __add__(self, other: Count) -> Count:
        return Count(self.params + other.params, self.multiply_adds + other.multiply_adds)


@dataclass(frozen=True)
class ParamsFlops:
    """The counts of each block by path, with :data:`OUTSIDE` last, and their sum."""

    shape: tuple[int, ...]
    blocks: dict[str, Count]

    @property
    def total(self) -> Count:
        return sum(self.blocks.values(), Count(0, 0))

    def to_dict(self) -> dict[str, Any]:
        return {
            "shape": list(self.shape),
            "blocks": {path: asdict(count) for path, count in self.blocks.items()},
            "total": asdict(self.total),
        }


def params_flops(model: nn.Module, input_shape: Sequence[int]) -> ParamsFlops:
    """Parameters and multiply-adds of ``model`` for one forward of an input ``[N, C, H, W]`` (or of any other shape).

    .. math:: \\text{convolution: } N K P Q \\cdot R S \\, C / groups \\qquad \\text{linear: } N \\cdot in \\cdot out

    The model's code runs on phantom tensors, so that nothing is computed and no activation takes memory. A parameter
    that several blocks share counts in the first of them.

    Args:
        model: stock or patched, or made of ``fusedres.nn`` blocks; it is not changed.
        input_shape: of the one input.

    Raises:
        ValueError: for a model that reads a tensor's value in its forward.
    """
    phantom = phantom_model(model).eval()
    unpatch(phantom)
    found = blocks_of(phantom)
    recorder = Recorder(found)
    with torch.no_grad(), use_backend("stock"), recorder.attributing():
        phantom(phantom_input(tuple(input_shape), _dtype_of(phantom)))
    seen: set[int] = set()
    counts = {
        path: Count(_new_params(module, seen), sum(c.flops for c in recorder.calls if c.block == path) // 2)
        for path, module in found.items()
    }
    outside = sum(c.flops for c in recorder.calls if c.block is None) // 2
    counts[OUTSIDE] = Count(_new_params(phantom, seen), outside)
    return ParamsFlops(tuple(input_shape), counts)


def _dtype_of(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _new_params(module: nn.Module, seen: set[int]) -> int:
    new = [p for p in module.parameters() if id(p) not in seen]
    seen.update(id(p) for p in new)
    return sum(p.numel() for p in new)


# ---------------------------------------------------------------------------------------------------------------------
# The survey's table
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockType:
    """A row of the survey's table.

    Attributes:
        structure: as the survey writes it.
        weights: the formula of the convolutions' weights in C, which the survey's empty cell leaves out; times the
            number of output pixels, the multiply-adds.
        per_c2: that formula's factor of C^2.
        params: counted for the given channels: convolutions without bias, and the norms.
        multiply_adds: counted for the given channels and size.
        used_for: as the survey says.
    """

    name: str
    structure: str
    weights: str
    per_c2: float
    params: int
    multiply_adds: int
    used_for: str


def block_types(channels: int = 256, size: int = 56) -> tuple[BlockType, ...]:
    """The survey's comparison of block types for an identity block with ``channels`` channels on ``size x size``.

    Its table has columns for parameters and for computation; both are empty for the basic block and the bottleneck, and
    say "as above" for pre-activation, by which they mean the basic block. They follow from the structure, and are
    counted here on the blocks themselves::

        basic         3 * 3 * C * C * 2                        = 18 C^2
        bottleneck    C * C/4 + 3 * 3 * C/4 * C/4 + C/4 * C    = 17/16 C^2 = 1.0625 C^2

    A comment in the survey's code has the bottleneck's sum right but its value as 0.19 C^2, and the basic block's as
    2 C^2; the sums are 1.0625 C^2 and 18 C^2.

    Raises:
        ValueError: for channels that are not a multiple of four.
    """
    if channels % 4:
        raise ValueError(f"channels must be a multiple of 4, got {channels}")
    kinds = (
        ("BasicBlock", "3x3 -> 3x3", "2 * 9 C^2", blocks.ResidualBlock(channels, bias=False), "small models"),
        (
            "Bottleneck",
            "1x1 -> 3x3 -> 1x1",
            "C^2 / 4 + 9 C^2 / 16 + C^2 / 4",
            blocks.BottleneckBlock(channels, channels, bias=False),
            "large models",
        ),
        (
            "Pre-activation",
            "BN-ReLU-Conv x 2",
            "2 * 9 C^2",
            blocks.PreActResidualBlock(channels, bias=False),
            "very deep networks",
        ),
    )
    rows = []
    for name, structure, weights, block, used_for in kinds:
        count = params_flops(block, (1, channels, size, size)).total
        matrices = sum(m.weight.numel() for m in block.modules() if isinstance(m, nn.Conv2d))
        rows.append(
            BlockType(name, structure, weights, matrices / channels**2, count.params, count.multiply_adds, used_for)
        )
    return tuple(rows)


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default="resnet50", help="as for explain (default %(default)s)")
    parser.add_argument("--shape", type=shape_argument, default=(1, 3, 224, 224), help="N,C,H,W (default 1,3,224,224)")
    parser.add_argument("--channels", type=int, default=256, help="of the block types compared (default %(default)s)")
    add_output_arguments(parser, "params-flops")


def run(args: Namespace) -> int:
    if lacks("params-flops", "matplotlib"):
        return 2
    try:
        with stages(2, "params-flops") as begin:
            begin(args.model)
            counts = params_flops(load_model(args.model), args.shape)
            begin("block types")
            types = block_types(args.channels)
    except ValueError as error:
        console.print(f"fusedres params-flops: {error}")
        return 2
    title = f"{args.model}, {'x'.join(map(str, args.shape))}"
    rows = [(path or "(the model)", *_cells(c, counts.total)) for path, c in counts.blocks.items()]
    head = (title, "parameters", "share", "multiply-adds", "share")
    console.print(make_table("", head, [*rows, ("total", *_cells(counts.total, counts.total))]))
    console.print(_types_table(types, args.channels))
    results = {"model": args.model, **counts.to_dict(), "block_types": [asdict(t) for t in types]}
    write(args, results, lambda path: save_plot(path, counts, types, title))
    return 0


def _cells(count: Count, total: Count) -> tuple[str, ...]:
    return (
        f"{count.params:,}",
        f"{count.params / max(total.params, 1):.1%}",
        f"{count.multiply_adds:,}",
        f"{count.multiply_adds / max(total.multiply_adds, 1):.1%}",
    )


def _types_table(types: Sequence[BlockType], channels: int) -> Any:
    head = ("type", "structure", "weights", "of C^2", f"parameters, C={channels}", "multiply-adds, 56x56", "for")
    rows = [
        (t.name, t.structure, t.weights, f"{t.per_c2:g}", f"{t.params:,}", f"{t.multiply_adds:,}", t.used_for)
        for t in types
    ]
    caption = "Identity blocks of C channels, no biases; parameters with the norms. Multiply-adds: weights times pixels"
    return make_table("", head, rows, caption)


def save_plot(path: Path, counts: ParamsFlops, types: Sequence[BlockType], title: str) -> None:
    """Parameters and multiply-adds by block, and the block types beside each other."""
    figure, (axes,) = new_figure(1, 3, (15.0, 5.0))
    figure.suptitle(title)
    names = [name or "(the model)" for name in counts.blocks]
    panels = (("parameters", "params", 1e6, "million"), ("multiply-adds of a forward", "multiply_adds", 1e9, "billion"))
    for axis, (panel, field, unit, unit_name) in zip(axes, panels):
        axis.barh(names, [getattr(c, field) / unit for c in counts.blocks.values()], color=COLOURS["fused"])
        axis.set(title=f"{panel}: {getattr(counts.total, field) / unit:.3g} {unit_name} in all", xlabel=unit_name)
        axis.invert_yaxis()
        axis.tick_params(axis="y", labelsize=8 if len(names) <= 24 else 4)
    bars = axes[2].bar([t.name for t in types], [t.per_c2 for t in types], color=COLOURS["stock"])
    axes[2].bar_label(bars, [f"${t.weights}$\n$= {t.per_c2:g} C^2$" for t in types], fontsize=8)
    axes[2].set(title="weights of an identity block of C channels", ylabel="in units of $C^2$", ylim=(0, 22))
    save_figure(figure, path)
