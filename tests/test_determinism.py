"""The same numbers to the last bit: from run to run, and statistics for any number of threads."""

from __future__ import annotations

import pytest
import torch
from described import Described, basic, fuse, norm
from torch import Tensor

from fusedres import use_backend
from fusedres.benchmarking.soak import Workload
from fusedres.testing import channels_last, contiguous


def trained() -> list[Tensor]:
    """Parameters and buffers after six steps of every kind of block, dropout among them."""
    work = Workload()
    for _ in range(6):
        work()
    return [t.detach().clone() for t in work.model.state_dict().values()]


@pytest.mark.parametrize("count", [1, 2])
def test_two_runs_agree_bit_for_bit(count, threads):
    torch.use_deterministic_algorithms(True)  # and nothing in a block is refused as nondeterministic
    first, second = threads(count, trained), threads(count, trained)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_deterministic_algorithms_are_accepted(backend):
    torch.use_deterministic_algorithms(True)
    block = basic(24, 32, 2).train()
    fuse(block)
    with use_backend(backend):
        block(channels_last((2, 24, 8, 8)).requires_grad_()).sum().backward()


@pytest.mark.parametrize("make", [channels_last, contiguous])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_do_not_depend_on_the_number_of_threads(make, dtype, threads):
    x = make((5, 24, 45, 45)).to(dtype)

    def statistics() -> list[Tensor]:
        """What a block's norm keeps of its input, and its parameters' gradients, which are sums as large."""
        torch.manual_seed(0)
        block = Described([norm(24), "relu"]).to(dtype).train()
        fuse(block)
        block(x).backward(make(x.shape, seed=1).to(dtype))
        return [*(b.clone() for b in block.buffers()), *(p.grad for p in block.parameters())]

    one, *others = (threads(count, statistics) for count in (1, 2, 3, 5))
    assert all(torch.equal(a, b) for each in others for a, b in zip(one, each))
