"""Every op has what an op must have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fusedres import env
from fusedres.ops.registry import OPS

TESTS = Path(__file__).parent


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_every_op_has_a_test(op):
    stem = op.reference.__module__.rsplit(".", 1)[1]
    path = TESTS / f"test_{stem}.py"
    assert path.exists(), f"{op.name} is declared in fusedres/ops/{stem}.py, so its test is {path.name}"
    assert op.name in path.read_text()


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_every_op_has_a_documented_reference_and_its_kernels(op):
    assert getattr(torch.ops.fusedres, op.name).default is op.overload("reference")
    for backend in op.kernels:
        schema = str(op.overload(backend)._schema)
        assert schema.split("(", 1)[1] == str(op.overload("reference")._schema).split("(", 1)[1]


@pytest.mark.skipif(env.library_missing() is not None, reason=str(env.library_missing()))
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_compiled_kernels_are_registered(op):
    if "cpu" in op.kernels:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fusedres::{op.name}_cpu", "CPU")
