"""The gated join and its backward in the emulator."""

from __future__ import annotations

import math

import pytest
import torch
from cuda_ops import DENSE, DTYPES, THRESHOLD, check_gated_join, gated_operands
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusedres.ops.gated_join import GATED_JOIN, GATED_JOIN_BACKWARD
from fusedres.testing import contiguous

relaxed = settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", DENSE)
def test_against_float64(layout, dtype):
    check_gated_join(DENSE[layout], (2, 13, 7, 5), dtype, "cpu")


@relaxed
@given(
    shape=st.one_of(
        st.tuples(st.integers(0, 3), st.integers(1, 33), st.integers(0, 7), st.integers(1, 7)),
        st.tuples(st.integers(0, 9), st.integers(1, 99)),
        st.just(()),
    ),
    layout=st.sampled_from(sorted(DENSE)),
    processors=st.integers(1, 3),
)
def test_any_shape(emulated, shape, layout, processors):
    emulated.emu_processors(processors)
    check_gated_join(DENSE[layout] if len(shape) == 4 else contiguous, shape, torch.float32, "cpu")


def test_walks_its_grid(emulated):
    """More packs than threads: each takes several, the last of them partial."""
    emulated.emu_processors(1)
    check_gated_join(contiguous, (9001,), torch.float32, "cpu")


def test_addresses_that_allow_no_wide_access():
    grad, logits, f, x = (t[1:] for t in gated_operands(contiguous, (70,), torch.bfloat16, "cpu"))
    for op, args in (
        (GATED_JOIN, (f, logits, x, None)),
        (GATED_JOIN_BACKWARD, (grad, logits, f, x, None, True, True)),
    ):
        copies = [t.clone() if isinstance(t, torch.Tensor) else t for t in args]
        torch.testing.assert_close(op.overload("cuda")(*args), op.overload("cuda")(*copies), rtol=0, atol=0)


@pytest.mark.parametrize("threshold", [None, THRESHOLD])
def test_extreme_logits(threshold):
    """A gate that is shut multiplies too: infinity behind it becomes NaN, as in the formula."""
    logits = torch.tensor([-math.inf, -200.0, -90.0, 0.0, 90.0, 200.0, math.inf, math.nan])
    for side in (1.0, math.inf):
        f, x = torch.full_like(logits, side), torch.full_like(logits, 2.0)
        ours, plain = (GATED_JOIN.overload(name)(f, logits, x, threshold) for name in ("cuda", "reference"))
        torch.testing.assert_close(ours, plain, equal_nan=True)


def test_wrong_input():
    f = contiguous((2, 3, 4, 5))
    with pytest.raises(RuntimeError, match="logits"):
        GATED_JOIN.overload("cuda")(f, f[:1], f, None)
    with pytest.raises(RuntimeError, match="x must have the dtype"):
        GATED_JOIN.overload("cuda")(f, f, f.double(), None)
    with pytest.raises(RuntimeError, match="contiguous"):
        GATED_JOIN.overload("cuda")(f, f, f.contiguous(memory_format=torch.channels_last), None)
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float16"):
        GATED_JOIN.overload("cuda")(f.double(), f.double(), f.double(), None)
