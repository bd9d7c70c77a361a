"""Operands that are in no cache."""

from __future__ import annotations

import torch

from fusedres.benchmarking import rotation
from fusedres.benchmarking.rotation import cache_bytes, copies, rotating
from fusedres.benchmarking.workloads import Batch


def test_copies_fill_the_cache_twice(monkeypatch):
    monkeypatch.setattr(rotation, "cache_bytes", lambda device: 1000)
    assert copies(100) == 20
    assert copies(10**6) == 2
    assert copies(1) == 64 and copies(0) == 64


def test_the_size_of_the_cache(monkeypatch, tmp_path):
    assert cache_bytes() > 2**10
    for index, size in enumerate(("48K", "2048K", "3M")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    monkeypatch.setattr(rotation, "_CACHES", tmp_path)
    assert cache_bytes() == 3 * 2**20
    monkeypatch.setattr(rotation, "_CACHES", tmp_path / "nothing")
    assert cache_bytes() == 32 * 2**20


def test_calls_take_turns():
    call = rotating([lambda i=i: i for i in range(3)])
    assert [call() for _ in range(5)] == [0, 1, 2, 0, 1]


def test_batches_are_different(monkeypatch):
    monkeypatch.setattr(rotation, "cache_bytes", lambda device: 0)
    first, second = Batch.several(2, 8)
    assert first.images.shape == second.images.shape and not torch.equal(first.images, second.images)
    assert first.images.is_contiguous(memory_format=torch.channels_last)
