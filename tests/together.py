"""Modules whose batch is spread over several processes, and what each of these runs."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from described import Described, conv, fuse, norm
from gang import Gang
from torch import Tensor, nn

import fusedres

__all__ = ["DenseLayers", "PartNorm", "Residual", "spread"]

Prepare = Callable[[nn.Module], nn.Module]


# ---------------------------------------------------------------------------------------------------------------------
# Modules for patch to find
# ---------------------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Two 3x3 convolutions and a projection; smooth, so that no rounding decides a kink."""

    def __init__(self, channels: int = 8, out: int = 16, stride: int = 2) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(channels, out, 3, stride), norm(out)
        self.conv2, self.bn2 = conv(out, out, 3), norm(out)
        self.down = nn.Sequential(conv(channels, out, 1, stride), norm(out)) if (channels, 1) != (out, stride) else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.silu(self.bn1(self.conv1(x)))))
        return F.silu(out + (x if self.down is None else self.down(x)))


class DenseLayers(nn.Module):
    """Three bottleneck layers of a dense block."""

    def __init__(self, channels: int = 8, growth: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self._layer(channels + i * growth, growth) for i in range(3))

    @staticmethod
    def _layer(channels: int, growth: int) -> nn.Module:
        inner = [norm(channels), nn.ReLU(), conv(channels, 8, 1), norm(8), nn.ReLU(), conv(8, growth, 3)]
        return nn.Sequential(*inner)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


# ---------------------------------------------------------------------------------------------------------------------
# What a process makes of the stock module
# ---------------------------------------------------------------------------------------------------------------------


def synchronised(module: nn.Module) -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(module)


def described(module: Described) -> nn.Module:
    fuse(module)
    return synchronised(module)


def described_for_stock(module: Described) -> nn.Module:
    module.options["backend"] = "stock"
    return described(module)


def converted_then_patched(module: nn.Module) -> nn.Module:
    module = synchronised(module)
    _patch(module)
    return module


def patched_then_converted(module: nn.Module) -> nn.Module:
    _patch(module)
    return synchronised(module)


# DistributedDataParallel takes modules with SyncBatchNorm on GPUs only: here they become that inside it.
def patched_in_ddp(module: nn.Module) -> nn.Module:
    _patch(module)
    return synchronised(nn.parallel.DistributedDataParallel(module))


def ddp_patched(module: nn.Module) -> nn.Module:
    module = synchronised(nn.parallel.DistributedDataParallel(module))
    _patch(module)
    return module


def _patch(module: nn.Module) -> None:
    report = fusedres.patch(module)
    assert report.coverage == 1, report


class PartNorm(nn.BatchNorm2d):
    """A batch norm whose batches are the given numbers of samples, one behind the other; it keeps no statistics."""

    def __init__(self, channels: int, parts: Sequence[int]) -> None:
        super().__init__(channels, track_running_stats=False)
        self.parts = tuple(parts)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super(PartNorm, self).forward(part) for part in x.split(self.parts)])


def partly(module: Described) -> nn.Module:
    """Every norm is synchronised, but one that is a :class:`PartNorm` has the process's own batch."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, PartNorm):
                own = nn.BatchNorm2d(child.num_features, track_running_stats=False)
                own.load_state_dict(child.state_dict())
                setattr(parent, name, own.to(child.weight.dtype))
            elif isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, synchronised(child))
    fuse(module)
    return module


def in_groups(module: Described) -> nn.Module:
    """As :func:`partly`, for three processes of which the first two share one batch and the third has its own."""
    groups = [dist.new_group([0, 1]), dist.new_group([2])]
    group = groups[dist.get_rank() == 2]
    parts = [name for name, norm in module.named_modules() if isinstance(norm, PartNorm)]
    module = synchronised(module)
    for name in parts:
        module.get_submodule(name).process_group = group
    fuse(module)
    return module


# ---------------------------------------------------------------------------------------------------------------------
# Running it
# ---------------------------------------------------------------------------------------------------------------------


def spread(gang: Gang, parts: Sequence[int], prepare: Prepare, seen: list[Counter] | None = None) -> Callable:
    """For :func:`fusedres.testing.compare`: runs a module in one process per part, each on that many samples.

    The output and the input's gradient are those of all parts, one behind the other, parameters' gradients are summed.
    Buffers must have the same bits everywhere.

    Args:
        prepare: makes the module that a process runs from the stock one; a function of a module, pickled by name.
        seen: receives the collectives of every forward and backward.
    """

    def fuse(module: nn.Module) -> None:
        pristine = copy.deepcopy(module)
        module.forward = lambda x: _Spread.apply(gang, parts, prepare, seen, pristine, module, x, *module.parameters())

    return fuse


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gang: Gang, parts, prepare, seen, pristine, module, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.job = gang, parts, prepare, seen, pristine, torch.is_autocast_enabled("cpu")
        ctx.save_for_backward(x)
        results = _results(*ctx.job, x, None)
        for name, buffer in module.named_buffers():
            assert all(torch.equal(results[0][name], result[name]) for result in results), name
            buffer.copy_(results[0][name])
        return torch.cat([result["output"] for result in results])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        results = _results(*ctx.job, *ctx.saved_tensors, grad)
        names = [f"grad of {name}" for name, _ in ctx.job[4].named_parameters()]
        of_parameters = [sum(result[name] for result in results) for name in names]
        return (None,) * 6 + (torch.cat([result["grad of input"] for result in results]), *of_parameters)


def _results(gang, parts, prepare, seen, pristine, autocast, x: Tensor, grad: Tensor | None) -> list[dict]:
    grads = [None] * len(parts) if grad is None else grad.split(parts)
    arguments = [(pristine, part, g, prepare, autocast) for part, g in zip(x.split(parts), grads)]
    results = gang.run(step, arguments)
    if seen is not None and grad is not None:
        assert all(result["collectives"] == results[0]["collectives"] for result in results)
        seen.append(results[0]["collectives"])
    return results


def step(module: nn.Module, x: Tensor, cotangent: Tensor | None, prepare: Prepare, autocast: bool) -> dict[str, Any]:
    """A forward and, with a cotangent, a backward of one process: results by name, and the collectives it took."""
    module = prepare(module)
    x = x.detach().requires_grad_()
    with counted() as collectives:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = module(x)
        if cotangent is not None:
            out.backward(cotangent)
    found = {"output": out.detach(), "grad of input": x.grad, "collectives": collectives}
    module = module.module if isinstance(module, nn.parallel.DistributedDataParallel) else module
    found |= {f"grad of {name}": p.grad for name, p in module.named_parameters()}
    return found | dict(module.named_buffers())


@contextlib.contextmanager
def counted() -> Iterator[Counter]:
    """Counts the collectives that this process takes part in."""
    count: Counter = Counter()
    names = ("all_gather", "all_reduce")
    originals = {name: getattr(dist, name) for name in names}

    def counting(name: str) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[name] += 1
            return originals[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, counting(name))
    try:
        yield count
    finally:
        for name in names:
            setattr(dist, name, originals[name])
