"""Every op has what an op must have."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from op_samples import SAMPLES, Draw
from torch.utils._python_dispatch import TorchDispatchMode

from fusedres import env
from fusedres.ops.registry import OPS
from fusedres.testing import channels_last

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


ABLE = ("reference",) if env.library_missing() is not None else ("reference", "cpu")
IN_GRAPHS = [
    (name, backend, overload)
    for name, op in OPS.items()
    for backend in ABLE
    if backend in ("reference", *op.kernels)
    for overload in op.overload(backend)._overloadpacket.overloads()
    if overload != "default"
]


@pytest.mark.parametrize(("name", "backend", "overload"), IN_GRAPHS)
def test_overloads_for_graphs(name, backend, overload):
    """They are what the default one is, without what is written to or with counts that may be symbols."""
    op, entry = OPS[name], SAMPLES[name]
    default = op.overload(backend)
    for_graphs = getattr(default._overloadpacket, overload)
    schema = str(for_graphs._schema)
    assert "float count" not in schema
    assert overload != "pure" or not any(a.alias_info for a in for_graphs._schema.arguments)
    layout = entry.layouts_of(backend)[0]
    seen = 0
    for arguments in entry.calls(Draw(layout)):
        given = [len(arguments) > i and arguments[i] is not None for i in op.written]
        if overload == "pure" and any(given):
            continue
        kept = [a for i, a in enumerate(arguments) if overload != "pure" or i not in op.written]
        kept = [round(a) if n.name == "count" else a for a, n in zip(kept, for_graphs._schema.arguments)]
        whole = [round(a) if n.name == "count" else a for a, n in zip(arguments, default._schema.arguments)]
        torch.testing.assert_close(for_graphs(*copy.deepcopy(kept)), default(*copy.deepcopy(whole)), rtol=0, atol=0)
        if entry.faked:
            torch.library.opcheck(for_graphs, kept, test_utils=("test_schema", "test_faketensor"))
        seen += 1
    assert seen


def test_calls_in_graphs_choose_the_overload_that_says_least():
    op = OPS["bn_stats"]
    x = channels_last((2, 3, 4, 5))

    def called(*args: object) -> str:
        names = []

        class Names(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                names.append(str(func))
                return func(*args, **(kwargs or {}))

        with Names():
            op.in_graph("reference")(*args)
        return names[0]

    assert called(x) == "fusedres.bn_stats.pure"
    assert called(x, True, None) == "fusedres.bn_stats.pure"
    assert called(x, False, torch.empty_like(x)) == "fusedres.bn_stats.default"
