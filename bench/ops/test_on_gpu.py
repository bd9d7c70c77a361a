"""The CUDA kernels on a GPU, beside stock PyTorch and a copy that moves as many bytes: the bandwidth that there is.

``pytest bench/ops/test_on_gpu.py`` on a GPU measures; elsewhere stock PyTorch and the copies run once, as a smoke test.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.ops.contestants import check, nbytes
from bench.ops.gpu import DEVICE, graphed, on_device, repeats
from fusedres import select
from fusedres.benchmarking.shapes import name_of
from fusedres.ops.activations import RELU
from fusedres.ops.registry import OPS
from fusedres.testing import channels_last

SHAPES = ((256, 256, 56, 56), (256, 64, 56, 56), (64, 64, 56, 56), (32, 256, 14, 14), (8, 2048, 7, 7), (2, 64, 7, 7))
"""From far beyond the L2 cache to launch-bound."""

WEIGHTS = [0.1, 0.2, -0.3, 0.4, 0.05]
EPS = 1e-5


class Row(NamedTuple):
    """An op with its arguments, what stock PyTorch runs in its place, and the bytes that one pass must move."""

    op: str
    arguments: list
    eager: Callable[[], object]
    touched: int


def rows(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Row]:
    y, side, grad, logits = (on_device(channels_last(shape, dtype, seed)) for seed in range(4))
    gamma, beta, mean, var = on_device(torch.ones(4, shape[1])).unbind(0)
    count = y.numel() / y.shape[1]
    norm = OPS["bn_norm"].reference(OPS["bn_stats"].reference(y), count, gamma, beta, None, None, 0.0, EPS)
    relu = [RELU.code, RELU.param]
    joined = [y, norm, side, None, *relu]
    both = [grad, *joined, False, count, True, False, True]
    y_leaf, side_leaf = y.detach().requires_grad_(), side.detach().requires_grad_()
    out = torch.relu(F.batch_norm(y_leaf, None, None, gamma, beta, True, 0.0, EPS) + side_leaf)
    stages = [side, grad, logits, side, grad]

    def eager_norm() -> Tensor:
        return F.batch_norm(y, mean, var, gamma, beta, False, 0.0, EPS)

    def eager_combine() -> Tensor:
        result = y
        for stage, weight in zip(stages, WEIGHTS):
            result = torch.add(result, stage, alpha=weight)
        return result

    def eager_gate() -> Tensor:
        m = torch.sigmoid(logits)
        return m * y + (1 - m) * side

    def eager_training() -> Tensor:
        return torch.relu(F.batch_norm(y, mean, var, gamma, beta, True, 0.1, EPS) + side)

    def eager_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, (y_leaf, side_leaf), grad, retain_graph=True)

    def eager_stats() -> tuple[Tensor, ...]:
        return torch.batch_norm_stats(y, EPS) if y.is_cuda else torch.var_mean(y, (0, 2, 3))

    def eager_join_stats() -> tuple[Tensor, ...]:
        z = torch.relu(eager_norm() + side)
        return torch.batch_norm_stats(z, EPS) if z.is_cuda else torch.var_mean(z, (0, 2, 3))

    bn_join = [y, gamma, beta, mean.clone(), var.clone(), 0.1, EPS, side, None, *relu]
    return {
        "statistics": Row("bn_stats", [y], eager_stats, nbytes(y)),
        "join": Row("join", joined, lambda: torch.relu(eager_norm() + side), nbytes(y, side, y)),
        "join with statistics": Row("join_stats", joined, eager_join_stats, nbytes(y, side, y)),
        "norm and join": Row("bn_join", bn_join, eager_training, nbytes(y, side, y)),
        "join backward": Row("join_backward", both, eager_backward, nbytes(grad, y, side, y, side)),
        "gated join": Row("gated_join", [y, logits, side, None], eager_gate, nbytes(y, logits, side, y)),
        "Runge-Kutta": Row("rk_combine", [y, stages, WEIGHTS], eager_combine, nbytes(y, y) + nbytes(*stages)),
    }


NAMES = ("statistics", "join", "join with statistics", "norm and join", "join backward", "gated join", "Runge-Kutta")


@pytest.mark.parametrize("contestant", ["copy", "eager", "cuda"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of, indirect=True)
def test_on_gpu(race, smoke, shape, dtype, name, contestant):
    if DEVICE == "cpu" and not smoke:
        pytest.skip("needs a GPU")
    row = rows(shape, dtype)[name]
    if contestant == "copy":
        source = torch.empty(row.touched // 2, dtype=torch.uint8, device=DEVICE)
        target = torch.empty_like(source)
        call = graphed(lambda: target.copy_(source))
    elif contestant == "eager":
        call = graphed(row.eager)
    else:
        if reason := select.why_not("cuda", DEVICE, dtype):
            pytest.skip(reason)
        op = OPS[row.op]
        check(op, "cuda", row.arguments)
        call = graphed(lambda: op.overload("cuda")(*row.arguments))
    race(f"{name} {name_of(shape)} {dtype} on a GPU", call, dtype=dtype, touched=repeats() * row.touched)
