"""CUDA graphs of a model: inference, and a training step with batch-norm statistics updated inside the graph."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fusedres
from fusedres.testing import channels_last

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def network(backend):
    torch.manual_seed(0)
    model = nn.Sequential(fusedres.nn.BottleneckBlock(32, 64, 2), fusedres.nn.BottleneckBlock(64, 64))
    return model.cuda().to(memory_format=torch.channels_last)


@pytest.fixture(params=["stock", "triton"])
def backend(request):
    if request.param == "triton" and fusedres.env.triton_missing():
        pytest.skip(fusedres.env.triton_missing())
    with fusedres.use_backend(request.param):
        yield request.param


def test_inference(backend):
    model = network(backend).eval()
    x = channels_last((4, 32, 16, 16)).cuda()
    replay = fusedres.capture(model, x)
    for seed in (1, 2):
        x = channels_last((4, 32, 16, 16), seed=seed).cuda()
        with torch.no_grad():
            torch.testing.assert_close(replay(x), model(x))


def test_training_step(backend):
    model = network(backend).train()
    plain = copy.deepcopy(model)

    def step_of(net):
        def step(x):
            loss = net(x).square().mean()
            loss.backward()
            return loss

        return step

    replay = fusedres.capture(model, channels_last((4, 32, 16, 16)).cuda(), step=step_of(model))
    for name, value in model.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), f"the warm-up changed {name}"
    for seed in (1, 2):
        x = channels_last((4, 32, 16, 16), seed=seed).cuda()
        plain.zero_grad()
        torch.testing.assert_close(replay(x), step_of(plain)(x))
        for (name, ours), theirs in zip(model.named_parameters(), plain.parameters()):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=name)
        for (name, ours), theirs in zip(model.named_buffers(), plain.buffers()):
            torch.testing.assert_close(ours, theirs, msg=name)


def test_what_waits_for_the_gpu_is_refused():
    class Waits(nn.Module):
        def forward(self, x):
            return x * x.sum().item()

    with pytest.raises(RuntimeError, match="waits for the GPU"):
        fusedres.capture(Waits(), torch.ones(4, device="cuda"))


def test_random_numbers_of_the_cpu_are_refused():
    class Draws(nn.Module):
        def forward(self, x):
            return x * float(torch.rand(()))

    with pytest.raises(RuntimeError, match="random numbers on the CPU"):
        fusedres.capture(Draws(), torch.ones(4, device="cuda"))
