"""The norm of the gradient at every block's output: what a skip does for it.

With a skip, the gradient that reaches layer ``l`` of a pre-activation network is (He et al. 2016, "Identity Mappings in
Deep Residual Networks", eq. 5)

.. math:: \\frac{\\partial E}{\\partial x_l} = \\frac{\\partial E}{\\partial x_L}
    \\Bigl(1 + \\frac{\\partial}{\\partial x_l} \\sum_{i=l}^{L-1} F(x_i)\\Bigr)

so a term of it arrives unchanged at any depth; without a skip it is a product of Jacobians, which vanishes, or, where
batch norm rescales every layer, explodes towards the input (Yang et al. 2019, "A Mean Field Theory of Batch
Normalization"). Veit et al. (2016,
"Residual Networks Behave Like Ensembles of Relatively Shallow Networks") unravel the same sum into paths.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..console import console, lacks, make_table, stages
from ..demo.data import digits
from .blocks import blocks_of
from .networks import KINDS, depth_network
from .output import KIND_STYLES, add_output_arguments, new_figure, save_figure, write
from .state import preserved

__all__ = ["GradientFlow", "add_arguments", "gradient_flow", "run", "save_plot"]


@dataclass(frozen=True)
class GradientFlow:
    """The gradient's norm at the output of each block, from the input's side to the loss's."""

    paths: tuple[str, ...]
    norms: tuple[float, ...]

    @property
    def first_to_last(self) -> float:
        """The norm at the first block over that at the last: far below 1 it vanishes, far above it explodes."""
        return self.norms[0] / self.norms[-1] if self.norms[-1] else float("nan")


def gradient_flow(
    model: nn.Module,
    x: Tensor,
    loss: Callable[[Any], Tensor] | None = None,
    *,
    blocks: tuple[type[nn.Module], ...] | None = None,
) -> GradientFlow:
    """The 2-norm of the loss's gradient at every block's output, by full backward (pre-)hooks.

    The hooks are on the blocks alone, so that fused and patched ones run as they do in training. The model is left as
    it was: gradients, running statistics and mode.

    Args:
        model: stock, patched, or made of ``fusedres.nn`` blocks, in the mode that is to be studied.
        x: its input.
        loss: from the model's output to a scalar; by default the sum of all its elements.
        blocks: the classes that are blocks, where :func:`~fusedres.analysis.blocks.blocks_of` should not choose.

    Raises:
        ValueError: where no gradient reaches a block, or the model has none of ``blocks``.
    """
    squares: dict[str, float] = {}

    def watch(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, grad_output: tuple[Tensor | None, ...]) -> None:
            # A block that is called several times has several outputs.
            total = sum(float(g.double().square().sum()) for g in grad_output if g is not None)
            squares[path] = squares.get(path, 0.0) + total

        return hook

    found = blocks_of(model, blocks)
    handles = [module.register_full_backward_pre_hook(watch(path)) for path, module in found.items()]
    try:
        with preserved(model), torch.enable_grad():
            output = model(x)
            (_sum(output) if loss is None else loss(output)).backward()
    finally:
        for handle in handles:
            handle.remove()
    if missing := [path for path in found if path not in squares]:
        raise ValueError(f"no gradient reaches {', '.join(missing)}")
    return GradientFlow(tuple(found), tuple(squares[path] ** 0.5 for path in found))


def _sum(output: Any) -> Tensor:
    return sum(t.sum() for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point())


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------

_BATCH = 64


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--depths", type=int, nargs="+", default=[20, 56, 110], help="6n + 2 (default 20 56 110)")
    parser.add_argument("--eval", action="store_true", help="norms with running statistics, as the survey's code does")
    add_output_arguments(parser, "gradient-flow")


def run(args: Namespace) -> int:
    if lacks("gradient-flow", "sklearn", "matplotlib"):
        return 2
    data = digits()
    x, classes = data.train_images[:_BATCH], data.train_classes[:_BATCH]
    flows: dict[tuple[str, int], GradientFlow] = {}
    try:
        with stages(len(args.depths) * len(KINDS), "gradient flow") as begin:
            for depth in args.depths:
                for kind in KINDS:
                    begin(f"{kind}, {depth} layers")
                    torch.manual_seed(0)
                    model = depth_network(kind, depth).train(not args.eval)
                    flows[kind, depth] = gradient_flow(model, x, lambda y: F.cross_entropy(y, classes))
    except ValueError as error:
        console.print(f"fusedres gradient-flow: {error}")
        return 2
    head = ("network at its initial weights", "layers", "first block", "last block", "first / last")
    rows = [
        (kind, str(depth), f"{flow.norms[0]:.2e}", f"{flow.norms[-1]:.2e}", f"{flow.first_to_last:.2e}")
        for (kind, depth), flow in flows.items()
    ]
    console.print(make_table("norm of the gradient at a block's output", head, rows))
    results = [{"kind": kind, "depth": depth, **asdict(flow)} for (kind, depth), flow in flows.items()]
    write(args, results, lambda path: save_plot(path, flows))
    return 0


def save_plot(path: Path, flows: Mapping[tuple[str, int], GradientFlow]) -> None:
    """One panel per depth, one line per kind of network."""
    depths = list(dict.fromkeys(depth for _, depth in flows))
    figure, axes = new_figure(1, len(depths), (4.6 * len(depths), 4.6), sharey=True)
    figure.suptitle("gradient at the output of each block, at initialisation")
    for axis, depth in zip(axes[0], depths):
        for (kind, _), flow in ((key, flow) for key, flow in flows.items() if key[1] == depth):
            axis.semilogy(range(1, len(flow.norms) + 1), flow.norms, label=kind, **KIND_STYLES[kind])
        axis.set(title=f"{depth} layers", xlabel="block (1 is next to the input)")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("2-norm of the loss's gradient")
    axes[0, 0].legend()
    save_figure(figure, path)
