"""``torch.library.opcheck`` of every op, reference and CPU kernel, in every layout, whatever requires a gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_samples import SAMPLES, Draw
from torch import Tensor

from fusedres import env
from fusedres.ops.registry import OPS
from fusedres.testing import INPUTS

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
OF_THE_LIBRARY = {"build_info", "cpu_has_vectors", "cpu_isa", "cpu_isas", "set_cpu_isa"}
"""What the compiled library tells of itself; they take no tensors."""

FOR_GRAPHS = {"infer_block", "pointwise_dgrad_add_"}
"""Of compilers' graphs alone: see tests/test_graphs.py and tests/ops/test_conv.py."""

ABLE = ("reference",) if env.library_missing() is not None else ("reference", "cpu")
OVERLOADS = [(name, b) for name, op in OPS.items() for b in ABLE if b in ("reference", *op.kernels)]
LAYOUTS = [(name, b, layout) for name, b in OVERLOADS for layout in SAMPLES[name].layouts_of(b)]
REFUSED = [
    (name, layout)
    for name, backend in OVERLOADS
    if backend == "cpu" and SAMPLES[name].images
    for layout in INPUTS
    if layout not in SAMPLES[name].layouts
]


def test_every_op_of_the_namespace_has_samples():
    namespace = "fusedres::"
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith(namespace)}
    overloads = [op.overload(backend) for op in OPS.values() for backend in ("reference", *op.kernels)]
    others = {f"{namespace}{name}" for name in OF_THE_LIBRARY & {name.removeprefix(namespace) for name in names}}
    others |= {f"{namespace}{name}" for name in FOR_GRAPHS}
    assert {name.partition(".")[0] for name in names} == {op._schema.name for op in overloads} | others
    assert SAMPLES.keys() == OPS.keys()


@pytest.mark.parametrize(("name", "backend"), OVERLOADS)
def test_samples_give_and_withhold_every_optional_tensor(name, backend):
    calls = SAMPLES[name].calls(Draw(SAMPLES[name].layouts[0]))
    for i, argument in enumerate(OPS[name].overload(backend)._schema.arguments):
        if str(argument.type) == "Optional[Tensor]":
            given = {len(call) > i and call[i] is not None for call in calls}
            assert given == {True, False}, f"{argument.name} is {'always' if True in given else 'never'} given"


def differentiable(op: Any, arguments: tuple) -> list[int]:
    """The positions of the arguments of which a gradient may be required: those that are not written to."""
    written = [argument.alias_info is not None and argument.alias_info.is_write for argument in op._schema.arguments]
    return [i for i, a in enumerate(arguments) if not written[i] and any(map(_floating, _listed(a)))]


def requiring(arguments: tuple, positions: set[int]) -> tuple:
    """The arguments, with gradients required of those at these positions."""

    def leaf(a: Any, requires: bool) -> Any:
        return a.detach().requires_grad_(requires) if _floating(a) else a

    return tuple(
        [leaf(t, i in positions) for t in a] if isinstance(a, list) else leaf(a, i in positions)
        for i, a in enumerate(arguments)
    )


def _listed(a: Any) -> list:
    return a if isinstance(a, list) else [a]


def _floating(a: Any) -> bool:
    return isinstance(a, Tensor) and a.is_floating_point()


# What an op yields has no gradient, of which PyTorch warns where its check differentiates all the same.
@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.parametrize(("name", "backend", "layout"), LAYOUTS)
def test_opcheck(name, backend, layout):
    entry, op = SAMPLES[name], OPS[name].overload(backend)
    checks = CHECKS if entry.faked else CHECKS[:2]
    for arguments in entry.calls(Draw(layout)):
        positions = differentiable(op, arguments)
        for one in positions:
            torch.library.opcheck(op, requiring(arguments, {one}), test_utils="test_autograd_registration")
        for several in (set(), set(positions)):
            torch.library.opcheck(op, requiring(arguments, several), test_utils=checks)
        if entry.faked:
            whole = requiring(arguments, set(positions))
            torch.library.opcheck(op, whole, test_utils="test_aot_dispatch_dynamic")


@pytest.mark.parametrize(("name", "layout"), REFUSED)
def test_kernels_refuse_other_layouts(name, layout):
    """So that the table names all layouts that a kernel takes, and none is walked wrongly."""
    for arguments in SAMPLES[name].calls(Draw(layout)):
        with pytest.raises(RuntimeError, match=f"{name}_cpu: "):
            OPS[name].overload("cpu")(*arguments)
