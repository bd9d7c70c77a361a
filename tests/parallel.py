"""Training with PyTorch's own parallel engines, as one of several processes."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from described import conv, norm
from together import Residual, synchronised
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fusedres

__all__ = ["Net", "abandoned", "ddp_gradients", "sharded_training"]


class Net(nn.Module):
    """Three blocks, of which the last can be skipped."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = conv(3, 8, 3), norm(8)
        self.first, self.second, self.extra = Residual(8, 8, 1), Residual(), Residual(16, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor, skips: bool = False) -> Tensor:
        x = self.second(self.first(F.silu(self.bn(self.stem(x)))))
        x = x if skips else self.extra(x)
        return self.head(x.mean((2, 3)))


def build(order: str, dtype: torch.dtype, wrap: Any) -> nn.Module:
    """A wrapped net, patched ``"before"`` or ``"after"`` wrapping, or not (``"stock"``)."""
    torch.manual_seed(0)
    net = Net().to(dtype)
    backend = "reference" if dtype == torch.float64 else "cpu"
    if order == "before":
        assert fusedres.patch(net, backend=backend).coverage == 1
    wrapped = wrap(net)
    if order == "after":
        assert fusedres.patch(wrapped, backend=backend).coverage == 1
    return wrapped


def batch(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """This process's images and labels."""
    torch.manual_seed(100 * dist.get_rank() + step)
    images, labels = torch.randn(4, 3, 16, 16).to(dtype), torch.randint(0, 5, (4,))
    return images.contiguous(memory_format=torch.channels_last), labels


def ddp_gradients(
    order: str, dtype: torch.dtype, options: dict[str, Any], accumulates: bool, skips: bool
) -> dict[str, Tensor]:
    """The gradients after two backward passes.

    Args:
        options: of ``DistributedDataParallel``.
        accumulates: whether the first of them is not averaged, and the second adds to it.
        skips: whether the second process goes around a block.
    """
    layout = torch.channels_last  # fully_shard takes contiguous parameters only
    net = build(order, dtype, lambda m: DistributedDataParallel(m.to(memory_format=layout), **options))
    for i in range(2):
        images, labels = batch(i, dtype)
        if not accumulates:
            net.zero_grad()
        with net.no_sync() if accumulates and i == 0 else contextlib.nullcontext():
            F.cross_entropy(net(images, skips=skips and dist.get_rank() == 1), labels).backward()
    return {name: p.grad for name, p in net.module.named_parameters()}


def sharded_training(order: str, dtype: torch.dtype) -> dict[str, Any]:
    """Three steps with every block and the rest sharded: the losses, the whole parameters, an evaluation."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def shard(net: Net) -> nn.Module:
        for block in (net.first, net.second, net.extra):
            fully_shard(block, mesh=mesh)
        return fully_shard(net, mesh=mesh)

    net = build(order, dtype, shard)
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    losses = []
    for i in range(3):
        images, labels = batch(i, dtype)
        optimizer.zero_grad()
        loss = F.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    with torch.no_grad():
        out = net.eval()(batch(9, dtype)[0])
    for module in (net, net.first, net.second, net.extra):
        module.reshard()
    found = {"losses": torch.stack(losses), "out": out}
    found["fused"] = sum(site.already for site in fusedres.explain(net).fused)
    found |= {name: p.full_tensor().detach() for name, p in net.named_parameters()}
    found["restored"] = fusedres.unpatch(net)
    found["classes"] = [type(m).__name__ for m in (net, net.first)]
    return found


def abandoned(how: str) -> tuple[str, float]:
    """Trains until the second process ends or ``"hangs"``: what the first one hears, and after how many seconds."""
    net = build("before", torch.float32, lambda m: m)
    net = synchronised(net)
    for i in range(4):
        if i == 2 and dist.get_rank() == 1:
            if how == "hangs":
                time.sleep(4)
                return "", 0.0
            os.kill(os.getpid(), signal.SIGKILL)
        images, labels = batch(i, torch.float32)
        start = time.monotonic()
        try:
            F.cross_entropy(net(images), labels).backward()
        except RuntimeError as error:
            return str(error), time.monotonic() - start
    return "no error", 0.0
