"""The fingerprint tells written tensors from untouched ones, the same from the kernel as from the reference."""

from __future__ import annotations

import pytest
import torch

from fusedres import env
from fusedres.ops.fingerprint import FINGERPRINT

pytestmark = pytest.mark.skipif(env.library_missing() is not None, reason="needs the compiled library")

reference, kernel = FINGERPRINT.overload("reference"), FINGERPRINT.overload("cpu")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def tensors(dtype: torch.dtype) -> list[torch.Tensor]:
    shapes = [(64, 32, 3, 3), (7,), (1,), (0,), (17, 5, 1, 1)]
    made = [torch.randn(shape).to(dtype) for shape in shapes]
    made.append(torch.randn(8, 6, 3, 3).to(dtype).to(memory_format=torch.channels_last))
    made.append(torch.randn(8, 6).to(dtype)[:, ::2])
    return made


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_equals_reference(dtype):
    some = tensors(dtype)
    assert kernel(some) == reference(some)
    assert kernel(some) != kernel(some[:-1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", [kernel, reference], ids=["kernel", "reference"])
def test_every_written_tensor_is_noticed(op, dtype):
    some = tensors(dtype)
    seen = {op(some)}
    for t in some:
        if t.numel():
            t.data.mul_(1.5).add_(0.1)
            seen.add(op(some))
    assert len(seen) == sum(t.numel() > 0 for t in some) + 1


def test_order_and_values_count():
    a, b = torch.tensor([1.0]), torch.tensor([2.0])
    assert kernel([a, b]) != kernel([b, a])
    assert kernel([a]) == kernel([a.clone()])


@pytest.mark.parametrize("op", [kernel, reference], ids=["kernel", "reference"])
def test_every_value_of_a_channel_counts(op):
    t = torch.zeros(37)
    seen = {op([t])}
    for i in range(37):
        t[i] = 1 + i
        seen.add(op([t]))
    assert len(seen) == 38


@pytest.mark.parametrize("op", [kernel, reference], ids=["kernel", "reference"])
@pytest.mark.parametrize("shape", [(64, 24, 3, 3), (24, 64, 1, 1), (32, 1, 5, 5), (10, 48)])
def test_every_slice_of_a_weight_counts(op, shape):
    """A filter that is pruned, an input channel, a row or a column of the taps."""
    weight = torch.randn(shape)
    before = op([weight])
    for dim, size in enumerate(shape):
        for i in range(size):
            pruned = weight.clone()
            pruned.select(dim, i).zero_()
            assert op([pruned]) != before
