"""The gated join, forward and backward, against float64."""

from __future__ import annotations

import pytest
import torch

from fusedres.ops.gated_join import GATED_JOIN, GATED_JOIN_BACKWARD
from fusedres.testing import assert_within_budget


@pytest.mark.parametrize("threshold", [None, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5), (2, 9, 6, 5), (0, 4), (4097,)], ids=str)
def test_both_directions(device, shape, dtype, threshold):
    generator = torch.Generator().manual_seed(1)
    grad, f, logits, x = (torch.randn(shape, generator=generator).to(dtype).to(device) for _ in range(4))

    def every(op, *args):
        wide = [t.double() if isinstance(t, torch.Tensor) else t for t in args]
        return op.overload("triton")(*args), op.reference(*args), op.reference(*wide)

    assert_within_budget(*every(GATED_JOIN, f, logits, x, threshold))
    for needs in ((True, True), (True, False), (False, True)):
        results = every(GATED_JOIN_BACKWARD, grad, logits, f, x, threshold, *needs)
        for i, tensors in enumerate(zip(*results)):
            assert_within_budget(*tensors, f"gradient {i}")
    _, nothing, _ = GATED_JOIN_BACKWARD.overload("triton")(grad, logits, None, None, threshold, True, True)
    assert nothing.numel() == 0


def test_wrong_operands_are_named(device):
    f = torch.zeros(2, 3, device=device)
    with pytest.raises(ValueError, match=r"x of shape \(3, 2\)"):
        GATED_JOIN.overload("triton")(f, f, torch.zeros(3, 2, device=device), None)
