"""ODEBlock against torchdiffeq: the same steps of the same function, forward and backward."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch

from bench.shapes import ODE_STATES, SMOKE_STATE
from fusedres.benchmarking.agreement import verdict
from fusedres.benchmarking.memory import peak_allocated, saved_bytes
from fusedres.benchmarking.peers.torchdiffeq import Torchdiffeq
from fusedres.benchmarking.race import Entrant
from fusedres.benchmarking.referee import Referee
from fusedres.benchmarking.results import Measurement
from fusedres.benchmarking.rotation import copies
from fusedres.models.ode import ODEFunction
from fusedres.nn import ODEBlock
from fusedres.testing import channels_last

# The first step is given, since torchdiffeq differentiates its own choice of it where gradients go through the steps.
METHODS = {
    "euler": {"step_size": 1 / 8},
    "rk4": {"step_size": 1 / 4},
    "dopri5": {"first_step": 1 / 8, "rtol": 1e-3, "atol": 1e-3},
}
PEER = Torchdiffeq()
CONTESTANTS = (PEER.name, "fusedres")


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("adjoint", [False, True], ids=["through the steps", "adjoint"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", ODE_STATES)
def test_ode_block(enter, smoke, shape, method, adjoint, contestant):
    shape = SMOKE_STATE if smoke else shape
    variant = f"{method}, {'adjoint' if adjoint else 'through the steps'}"
    group = Measurement("ode", "ODE block", "train step", "float32", shape, "", variant=variant)
    enter(group, contestant, lambda: entrants(group, method, adjoint, memory=not smoke))


class Solved(ODEBlock):
    """The block, solved by torchdiffeq."""

    def forward(self, x):
        return PEER.prepare(self, x)(x)


def entrants(group, method, adjoint, memory):
    """torchdiffeq, which is the measure where it is installed, and the block."""
    torch.manual_seed(0)
    absent = PEER.available()
    kind = Solved if absent is None else ODEBlock
    stock = kind(ODEFunction(group.shape[1]), method, adjoint=adjoint, **METHODS[method])
    block = ODEBlock(stock.odefunc, method, adjoint=adjoint, **METHODS[method])
    referee = Referee(stock, lambda seed: channels_last(group.shape, seed=seed), input_gradients=True)
    xs = [channels_last(group.shape, seed=seed) for seed in range(copies(4 * torch.Size(group.shape).numel()))]
    found = []
    for name in CONTESTANTS:
        about = replace(group, contestant=name, baseline=name == PEER.name, images=group.shape[0])
        if about.baseline and absent is not None:
            found.append(Entrant(replace(about, missing=absent)))
            continue
        twin = copy.deepcopy(block)
        call = PEER.prepare(twin, xs[0]) if about.baseline else twin
        step = stepping(twin, call, xs)
        if memory:
            saved = saved_bytes(twin, lambda call=call: call(xs[0].detach().requires_grad_()))
            about = replace(about, saved=saved, peak=peak_allocated(step))
        found.append(Entrant(about, step, None if about.baseline else partial(judged, referee, twin, call)))
    return found


def judged(referee, model, call):
    return verdict(referee.judge(model, call))


def stepping(model, call, xs):
    """Forward and backward on each input in turn."""
    inputs, grad = itertools.cycle(xs), channels_last(tuple(xs[0].shape), seed=1)

    def step():
        x = next(inputs).detach().requires_grad_()
        call(x).backward(grad)
        model.zero_grad()

    return step
