"""How far a block's Jacobian is from the identity: the survey's ``I + dF/dx`` in numbers.

For ``y = x + F(x)`` the Jacobian is :math:`J = I + \\partial F / \\partial x` (He et al. 2016, "Identity Mappings in
Deep Residual Networks", eq. 4 and 5), so that :math:`J - I` is what the block does besides passing its input on. Greff
et al. (2017, "Highway and Residual Networks Learn Unrolled Iterative Estimation") read a small one as the refinement of
an estimate; a block of a plain network has a :math:`J - I` as large as the identity itself.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..console import console, lacks, make_table, stages
from ..demo.data import digits
from ..select import use_backend
from .blocks import blocks_of
from .networks import KINDS, depth_network
from .output import KIND_STYLES, add_output_arguments, new_figure, save_figure, write
from .state import preserved

__all__ = ["JacobianIdentity", "add_arguments", "jacobian_identity", "run", "save_plot"]


@dataclass(frozen=True)
class JacobianIdentity:
    """The size of ``J - I``.

    Attributes:
        spectral: the 2-norm, the largest singular value, from below: what power iteration has reached.
        frobenius: an estimate of the Frobenius norm.
        dimension: of the square matrix, the number of elements of the block's input.
        iterations: that the power iteration took.
        converged: whether its last step changed less than the tolerance.
    """

    spectral: float
    frobenius: float
    dimension: int
    iterations: int
    converged: bool

    @property
    def rms(self) -> float:
        """The root mean square of the singular values, ``frobenius / sqrt(dimension)``: 1 for ``J = 0``."""
        return self.frobenius / self.dimension**0.5


def jacobian_identity(
    block: nn.Module, x: Tensor, *, iterations: int = 100, tolerance: float = 1e-3, probes: int = 8, seed: int = 0
) -> JacobianIdentity:
    """The spectral and the Frobenius norm of ``J - I``, where ``J`` is the Jacobian of ``block`` at ``x``.

    .. math:: \\sigma_{max}: \\; v \\leftarrow \\frac{(J-I)^T (J-I) v}{\\lVert \\cdot \\rVert}, \\;
        \\sigma = \\lVert (J-I) v \\rVert \\qquad
        \\lVert J - I \\rVert_F^2 = \\mathrm{E}_r \\lVert (J-I)^T r \\rVert^2, \\; r_i = \\pm 1

    The first is power iteration, the second Hutchinson's estimator (1990, "A Stochastic Estimator of the Trace of the
    Influence Matrix for Laplacian Smoothing Splines"), whose relative error falls as ``1 / sqrt(probes)``. Products
    with the transpose are the block's own backward. Products with ``J`` are forward-mode derivatives, which fused
    blocks do not have: they run as stock for those. The block is left as it was: gradients, running statistics, mode.

    Args:
        block: whose output has its input's shape; in training mode with batch norm, samples depend on each other, and
            ``J`` is of the whole batch.
        x: the point, ``[N, C, H, W]`` or of any other shape.
        iterations: of the power iteration, at most.
        tolerance: of the relative change of the norm, at which the iteration ends.
        probes: of the estimator.
        seed: of the random vectors.

    Raises:
        ValueError: where the output has another shape than the input, or there are less than one iteration or probe.
    """
    if iterations < 1 or probes < 1:
        raise ValueError(f"iterations and probes must be at least 1, got {iterations} and {probes}")
    generator = torch.Generator().manual_seed(seed)
    with preserved(block):
        matrix = _Difference(block, x)
        start = torch.randn(x.shape, generator=generator).to(x)
        spectral, taken, converged = _power_iteration(matrix, start, iterations, tolerance)
        squares = [_norm(matrix.transposed(_signs(x, generator))) ** 2 for _ in range(probes)]
    return JacobianIdentity(spectral, (sum(squares) / probes) ** 0.5, x.numel(), taken, converged)


class _Difference:
    """``J - I`` as a pair of products."""

    def __init__(self, block: nn.Module, x: Tensor) -> None:
        self._block = block
        self._x = x.detach()
        self._leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        with torch.enable_grad():
            self._out = block(self._leaf)
        if self._out.shape != x.shape:
            shapes = f"{tuple(x.shape)} to {tuple(self._out.shape)}"
            raise ValueError(f"block must keep its input's shape for J - I to exist, it goes from {shapes}")

    def times(self, v: Tensor) -> Tensor:
        """``(J - I) v``."""
        with torch.no_grad(), use_backend("stock"), forward_ad.dual_level():
            product = forward_ad.unpack_dual(self._block(forward_ad.make_dual(self._x, v))).tangent
            return -v if product is None else product - v

    def transposed(self, v: Tensor) -> Tensor:
        """``(J - I)^T v``."""
        (product,) = torch.autograd.grad(self._out, self._leaf, v, retain_graph=True, allow_unused=True)
        return -v if product is None else product - v


def _power_iteration(matrix: _Difference, v: Tensor, iterations: int, tolerance: float) -> tuple[float, int, bool]:
    """The norm, the iterations it took, and whether it settled."""
    sigma = 0.0
    for taken in range(1, iterations + 1):
        image = matrix.times(v / _norm(v))
        before, sigma = sigma, _norm(image)
        if abs(sigma - before) <= tolerance * sigma:
            return sigma, taken, True
        v = matrix.transposed(image)
    return sigma, iterations, False


def _norm(v: Tensor) -> float:
    return float(v.double().norm())


def _signs(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(2, x.shape, generator=generator).mul(2).sub(1).to(x)


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--depth", type=int, default=32, help="of the networks, 6n + 2 (default %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="images (default %(default)s)")
    parser.add_argument("--iterations", type=int, default=30, help="of the power iteration (default %(default)s)")
    add_output_arguments(parser, "jacobian-identity")


def run(args: Namespace) -> int:
    if lacks("jacobian-identity", "sklearn", "matplotlib"):
        return 2
    images = digits().train_images[: args.batch]
    found: dict[str, dict[int, JacobianIdentity]] = {}
    try:
        with stages(len(KINDS), "J - I") as begin:
            for kind in KINDS:
                begin(f"{kind}, {args.depth} layers")
                torch.manual_seed(0)
                found[kind] = _by_block(depth_network(kind, args.depth), images, args.iterations)
    except ValueError as error:
        console.print(f"fusedres jacobian-identity: {error}")
        return 2
    head = ("at the initial weights", "blocks", "spectral norm, median", "largest", "rms singular value, median")
    rows = [
        (
            kind,
            str(len(each)),
            f"{_median([j.spectral for j in each.values()]):.2f}",
            f"{max(j.spectral for j in each.values()):.2f}",
            f"{_median([j.rms for j in each.values()]):.2f}",
        )
        for kind, each in found.items()
    ]
    console.print(make_table(f"J - I of the blocks that keep the shape, {args.depth} layers", head, rows))
    results = {kind: {block: asdict(j) for block, j in each.items()} for kind, each in found.items()}
    write(args, {"depth": args.depth, "blocks": results}, lambda path: save_plot(path, found, args.depth))
    return 0


def _by_block(model: nn.Module, images: Tensor, iterations: int) -> dict[int, JacobianIdentity]:
    """For each block that keeps its input's shape, by its number from the input, at what reaches it."""
    inputs: dict[nn.Module, tuple[Tensor, torch.Size]] = {}
    found = blocks_of(model)
    hooks = [
        block.register_forward_hook(lambda module, args, out: inputs.update({module: (args[0], out.shape)}))
        for block in found.values()
    ]
    with torch.no_grad():
        model.train()(images)
    for hook in hooks:
        hook.remove()
    return {
        number: jacobian_identity(block, inputs[block][0], iterations=iterations)
        for number, block in enumerate(found.values(), 1)
        if inputs[block][0].shape == inputs[block][1]
    }


def _median(values: Sequence[float]) -> float:
    return float(torch.tensor(values).median())


def save_plot(path: Path, found: Mapping[str, Mapping[int, JacobianIdentity]], depth: int) -> None:
    """The two norms by block, one line per kind of network."""
    figure, (axes,) = new_figure(1, 2, (11.0, 4.6))
    figure.suptitle(f"distance of each block's Jacobian from the identity, {depth} layers, at initialisation")
    panels = (("largest singular value of J - I", "spectral"), ("rms singular value of J - I (1: J = 0)", "rms"))
    for axis, (title, field) in zip(axes, panels):
        for kind, each in found.items():
            axis.plot(list(each), [getattr(j, field) for j in each.values()], label=kind, **KIND_STYLES[kind])
        axis.set(title=title, xlabel="block (1 is next to the input)", yscale="log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.grid(alpha=0.3, which="both")
    axes[0].legend()
    save_figure(figure, path)
