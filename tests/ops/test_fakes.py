"""Fakes tell the true shapes, dtypes and strides, for every op in every layout, dtype and shape that it takes."""

from __future__ import annotations

from typing import Any

import pytest
from op_samples import SAMPLES, Draw, shapes_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from fusedres import env
from fusedres.ops.registry import OPS

ABLE = ("reference",) if env.library_missing() is not None else ("reference", "cpu")
CASES = [
    (name, backend, layout)
    for name, op in OPS.items()
    for backend in ABLE
    if backend in ("reference", *op.kernels)
    for layout in SAMPLES[name].layouts_of(backend)
]


@pytest.mark.parametrize(("name", "backend", "layout"), CASES)
def test_every_layout(name, backend, layout):
    entry, op = SAMPLES[name], OPS[name].overload(backend)
    for shape in shapes_of(entry):
        for dtype in entry.dtypes_of(backend):
            for arguments in entry.calls(Draw(layout, shape, dtype)):
                mode = FakeTensorMode()
                fakes = tree_map(lambda a: mode.from_tensor(a) if isinstance(a, Tensor) else a, arguments)  # noqa: B023
                if not entry.faked:
                    with pytest.raises(NotImplementedError, match="depends on"), mode:
                        op(*fakes)
                    continue
                with mode:
                    predicted = op(*fakes)
                assert metadata(op(*arguments)) == metadata(predicted), (shape, dtype)


def metadata(results: Any) -> list[tuple]:
    """Shape, dtype and strides of each result, but for strides along one element or none: those say nothing."""
    tensors = results if isinstance(results, (tuple, list)) else [] if results is None else [results]
    strides = ([step for step, size in zip(t.stride(), t.shape) if size > 1 and t.numel()] for t in tensors)
    return [(t.shape, t.dtype, steps) for t, steps in zip(tensors, strides)]
