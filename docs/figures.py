"""Draws what is one pass in each block of ``fusedres.nn``, from its description, as ``docs/blocks/<name>.svg``.

``python docs/figures.py`` writes them again; a test compares. A column of boxes is what runs in training, top to
bottom; a dot is a tensor that autograd keeps until backward, in units of the block's narrowest one at equal height and
width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

from torch import nn

from fusedres import nn as blocks
from fusedres.block import Act, Conv, Dense, Dropout, DropPath, Norm, SqueezeExcite, Step
from fusedres.ode.tableau import Tableau
from fusedres.ops.activations import IDENTITY

__all__ = ["FIGURES", "draw"]

CONVOLUTION, STOCK, FUSED, SMALL = (
    ("#dbe8f6", "#2a6fb0"),
    ("#fbe5cc", "#c9761a"),
    ("#dff0dc", "#3f8f3a"),
    ("#eeeeee", "#888888"),
)
GIVEN = ("#ffffff", "#888888")  # the user's own function
KEPT = "#7a4fa3"


@dataclass
class Box:
    """A step that runs.

    Attributes:
        keeps: channels of the tensor that it makes, where autograd keeps that.
    """

    label: str
    colours: tuple[str, str]
    keeps: int = 0


# ---------------------------------------------------------------------------------------------------------------------
# What runs
# ---------------------------------------------------------------------------------------------------------------------


def _conv_label(conv: nn.Conv2d) -> str:
    size = "x".join(map(str, conv.kernel_size))
    return f"conv {size}" + (f", {conv.groups} groups" if conv.groups > 1 else "")


def _is_read_raw(steps: tuple[Step, ...], i: int) -> bool:
    """Whether backward reads the tensor that step ``i`` makes: a norm, a gain or a convolution takes it."""
    return i + 1 < len(steps) and not isinstance(steps[i + 1], (Act, DropPath))


def stock(module: nn.Module, steps: tuple[Step, ...], width: int) -> Iterator[Box]:
    """PyTorch: a pass or two for every step."""
    for i, step in enumerate(steps):
        inner = _is_read_raw(steps, i)
        if isinstance(step, Conv):
            conv = module.get_submodule(step.path)
            width = conv.out_channels
            yield Box(_conv_label(conv), CONVOLUTION, width * inner)
        elif isinstance(step, Norm):
            yield Box("statistics", STOCK)
            yield Box("normalise", STOCK, width * (inner and isinstance(steps[i + 1], SqueezeExcite)))
        elif isinstance(step, Act):
            yield Box("ReLU", STOCK, width)
        elif isinstance(step, Dropout):
            yield Box("dropout (and its mask)", STOCK, width)
        elif isinstance(step, SqueezeExcite):
            yield Box("mean of every sample", STOCK)
            yield Box("fc, ReLU, fc, sigmoid", SMALL)
            yield Box("scale", STOCK)
        else:
            yield Box("drop samples", STOCK)


def fused(module: nn.Module, steps: tuple[Step, ...], width: int, end: list[str]) -> Iterator[Box]:
    """Here: statistics where a norm needs them, and one pass for all that is pending when a convolution or the end
    (``end``: what the join adds) reads it."""
    pending: list[str] = []
    for i, step in enumerate(steps):
        if isinstance(step, Conv):
            if pending:
                yield Box(" + ".join(pending), FUSED)
            conv = module.get_submodule(step.path)
            pending, width = [], conv.out_channels
            yield Box(_conv_label(conv), CONVOLUTION, width * _is_read_raw(steps, i))
        elif isinstance(step, Norm):
            squeezes = any(isinstance(s, SqueezeExcite) for s in steps[i + 1 : i + 2])
            yield Box("statistics" + (" of every sample" if squeezes else ""), FUSED)
            pending.append("affine")
        elif isinstance(step, Act):
            pending.append("ReLU")
        elif isinstance(step, SqueezeExcite):
            if not pending:
                yield Box("mean of every sample", FUSED)
            yield Box("fc, ReLU, fc, sigmoid", SMALL)
            pending.append("gate")
        else:
            pending.append("mask")
    if pending or end:
        yield Box(" + ".join(pending + end), FUSED)


def columns(module: nn.Module, width: int) -> list[tuple[str, int, list[Box]]]:
    """Both columns: title, width of the input, boxes."""
    if isinstance(module, blocks.HighwaySkip):
        return [("Stock, training", width, _gated_stock(width)), ("fusedres, training", width, _gated_fused(width))]
    if isinstance(module, blocks.ODEBlock):
        method = module.settings.tableau
        titles = (f"{who}, a step of {method.name}" for who in ("Stock", "fusedres"))
        return [(title, width, _stages(method, fuses)) for title, fuses in zip(titles, (False, True))]
    block = module._block
    if isinstance(block, Dense):
        return [("Stock, training", width, _dense_stock(module, block)), _dense_fused(module, block, width)]
    joins = block.shortcut is not None
    after = [] if block.act == IDENTITY else ["ReLU"]
    plain = [*stock(module, block.branch, width), *(Box(label, STOCK) for label in [*(["add"] * joins), *after])]
    mine = list(fused(module, block.branch, width, (["add"] if joins else []) + after))
    return [("Stock, training", width, plain), ("fusedres, training", width, mine)]


def _gated_stock(width: int) -> list[Box]:
    boxes = [Box("F(x)", GIVEN, width), Box("conv 1x1", CONVOLUTION), Box("sigmoid", STOCK, width)]
    return [*boxes, Box("g * F(x)", STOCK), Box("1 - g", STOCK, width), Box("(1 - g) * x", STOCK), Box("add", STOCK)]


def _gated_fused(width: int) -> list[Box]:
    boxes = [Box("F(x)", GIVEN, width), Box("conv 1x1", CONVOLUTION, width)]
    return [*boxes, Box("sigmoid + mix", FUSED)]


def _stages(method: Tableau, fuses: bool) -> list[Box]:
    """Every stage's function, and the passes that make its argument; with the adjoint method nothing inside is kept."""
    boxes = []
    for i, row in enumerate((*method.a[1:], method.b), 1):
        boxes.append(Box(f"k{i} = f(t, y)", GIVEN))
        terms = sum(weight != 0 for weight in row)
        if fuses:
            boxes.append(Box("combine", FUSED))
        else:
            boxes += [Box(f"scale and add, term {j}", STOCK) for j in range(1, terms + 1)]
    return boxes


