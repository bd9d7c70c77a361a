"""The excitation's two layers, against float64."""

from __future__ import annotations

import pytest
import torch
from triton_operands import rows

from fusedres.ops.excite import EXCITE, GATES
from fusedres.testing import assert_within_budget


@pytest.fixture(autouse=True)
def exact_products():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def operands(device, samples, channels, hidden, dtype, normed=True, bias=True, masked=False, pointwise=False):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    w1, w2 = draw(hidden, channels) / channels**0.5, draw(channels, hidden) / hidden**0.5
    if pointwise:
        w1, w2 = (w[:, :, None, None].contiguous(memory_format=torch.channels_last) for w in (w1, w2))
    b1, b2 = (draw(hidden), draw(channels)) if bias else (None, None)
    mask = (draw(samples, 1) > 0).float() * 1.25 if masked else None
    layers = [None if t is None else t.to(dtype).to(device) for t in (w1, b1, w2, b2)]
    norm = rows(channels, 2, device) if normed else None
    return draw(samples, channels).to(device), norm, *layers, None if mask is None else mask.to(device)


def check(*found, act=1, gate="sigmoid"):
    *given, mask = found
    rest = (act, 0.125, gate, mask)
    wide = [t.double() if isinstance(t, torch.Tensor) else t for t in (*given, *rest)]
    ours = EXCITE.overload("triton")(*given, *rest)
    assert ours.dtype == given[0].dtype and ours.is_contiguous()
    assert_within_budget(ours, EXCITE.reference(*given, *rest), EXCITE.reference(*wide))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 24, 6), (17, 70, 1), (1, 200, 33), (33, 8, 130)], ids=str)
def test_shapes(device, shape, dtype):
    check(*operands(device, *shape, dtype))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("act", range(7))
def test_every_activation_and_gate(device, act, gate):
    check(*operands(device, 4, 16, 4, torch.float32), act=act, gate=gate)


@pytest.mark.parametrize("case", [{"normed": False}, {"bias": False}, {"masked": True}, {"pointwise": True}], ids=str)
def test_forms(device, case):
    check(*operands(device, 5, 24, 6, torch.bfloat16, **case))


def test_a_hidden_layer_too_wide_for_registers(device):
    check(*operands(device, 2, 16, 520, torch.float32))


def test_nothing(device):
    *given, mask = operands(device, 0, 16, 4, torch.float32)
    assert EXCITE.overload("triton")(*given, 1, 0.0, "sigmoid", mask).shape == (0, 16)


def test_wrong_operands_are_named(device):
    *given, mask = operands(device, 2, 16, 4, torch.float32)
    with pytest.raises(ValueError, match=r"w2 of shape \(16, 3\)"):
        EXCITE.overload("triton")(*given[:4], given[4][:, :3], given[5], 1, 0.0, "sigmoid", mask)
    with pytest.raises(ValueError, match="gate must be one of 'sigmoid', 'hardsigmoid', got 'tanh'"):
        EXCITE.overload("triton")(*given, 1, 0.0, "tanh", mask)
