"""The CUDA kernels on a GPU, beside stock PyTorch and a copy that moves as many bytes: the bandwidth that there is.

``pytest bench/ops/test_on_gpu.py`` on a GPU measures; elsewhere stock PyTorch and the copies run once, as a smoke test.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.ops.contestants import Contest, check, group_of, nbytes
from bench.ops.gpu import DEVICE, graphed, on_device, repeats
from bench.shapes import ON_GPU
from fusedres import select
from fusedres.benchmarking.rotation import copies
from fusedres.ops.activations import RELU
from fusedres.ops.registry import OPS
from fusedres.testing import channels_last

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
@pytest.mark.parametrize("shape", ON_GPU, indirect=True)
def test_on_gpu(race, smoke, shape, dtype, name, contestant):
    if DEVICE == "cpu" and not smoke:
        pytest.skip("needs a GPU")

    group = group_of(name, dtype, shape, "on a GPU")

    def contest():
        row = rows(shape, dtype)[name]
        # So many that none of a call's operands is left in the L2 cache; in one graph.
        others = (rows(shape, dtype)[name] for _ in range(copies(row.touched, DEVICE, most=repeats()) - 1))
        sets = [row, *others] if DEVICE != "cpu" else [row]
        op = OPS[row.op]
        room = [torch.empty(2, row.touched // 2, dtype=torch.uint8, device=DEVICE) for _ in sets]
        calls = {
            "copy": lambda _: graphed([partial(target.copy_, source) for target, source in room]),
            "eager": lambda _: graphed([each.eager for each in sets]),
            "cuda": lambda _: graphed([partial(op.overload("cuda"), *each.arguments) for each in sets]),
        }
        checks = {"cuda": lambda: check(op, "cuda", row.arguments)}
        absent = {"cuda": select.why_not("cuda", DEVICE, dtype)}
        return Contest(group, (), calls, checks, repeats() * row.touched, absent=absent, memory=False)

    race(group, contestant, contest, DEVICE)
