"""Inference from several threads and in forked processes."""

from __future__ import annotations

import copy
import threading
import time

import pytest
import torch
from described import bottleneck, fuse
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fusedres.engine import inference
from fusedres.testing import channels_last

THREADS = 8


def model() -> nn.Module:
    blocks = [bottleneck(24, 48, 2), bottleneck(48), bottleneck(48, 24)]
    for block in blocks:
        fuse(block)
    return nn.Sequential(*blocks).eval()


@torch.no_grad()
def test_threads_fold_once_and_agree(monkeypatch):
    net, x = model(), channels_last((2, 24, 16, 16))
    expected, folds, results = copy.deepcopy(net)(x), [], {}

    def slow_fold(*args, fold=inference.fold):
        folds.append(threading.get_ident())
        time.sleep(0.01)  # long enough for every thread to come by
        return fold(*args)

    monkeypatch.setattr(inference, "fold", slow_fold)
    barrier = threading.Barrier(THREADS)

    def infer(number: int) -> None:
        barrier.wait()
        with torch.no_grad():
            results[number] = [net(x) for _ in range(5)]

    threads = [threading.Thread(target=infer, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folds) == sum(isinstance(m, nn.Conv2d) for m in net.modules())
    assert len(results) == THREADS
    assert all(torch.equal(out, expected) for outs in results.values() for out in outs)


class Features(Dataset):
    """What a fused model makes of each image, in whatever process asks."""

    def __init__(self, net: nn.Module, images: Tensor) -> None:
        self.net, self.images = net, images

    def __len__(self) -> int:
        return len(self.images)

    @torch.no_grad()
    def __getitem__(self, index: int) -> Tensor:
        return self.net(self.images[index : index + 1])[0]


@pytest.mark.parametrize("folded", [True, False])
def test_forked_workers_run_a_model_that_the_parent_has_run(folded, threads):
    net, images = model(), channels_last((6, 24, 16, 16))
    features = Features(net, images)
    net.train(not folded)
    threads(2, net, images)  # the parent's threads are there, and weights are folded or not, before the fork
    net.eval()
    if folded:
        threads(2, features.__getitem__, 0)
    loader = DataLoader(features, batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=60)
    with inference._folding:  # as another thread may hold it at that moment
        found = torch.cat(list(loader))
    expected = threads(1, lambda: torch.stack([features[i] for i in range(len(features))]))
    assert torch.equal(found, expected)


def test_training_beside_forked_workers():
    net = model().train()
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    images = channels_last((8, 24, 12, 12))
    for batch in DataLoader(images, batch_size=4, num_workers=2, multiprocessing_context="fork", timeout=60):
        optimizer.zero_grad()
        net(batch).square().mean().backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in net.parameters())
