"""Synchronised batch norm: processes with parts of a batch, against stock batch norm on the whole of it."""

from __future__ import annotations

import pytest
import together
import torch
from described import BLOCKS, basic, bottleneck, norms
from torch import nn

from fusedres.testing import channels_last, compare, contiguous

# Those that draw nothing: what a process draws is its own.
STILL = [name for name in BLOCKS if "dropout" not in name and "depth" not in name and "inverted" not in name]
TWO, THREE = (3, 1), (3, 0, 2)


def check(gang, module, parts=TWO, prepare=together.described, seen=None, make=channels_last, size=12, **run):
    first = next(m for m in module.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d)))
    shape = (sum(parts), first.in_channels if isinstance(first, nn.Conv2d) else first.num_features, size, size)
    fuse = together.spread(gang, parts, prepare, seen)
    compare(module, fuse, lambda seed: [make(shape, seed=seed)], **run).check()


@pytest.mark.parametrize(("name", "parts"), [(n, (THREE, TWO)[i % 4 == 0]) for i, n in enumerate(STILL)], ids=str)
def test_uneven_parts_are_one_batch(gang, name, parts):
    check(gang, BLOCKS[name]().train(), parts)


@pytest.mark.parametrize("run", [{"autocast": torch.bfloat16}, {"dtype": torch.bfloat16}], ids=str)
def test_narrow_dtypes(gang, run):
    check(gang, BLOCKS["basic, projection"]().train(), (5, 3), size=24, **run)


@pytest.mark.parametrize(
    "options",
    [{"norm_momentum": None}, {"norm_affine": False}, {"norm_track_running_stats": False}, {"memory": "low"}],
    ids=str,
)
def test_settings(gang, options):
    check(gang, (bottleneck if "memory" in options else basic)(24, 48, 2, **options).train())


def test_without_gradients(gang):
    check(gang, bottleneck(24, 48, 2).train(), backward=False)


def test_contiguous_layout(gang):
    check(gang, bottleneck(24, 48, 2).train(), make=contiguous)


def test_frozen_norms_share_nothing(gang):
    module, seen = bottleneck(24, 48, 2).train(), []
    norms(module)[1].eval()
    check(gang, module, seen=seen)
    assert seen == [{"all_gather": 2, "all_reduce": 2}]


@pytest.mark.parametrize(
    ("name", "exchanges"),
    [("bottleneck", 3), ("bottleneck, projection", 3), ("basic, projection", 2), ("squeeze-excitation, projection", 1)],
)
def test_both_chains_share_one_exchange(gang, name, exchanges):
    seen = []
    check(gang, BLOCKS[name]().train(), seen=seen)
    assert seen == [{"all_gather": exchanges, "all_reduce": exchanges}]


def test_dense_layers_exchange_each_channel_once(gang):
    seen = []
    check(gang, together.DenseLayers().train(), THREE, together.converted_then_patched, seen)
    # The input's channels, and per layer those of its inner norm and those that it appends, of which the last has no
    # reader; backward one per norm.
    assert seen == [{"all_gather": 7, "all_reduce": 6}]


@pytest.mark.parametrize("end", ["branch", "shortcut"])
def test_one_chain_ends_with_a_batch_of_its_own(gang, end):
    module = bottleneck(24, 48, 2).train()
    getattr(module, end)[-1] = together.PartNorm(48, TWO).train()
    check(gang, module, TWO, together.partly)


def test_groups_that_differ_in_one_block(gang):
    module = bottleneck(24, 48, 2).train()
    module.shortcut[-1] = together.PartNorm(48, (3, 2)).train()
    check(gang, module, (2, 1, 2), together.in_groups)


@pytest.mark.parametrize("name", ["bottleneck, projection", "squeeze-excitation, projection"])
def test_the_stock_backend(gang, name):
    check(gang, BLOCKS[name]().train(), prepare=together.described_for_stock)


@pytest.mark.parametrize(
    "prepare",
    [
        together.converted_then_patched,
        together.patched_then_converted,
        together.patched_in_ddp,
        together.ddp_patched,
    ],
)
def test_converting_patching_and_wrapping_in_any_order(gang, prepare):
    check(gang, together.Residual().train(), TWO, prepare)


def test_one_process_alone_is_a_batch_norm():
    stock = bottleneck(24, 48, 2).train()
    compare(stock, lambda m: together.described(m), lambda seed: [channels_last((4, 24, 12, 12), seed=seed)]).check()


def test_evaluation_is_that_of_the_running_statistics():
    stock = bottleneck(24, 48, 2).eval()
    inputs = lambda seed: [channels_last((2, 24, 8, 8), seed=seed)]  # noqa: E731
    compare(stock, lambda m: together.described(m).eval(), inputs, backward=False).check()
