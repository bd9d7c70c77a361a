"""Trains a residual network on handwritten digits with several processes, and goes on from a checkpoint. ::

    torchrun --standalone --nproc-per-node 2 examples/train_ddp.py --checkpoints runs
    torchrun --standalone --nproc-per-node 2 examples/train_ddp.py --checkpoints runs --resume runs/step40.pt

The images are scikit-learn's, so nothing is downloaded. One line is fusedres's, ``fusedres.patch``; all else is
PyTorch's: ``DistributedDataParallel``, ``SyncBatchNorm``, ``DistributedSampler``. On GPUs each process takes one.
A checkpoint is that of the stock model, loads with or without fusedres, and may be written in the middle of an epoch.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

import fusedres


class Residual(nn.Module):
    """Two 3x3 convolutions and a shortcut, written as anyone would."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class Net(nn.Module):
    """A residual network for small images."""

    def __init__(self, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.stages = nn.Sequential(
            Residual(width, width, 1), Residual(width, 2 * width, 2), Residual(2 * width, 4 * width, 2)
        )
        self.head = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


def digits(count: int) -> Dataset:
    """The first ``count`` images, ``[1, 16, 16]``, and their classes."""
    data = load_digits()
    images = torch.from_numpy(data.images[:count]).float().div(16)[:, None]
    images = F.interpolate((images - images.mean()) / images.std(), scale_factor=2, mode="bilinear")
    return TensorDataset(images, torch.from_numpy(data.target[:count]))


def device_of_this_process() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def build(device: torch.device, patches: bool) -> nn.Module:
    """The model with everything around it."""
    torch.manual_seed(0)
    model = Net().to(device, memory_format=torch.channels_last)
    if patches:
        report = fusedres.patch(model)
        if dist.get_rank() == 0:
            print(report)
    ddp = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    # Behind DDP, which on the CPU refuses a SyncBatchNorm; there stock PyTorch has none, a patched model has.
    return nn.SyncBatchNorm.convert_sync_batchnorm(ddp) if patches or device.type == "cuda" else ddp


def batches(dataset: Dataset, size: int, epochs: int, first: int, device: torch.device) -> Iterator[tuple]:
    """This process's batches from number ``first`` on, each with its number."""
    sampler = DistributedSampler(dataset, seed=0, drop_last=True)
    loader = DataLoader(dataset, size, sampler=sampler, drop_last=True)
    for epoch in range(first // len(loader), epochs):
        sampler.set_epoch(epoch)
        for number, (images, classes) in enumerate(loader, epoch * len(loader)):
            if number >= first:
                yield number, images.to(device, memory_format=torch.channels_last), classes.to(device)


def save(path: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Writes what :func:`load` reads; under another name first, so that no half of a checkpoint is ever found."""
    state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> int:
    """The number of the step to go on with."""
    state = torch.load(path, map_location=device, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def train(args: argparse.Namespace) -> dict[int, float]:
    """Trains; returns the loss of every step, the mean over all processes."""
    device = device_of_this_process()
    model = build(device, not args.stock)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4, nesterov=True)
    first = load(args.resume, model.module, optimizer, device) if args.resume else 0
    losses = {}
    for number, images, classes in batches(digits(args.images), args.batch, args.epochs, first, device):
        loss = F.cross_entropy(model(images), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        losses[number] = mean.item()
        if dist.get_rank() == 0:
            print(f"step {number}: loss {losses[number]:.4f}")
            if args.checkpoints and (number + 1) % args.every == 0:
                save(args.checkpoints / f"step{number + 1}.pt", number + 1, model.module, optimizer)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32, help="images per process and step")
    parser.add_argument("--images", type=int, default=1797, help="how many of the images to train on")
    parser.add_argument("--checkpoints", type=Path, help="folder to write checkpoints to")
    parser.add_argument("--every", type=int, default=20, help="steps from one checkpoint to the next")
    parser.add_argument("--resume", type=Path, help="checkpoint to go on from")
    parser.add_argument("--stock", action="store_true", help="do not patch, to compare")
    parser.add_argument("--losses", type=Path, help="file to write the losses to, as JSON")
    args = parser.parse_args()
    if args.checkpoints:
        args.checkpoints.mkdir(parents=True, exist_ok=True)
    # A process that is gone is an error in all others after at most this long.
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(minutes=2))
    try:
        losses = train(args)
        if args.losses and dist.get_rank() == 0:
            args.losses.write_text(json.dumps(losses))
    finally:
        dist.destroy_process_group()
        # Gloo's threads let go of the last tensors now: one that does when the interpreter ends aborts the process.
        time.sleep(0.1)


if __name__ == "__main__":
    main()
