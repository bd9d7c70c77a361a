"""The join, forward and backward, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusedres.ops.activations import ACTIVATIONS
from fusedres.ops.join import JOIN
from fusedres.ops.join_backward import JOIN_BACKWARD_APPLY, JOIN_BACKWARD_MASK, JOIN_BACKWARD_REDUCE
from fusedres.testing import assert_within_budget, channels_last, contiguous, rms, sliced

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = {"channels_last": channels_last, "contiguous": contiguous}
RESIDUALS = ("none", "plain", "affine")
CODES = [formula.code for formula in ACTIVATIONS.values()]
KINKS = (-3.0, 0.0, 3.0, 6.0)
relaxed = settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Case:
    """Operands of a join and of both passes of its backward, none of them near a kink of an activation."""

    def __init__(self, device, make, shape, dtype, residual="none", normed=True, gain=False, dropout=False):
        n, c, _, _ = shape
        generator = torch.Generator().manual_seed(7)
        self.y, self.grad = make(shape, dtype, 1), make(shape, dtype, 2)
        self.residual = None if residual == "none" else make(shape, dtype, 3)
        rows = torch.randn(2, 4, c, generator=generator)
        rows[:, 1:3] = rows[:, 1:3].abs() + 0.5
        self.norm = rows[0] if normed else None
        self.side = rows[1] if residual == "affine" else None
        self.gain = torch.rand(n, c, generator=generator) + 0.25 if gain else None
        self.offset = torch.randn(n, c, generator=generator) if gain else None
        self.sums = torch.randn(4 if gain else 3, c, generator=generator)
        self.dropout, self.seed = (0.3, torch.tensor([-123456789012345])) if dropout else (0.0, None)
        self._leave_the_kinks()
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.to(device))

    def _leave_the_kinks(self):
        for _ in range(30):
            z = JOIN.reference(self.y, self.norm, self.residual, self.side, 0, 0.0, self.gain).double()
            near = torch.stack([(z - kink).abs() < 0.05 for kink in KINKS]).any(0)
            if not near.any():
                return
            self.y[near] += 0.3
        raise AssertionError("some values stay at the kinks")

    def operands(self, cast=lambda t: t):
        def of(t):
            return None if t is None else cast(t)

        return (of(self.y), of(self.norm), of(self.residual), of(self.side)), {
            "gain": of(self.gain), "dropout": self.dropout, "seed": self.seed,
        }  # fmt: skip

    def forward(self, op, act, cast=lambda t: t):
        args, modifiers = self.operands(cast)
        return op(*args, act, 0.125, **modifiers)

    def reduce(self, op, act, emit=True, cast=lambda t: t):
        args, modifiers = self.operands(cast)
        return op(cast(self.grad), *args, act, 0.125, emit, **modifiers)

    def mask(self, op, act, emit=True, cast=lambda t: t):
        args, modifiers = self.operands(cast)
        return op(cast(self.grad), *args, act, 0.125, emit, modifiers["dropout"], modifiers["seed"])

    def apply(self, op, act, training=True, cast=lambda t: t, **more):
        args, modifiers = self.operands(cast)
        flags = training and self.norm is not None, training and self.side is not None, True
        if self.offset is not None:
            modifiers["offset"] = cast(self.offset)
        return op(cast(self.grad), *args, act, 0.125, cast(self.sums), 70.0, *flags, **modifiers, **more)


def double(t):
    return t.double()


def ours_and_plain(run, op, *args):
    """A pass by the kernel, and by the reference in the same dtype."""
    return run(op.overload("triton"), *args), run(op.reference, *args)


def check(case, acts=CODES, training=True):
    for act in acts:
        ours, plain = ours_and_plain(case.forward, JOIN, act)
        assert ours.stride() == plain.stride()
        assert_within_budget(ours, plain, case.forward(JOIN.reference, act, double), f"act {act}")

        ours, plain = ours_and_plain(case.reduce, JOIN_BACKWARD_REDUCE, act)
        exact = case.reduce(JOIN_BACKWARD_REDUCE.reference, act, cast=double)
        assert torch.equal(ours[1], case.forward(JOIN.overload("triton"), act))
        # A sum of numbers that cancel: one rounding of those is always allowed.
        terms = rms(case.grad) * (case.y.numel() / case.y.shape[1]) ** 0.5
        assert_within_budget(ours[0], plain[0], exact[0], f"sums, act {act}", scale=terms)

        if case.gain is None:
            check_mask(case, act, ours)

        ours, plain = ours_and_plain(case.apply, JOIN_BACKWARD_APPLY, act, training)
        exact = case.apply(JOIN_BACKWARD_APPLY.reference, act, training, double)
        for i, tensors in enumerate(zip(ours, plain, exact)):
            assert tensors[0].stride() == tensors[1].stride()
            assert_within_budget(*tensors, f"gradient {i}, act {act}")


def check_mask(case, act, reduced):
    """The first pass bit by bit, with the gradient that it masks."""
    ours, plain = ours_and_plain(case.mask, JOIN_BACKWARD_MASK, act)
    assert torch.equal(ours[1], reduced[0]) and torch.equal(ours[2], reduced[1])
    assert ours[0].stride() == plain[0].stride()
    exact = case.mask(JOIN_BACKWARD_MASK.reference, act, cast=double)
    assert_within_budget(ours[0], plain[0], exact[0], f"masked gradient, act {act}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", RESIDUALS)
def test_every_activation(device, residual, dtype):
    check(Case(device, channels_last, (2, 21, 5, 3), dtype, residual), CODES if dtype == torch.float32 else (1,))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gain", [False, True], ids=["", "gain"])
@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("training", [True, False], ids=["batch statistics", "constants"])
def test_every_modifier(device, layout, gain, dropout, training):
    for residual, channels in (("none", 8), ("affine", 19)):
        shape = (2, channels, 5, 3)
        check(Case(device, LAYOUTS[layout], shape, torch.float32, residual, True, gain, dropout), (1,), training)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_a_norm(device, layout):
    check(Case(device, LAYOUTS[layout], (2, 21, 4, 5), torch.float32, "plain", False), (1,))


@relaxed
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 9), st.integers(1, 9)),
    layout=st.sampled_from(sorted(LAYOUTS)),
    residual=st.sampled_from(RESIDUALS),
    gain=st.booleans(),
    dropout=st.booleans(),
)
def test_any_shape(device, shape, layout, residual, gain, dropout):
    case = Case(device, LAYOUTS[layout], shape, torch.float32, residual, True, gain, dropout)
    for run, op in ((case.forward, JOIN), (case.reduce, JOIN_BACKWARD_REDUCE), (case.apply, JOIN_BACKWARD_APPLY)):
        torch.testing.assert_close(run(op.overload("triton"), 4), run(op.reference, 4), rtol=1e-4, atol=1e-4)


def test_wide_and_long(device):
    check(Case(device, channels_last, (1, 300, 9, 13), torch.bfloat16, "affine"), (1,))


def test_seed_on_either_device(device):
    case = Case(device, channels_last, (2, 8, 5, 7), torch.float32, dropout=True)
    expected = case.forward(JOIN.overload("triton"), 1)
    case.seed = case.seed.cpu()
    assert torch.equal(case.forward(JOIN.overload("triton"), 1), expected)


def test_dropout_of_everything(device):
    case = Case(device, channels_last, (2, 8, 5, 7), torch.float32, dropout=True)
    case.dropout = 1.0
    assert not case.forward(JOIN.overload("triton"), 1).any()
    assert not case.reduce(JOIN_BACKWARD_REDUCE.overload("triton"), 1)[0].any()


def test_slices(device):
    case = Case(device, sliced, (2, 16, 5, 7), torch.bfloat16, "plain")
    case.residual = case.residual.contiguous(memory_format=torch.channels_last)
    check(case, (1,))


@pytest.mark.parametrize("in_place", [False, True])
def test_addend_and_into(device, in_place):
    case = Case(device, channels_last, (2, 16, 5, 7), torch.bfloat16)
    results = []
    ours, reference = JOIN_BACKWARD_APPLY.overload("triton"), JOIN_BACKWARD_APPLY.reference
    for op, cast in ((ours, lambda t: t), (reference, lambda t: t), (reference, double)):
        buffer = cast(channels_last((2, 24, 5, 7), torch.bfloat16, 9).to(device))
        into = buffer[:, 4:20]
        addend = into if in_place else cast(sliced((2, 16, 5, 7), torch.bfloat16, 8).to(device))
        dy, _ = case.apply(op, 1, cast=cast, addend=addend, into=into)
        assert dy.numel() == 0
        results.append(buffer)
    assert_within_budget(*results)
    assert torch.equal(results[0][:, :4], results[1][:, :4]) and torch.equal(results[0][:, 20:], results[1][:, 20:])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing(device, layout):
    y = LAYOUTS[layout]((0, 8, 4, 4)).to(device)
    assert JOIN.overload("triton")(y, None, None, None, 1, 0.0).shape == y.shape
    sums, emitted = JOIN_BACKWARD_REDUCE.overload("triton")(y, y, None, None, None, 1, 0.0, True)
    assert sums.shape == (3, 8) and not sums.any() and emitted.shape == y.shape
    g, sums, _ = JOIN_BACKWARD_MASK.overload("triton")(y, y, None, None, None, 1, 0.0, False)
    assert g.shape == y.shape and sums.shape == (3, 8) and not sums.any()
    dy, _ = JOIN_BACKWARD_APPLY.overload("triton")(y, y, None, None, None, 1, 0.0, None, 1.0, False, False, False)
    assert dy.shape == y.shape


@pytest.mark.parametrize("act", CODES)
def test_non_finite_values_travel_as_in_the_reference(device, act):
    case = Case(device, channels_last, (1, 19, 3, 4), torch.float32, "plain")
    for i, value in enumerate([float("nan"), float("inf"), -float("inf")]):
        case.y[0, i, 1, 1] = value
        case.residual[0, i + 8, 2, 3] = value
        case.grad[0, i + 12, 0, 0] = value
    for run, op in ((case.forward, JOIN), (case.apply, JOIN_BACKWARD_APPLY)):
        ours, expected = run(op.overload("triton"), act), run(op.reference, act)
        torch.testing.assert_close(ours, expected, equal_nan=True, rtol=1e-4, atol=1e-4)


def test_wrong_operands_are_named(device):
    y = channels_last((2, 8, 4, 4)).to(device)
    with pytest.raises(ValueError, match=r"residual and y.*differ in layout"):
        JOIN.overload("triton")(y, None, contiguous((2, 8, 4, 4)).to(device), None, 1, 0.0)
    with pytest.raises(ValueError, match=r"residual of shape \(2, 7, 4, 4\)"):
        JOIN.overload("triton")(y, None, channels_last((2, 7, 4, 4)).to(device), None, 1, 0.0)
    with pytest.raises(ValueError, match="neither dense nor a channel slice"):
        JOIN.overload("triton")(y[:, :, 1:], None, None, None, 1, 0.0)
