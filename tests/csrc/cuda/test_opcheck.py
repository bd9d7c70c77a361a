"""``torch.library.opcheck`` of the CUDA kernels in every layout, by the table of ``tests/op_samples.py``.

Grouped convolutions take other shapes, and have their checks beside them.
"""

from __future__ import annotations

import pytest
import torch
from op_samples import SAMPLES, Draw

from fusedres.ops.registry import OPS

CASES = [
    (name, layout)
    for name, op in OPS.items()
    if "cuda" in op.kernels and not name.startswith("conv_")
    for layout in SAMPLES[name].layouts
]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_opcheck(name, layout):
    for arguments in SAMPLES[name].calls(Draw(layout)):
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(OPS[name].overload("cuda"), arguments, test_utils=checks)
