"""Batch statistics on a GPU, against float64."""

from __future__ import annotations

import pytest
import torch
from cuda_ops import DTYPES, LAYOUTS, check_bn_stats

from fusedres.ops.bn_stats import BN_STATS
from fusedres.testing import channels_last

SHAPES = [(2, 37, 6, 5), (3, 64, 7, 7), (2, 8, 1, 1), (1, 1, 3, 3), (2, 300, 2, 2), (32, 64, 56, 56), (16, 2048, 7, 7)]


def on_gpu(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda").copy_(x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("per_sample", [False, True], ids=["batch", "samples"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, layout, dtype, per_sample):
    check_bn_stats(on_gpu(LAYOUTS[layout](shape, dtype, 1)), per_sample)


@pytest.mark.parametrize("dtype", DTYPES)
def test_into_a_slice(dtype):
    buffer = torch.full((4, 96, 14, 14), float("nan"), dtype=dtype, device="cuda").to(memory_format=torch.channels_last)
    check_bn_stats(channels_last((4, 32, 14, 14), dtype, 1).cuda(), False, buffer[:, 32:64])
    assert buffer[:, :32].isnan().all() and buffer[:, 64:].isnan().all()


def test_a_large_mean_does_not_cancel_a_small_variance():
    x = (channels_last((8, 64, 28, 28)) * 0.5 + 1e6).cuda()
    ours, exact = BN_STATS.overload("cuda")(x), BN_STATS.overload("reference")(x.double())
    torch.testing.assert_close(ours[1].double(), exact[1], rtol=1e-2, atol=0)


def test_bitwise_the_same_from_run_to_run():
    x = channels_last((32, 64, 56, 56), torch.bfloat16).cuda()
    first = BN_STATS.overload("cuda")(x)
    assert all(torch.equal(BN_STATS.overload("cuda")(x), first) for _ in range(5))


def test_more_than_32_bits_of_elements():
    x = torch.zeros(33, 64, 1024, 1024, dtype=torch.bfloat16, device="cuda").to(memory_format=torch.channels_last)
    assert x.numel() > 2**31
    x[-1, 5] = 2.0
    mean, m2 = BN_STATS.overload("cuda")(x)
    assert mean[5].item() == pytest.approx(2 / 33, rel=1e-5) and mean[4].item() == 0 == m2[4].item()
    assert m2[5].item() == pytest.approx(2**20 * 4 * 32 / 33, rel=1e-4)