def _running(module: nn.Module, steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """The steps without a dropout that drops nothing."""
    return tuple(s for s in steps if not isinstance(s, Dropout) or module.get_submodule(s.path).p)


def _dense_stock(module: nn.Module, dense: Dense) -> list[Box]:
    boxes = []
    for i, layer in enumerate(dense.layers, 1):
        width = module.get_submodule(layer[0].path).num_features
        boxes.append(Box(f"concatenate for layer {i}", STOCK, width))
        boxes += stock(module, _running(module, layer), width)
    return [*boxes, Box("concatenate", STOCK)]


def _dense_fused(module: nn.Module, dense: Dense, width: int) -> tuple[str, int, list[Box]]:
    """The pass that copies channels into their slice takes their statistics, once for all layers to come."""
    boxes = [Box("copy into the buffer + statistics", FUSED)]
    for layer in map(partial(_running, module), dense.layers):
        _, *rest = fused(module, layer, width, [])
        new = module.get_submodule(layer[-1].path).out_channels
        boxes += [*rest, Box("copy into its slice + statistics", FUSED, new)]
    return "fusedres, training", width, boxes


# ---------------------------------------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------------------------------------


def draw(module: nn.Module, width: int) -> str:
    """The figure as SVG."""
    both = columns(module, width)
    unit = min([width, *(box.keeps for _, _, boxes in both for box in boxes if box.keeps)])
    height = 150 + 40 * max(len(boxes) for _, _, boxes in both)
    name = type(module).__name__
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {height}" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="14" role="img" '
        f'aria-label="Passes over memory in {name}, stock and fused">',
        f'  <rect width="760" height="{height}" fill="#ffffff"/>',
    ]
    for x, (title, kept, boxes) in zip((30, 400), both):
        lines += [f'  <g transform="translate({x} 0)">', *_column(title, kept, boxes, unit), "  </g>"]
    return "\n".join([*lines, *_legend(height - 22), "</svg>", ""])


def _column(title: str, width: int, boxes: list[Box], unit: int) -> Iterator[str]:
    yield _text(125, 34, title, "#222222", ' font-size="17" font-weight="bold" text-anchor="middle"')
    yield _text(125, 70, "x", "#444444", ' text-anchor="middle"')
    yield from _dot(66, width, unit)
    total, y = width, 80
    for box in boxes:
        fill, stroke = box.colours
        yield f'    <rect x="0" y="{y}" width="250" height="32" rx="5" fill="{fill}" stroke="{stroke}"/>'
        yield _text(125, y + 21, box.label, "#222222", ' text-anchor="middle"')
        if box.keeps:
            yield from _dot(y + 16, box.keeps, unit)
        total, y = total + box.keeps, y + 40
    passes = sum(box.colours in (STOCK, FUSED) for box in boxes)
    counted = f"{passes} passes beside the convolutions, {_units(total, unit)} units kept"
    yield _text(0, y + 22, counted, "#444444", ' font-size="13"')


def _dot(y: int, width: int, unit: int) -> Iterator[str]:
    yield f'    <circle cx="266" cy="{y}" r="5" fill="{KEPT}"/>'
    yield _text(277, y + 5, _units(width, unit), KEPT, ' font-size="13"')


def _units(width: int, unit: int) -> str:
    return f"{float(Fraction(width, unit)):.3g}"


def _text(x: int, y: int, text: str, fill: str, attributes: str = "") -> str:
    return f'    <text x="{x}" y="{y}"{attributes} fill="{fill}">{text}</text>'


def _legend(y: int) -> Iterator[str]:
    entries = ((30, CONVOLUTION, "convolution"), (150, STOCK, "a pass, stock"), (280, FUSED, "a pass, fused"))
    for x, (fill, stroke), label in (*entries, (410, SMALL, "a few numbers")):
        yield f'  <rect x="{x}" y="{y - 12}" width="22" height="15" rx="3" fill="{fill}" stroke="{stroke}"/>'
        yield "  " + _text(x + 30, y, label, "#444444", ' font-size="13"').strip()
    yield f'  <circle cx="551" cy="{y - 5}" r="5" fill="{KEPT}"/>'
    yield "  " + _text(563, y, "kept until backward, in units", "#444444", ' font-size="13"').strip()


FIGURES: dict[str, tuple[nn.Module, int]] = {
    "residual": (blocks.ResidualBlock(8), 8),
    "bottleneck": (blocks.BottleneckBlock(16, 16), 16),
    "resnext_bottleneck": (blocks.ResNeXtBottleneckBlock(32, 32, 1, 4, 4), 32),
    "preact_residual": (blocks.PreActResidualBlock(8), 8),
    "preact_bottleneck": (blocks.PreActBottleneckBlock(16, 16), 16),
    "wide": (blocks.WideResidualBlock(8, 8, dropout=0.3), 8),
    "resnext": (blocks.ResNeXtBlock(32, 32, 1, 4, 4), 32),
    "se": (blocks.SEBlock(16, 4), 16),
    "se_bottleneck": (blocks.SEBottleneckBlock(16, 16, 1, 4), 16),
    "dense": (blocks.DenseBlock(3, 16, 8), 16),
    "dense_bottleneck": (blocks.DenseBottleneckBlock(2, 16, 8), 16),
    "transition": (blocks.Transition(16), 16),
    "gated": (blocks.HighwaySkip(nn.Identity(), 8), 8),
    "ode": (blocks.ODEBlock(nn.Identity(), method="rk4", adjoint=True), 8),
}
"""Each figure's block, and the channels of its input."""


def main() -> None:
    for name, (module, width) in FIGURES.items():
        (Path(__file__).parent / "blocks" / f"{name}.svg").write_text(draw(module, width))


if __name__ == "__main__":
    main()
