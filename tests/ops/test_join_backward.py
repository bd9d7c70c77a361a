"""The join's two backward passes against stock PyTorch's autograd, with batch statistics and with constants."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from slices import empty_slice
from torch import Tensor

from fusedres.ops.activations import ACTIVATIONS, Activation
from fusedres.ops.dropout import keep_scale
from fusedres.testing import assert_within_budget, channels_last, contiguous, expanded, rms, sliced

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DENSE = {"channels_last": channels_last, "contiguous": contiguous}
LAYOUTS = {**DENSE, "sliced": sliced}
RESIDUALS = ("none", "plain", "affine")
ACTS = [Activation(name, 0.125) for name in ACTIVATIONS]
KINKS = (-3.0, 0.0, 3.0, 6.0)
EPS = 1e-5
relaxed = settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Case:
    """A join with its operands, and the gradients that three implementations give it.

    With ``gained`` there are a gain and a gradient that reaches the norm's result through the squeeze.
    """

    def __init__(
        self,
        make,
        shape,
        dtype,
        residual: str,
        act: Activation,
        training: bool = True,
        normed: bool = True,
        gained: bool = False,
        dropout: float = 0.0,
    ) -> None:
        generator = torch.Generator().manual_seed(5)
        self.act, self.training = act, training
        self.y, self.grad = make(shape, dtype, 3), make(shape, dtype, 6)
        self.residual = None if residual == "none" else make(shape, dtype, 4)
        vectors = torch.randn(2, 2, shape[1], generator=generator)
        self.norm = (vectors[0, 0] + 1.5, vectors[0, 1]) if normed else None
        self.side = (vectors[1, 0] + 1.5, vectors[1, 1]) if residual == "affine" else None
        self.gain = self.offset = None
        if gained:  # of values that every dtype holds
            self.gain = (torch.rand(shape[:2], generator=generator) + 0.5).bfloat16().float()
            self.offset = torch.randn(shape[:2], generator=generator).bfloat16().float()
        self.dropout, self.seed = dropout, torch.tensor([1 << 35]) if dropout else None
        self._leave_the_kinks()

    def _leave_the_kinks(self) -> None:
        """Moves values away from where two right answers have different gradients.

        Of a few values batch statistics make the same few again, wherever they are moved; then the norm's beta moves.
        """
        for attempt in range(40):
            z = self._argument(self.y.double(), None if self.residual is None else self.residual.double())
            near = torch.stack([(z - kink).abs() < 0.04 for kink in KINKS]).any(0)
            if not near.any():
                return
            self.y[near] += 0.4
            if attempt >= 10 and self.norm is not None:
                self.norm[1][near.any(0).flatten(1).any(1)] += 0.11
        raise AssertionError("some values stay at the kinks")

    def _argument(
        self,
        y: Tensor,
        residual: Tensor | None,
        leaves: list[Tensor] | None = None,
        squeezed: list[Tensor] | None = None,
    ) -> Tensor:
        def normalised(x: Tensor, norm: tuple[Tensor, Tensor] | None) -> Tensor:
            if norm is None:
                return x
            dtype = torch.promote_types(x.dtype, torch.float32)
            gamma, beta = (t.to(dtype, copy=True).requires_grad_(leaves is not None) for t in norm)
            if leaves is not None:
                leaves.extend((gamma, beta))
            if self.training:
                return F.batch_norm(x, None, None, gamma, beta, True, 0.0, EPS)
            constants = torch.zeros_like(gamma), torch.ones_like(gamma)
            return F.batch_norm(x, *constants, gamma, beta, False, 0.0, EPS)

        z = normalised(y, self.norm)
        if squeezed is not None:
            squeezed.append(z)
        side = None if residual is None else normalised(residual, self.side)
        if self.gain is not None:
            gain = self.gain.to(z.dtype, copy=True).requires_grad_(leaves is not None)
            if leaves is not None:
                leaves.append(gain)
            z = z * gain[:, :, None, None]
        return z if side is None else z + side

    def autograd(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """``[dy, dresidual, dgamma, dbeta, ..., dgain]`` by stock PyTorch."""
        leaves = [t.to(dtype or t.dtype).detach().requires_grad_() for t in (self.y, self.residual) if t is not None]
        vectors: list[Tensor] = []
        squeezed: list[Tensor] = []
        z = self._argument(leaves[0], leaves[1] if len(leaves) > 1 else None, vectors, squeezed)
        out = self.act(z)
        if self.seed is not None:
            out = out * keep_scale(out.shape, self.dropout, self.seed, out.dtype, out.device)
        outputs, gradients = [out], [self.grad.to(out.dtype)]
        if self.offset is not None:
            outputs += squeezed
            gradients.append(self.offset[:, :, None, None].to(out.dtype).expand_as(squeezed[0]))
        return list(torch.autograd.grad(outputs, leaves + vectors, gradients))

    def rows(self, x: Tensor, norm: tuple[Tensor, Tensor] | None) -> Tensor | None:
        if norm is None:
            return None
        if self.training:
            stats = torch.ops.fusedres.bn_stats(x)
            return torch.ops.fusedres.bn_norm(stats, x.numel() / x.shape[1], *norm, None, None, 0.0, EPS)
        constants = torch.zeros_like(norm[0]), torch.ones_like(norm[0])
        return torch.ops.fusedres.bn_norm(None, 1.0, *norm, *constants, 0.0, EPS)

    def operands(self) -> tuple:
        side = None if self.residual is None else self.rows(self.residual, self.side)
        return (self.grad, self.y, self.rows(self.y, self.norm), self.residual, side, self.act.code, self.act.param)

    @property
    def modifiers(self) -> tuple:
        return self.gain, self.dropout, self.seed

    @property
    def count(self) -> float:
        return self.y.numel() / self.y.shape[1]

    def totals(self, sums: Tensor) -> Tensor:
        """What the second pass reads, of what the first has found: ``[4, C]`` where there is a gain."""
        if self.gain is None:
            return sums
        n, c, h, w = self.y.shape
        deviation = torch.zeros(n, c)  # the sum of the normalised values of every sample
        rows = self.rows(self.y, self.norm)
        if rows is not None:
            deviation = h * w * (torch.ops.fusedres.bn_stats(self.y, True)[0] - rows[0]) * rows[1]
        g, g_y, g_r = sums.unbind(0)
        u = (self.gain * g + h * w * self.offset).sum(0)
        return torch.stack((u, (self.gain * g_y + self.offset * deviation).sum(0), g_r.sum(0), g.sum(0)))

    def training_flags(self) -> tuple[bool, bool]:
        args = self.operands()
        return args[2] is not None and self.training, args[4] is not None and self.training

    def kernels(self, suffix: str = "_cpu", addend: Tensor | None = None, into: Tensor | None = None) -> list[Tensor]:
        """The list of :meth:`autograd` from our two passes."""
        args = self.operands()
        main, side = args[2], args[4]
        each, _ = getattr(torch.ops.fusedres, f"join_backward_reduce{suffix}")(*args, False, *self.modifiers)
        sums = self.totals(each)
        apply = getattr(torch.ops.fusedres, f"join_backward_apply{suffix}")
        flags = (*self.training_flags(), True)
        dy, dresidual = apply(*args, sums, self.count, *flags, *self.modifiers, self.offset, addend, into)
        found = [dy] if self.residual is None else [dy, dresidual]
        for rows, row, total in ((main, 1, 0), (side, 2, 0 if self.gain is None else 3)):
            if rows is not None:
                found += [sums[row], sums[total]]
        if self.gain is not None:
            gamma, beta = self.norm
            found.append(gamma * each[1] + beta * each[0])
        return found

    def scale_of_sums(self, found: Tensor) -> float | None:
        """A vector is a sum of numbers that cancel: one rounding of those is always allowed."""
        if found.dim() == 4:
            return None
        return rms(self.grad) * (self.y.numel() / found.numel()) ** 0.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False], ids=["batch statistics", "constants"])
def test_against_float64(isa, layout, dtype, training):
    for residual, act in itertools.product(RESIDUALS, ACTS):
        case = Case(LAYOUTS[layout], (2, 37, 7, 5), dtype, residual, act, training)
        for i, tensors in enumerate(zip(case.kernels(), case.autograd(), case.autograd(torch.float64))):
            assert_within_budget(*tensors, f"{residual} {act} gradient {i}", scale=case.scale_of_sums(tensors[0]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False], ids=["batch statistics", "constants"])
@pytest.mark.parametrize(("gained", "dropout"), [(True, 0.0), (False, 0.3), (True, 0.3)])
def test_gain_and_dropout_against_float64(isa, layout, dtype, training, gained, dropout):
    for residual, act in itertools.product(RESIDUALS, ACTS):
        case = Case(LAYOUTS[layout], (3, 37, 7, 5), dtype, residual, act, training, gained=gained, dropout=dropout)
        for i, (ours, *others) in enumerate(zip(case.kernels(), case.autograd(), case.autograd(torch.float64))):
            # Vectors have the dtype that stock PyTorch keeps them in; a gain's would be the tensor's.
            ours = ours.to(others[0].dtype)
            assert_within_budget(ours, *others, f"{residual} {act} gradient {i}", scale=case.scale_of_sums(ours))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("residual", RESIDUALS)
def test_without_a_norm(isa, layout, residual):
    case = Case(LAYOUTS[layout], (2, 21, 4, 5), torch.float32, residual, Activation("relu"), normed=False)
    for tensors in zip(case.kernels(), case.autograd(), case.autograd(torch.float64)):
        assert_within_budget(*tensors, scale=case.scale_of_sums(tensors[0]))


def targets(case: Case, layout: str) -> list[tuple[Tensor, Callable[[], None]]]:
    """Where the gradient may be written to: a dense tensor, and a slice wherever there are any."""
    dense = DENSE["contiguous" if layout == "contiguous" else "channels_last"](case.y.shape, case.y.dtype, 8)
    found = [(dense, lambda: None)]
    return found if layout == "contiguous" else [*found, empty_slice(case.y.shape, case.y.dtype)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gained", [True, False])
def test_added_to_what_is_there_against_float64(isa, layout, dtype, gained):
    for residual in RESIDUALS:
        case = Case(LAYOUTS[layout], (3, 37, 7, 5), dtype, residual, Activation("relu"), gained=gained)
        addend = LAYOUTS[layout](case.y.shape, dtype, 7)
        stock, exact = case.autograd()[0] + addend, case.autograd(torch.float64)[0] + addend.double()
        ours = case.kernels(addend=addend)
        assert_within_budget(ours[0], stock, exact, residual)
        for into, check_gaps in targets(case, layout):
            found = case.kernels(addend=addend, into=into)
            assert found[0].numel() == 0
            assert torch.equal(into, ours[0])
            for a, b in zip(found[1:], ours[1:]):
                assert torch.equal(a, b)
            check_gaps()
            into.copy_(addend)  # and in place
            case.kernels(addend=into, into=into)
            assert torch.equal(into, ours[0])
            check_gaps()
            case.kernels(into=into)
            assert torch.equal(into, case.kernels()[0])
            check_gaps()


def test_slices_are_as_good_as_copies_of_them(isa):
    """To the bit, whichever of the operands it is."""
    for residual, dtype in itertools.product(RESIDUALS, DTYPES):
        case = Case(channels_last, (2, 37, 7, 5), dtype, residual, Activation("silu"), gained=True, dropout=0.5)
        expected = case.kernels()
        for name in ("y", "grad", "residual") if residual != "none" else ("y", "grad"):
            dense = getattr(case, name)
            setattr(case, name, sliced(dense.shape, dtype).copy_(dense))
            for a, b in zip(case.kernels(), expected):
                assert torch.equal(a, b), name
                assert a.dim() < 4 or a.is_contiguous(memory_format=torch.channels_last), name
            setattr(case, name, dense)


def close_to_reference(case: Case, **where: Tensor) -> None:
    for ours, reference in zip(case.kernels(**where), case.kernels("", **where)):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gained", [True, False])
def test_every_remainder_of_channels(isa, layout, gained):
    for channels in range(1, 68):
        shape = (2, channels, 3, 3)
        close_to_reference(Case(LAYOUTS[layout], shape, torch.float32, "affine", Activation("silu"), gained=gained))


@relaxed
@given(
    n=st.integers(1, 3),
    c=st.integers(1, 70),
    h=st.integers(1, 17),
    w=st.integers(1, 17),
    layout=st.sampled_from(sorted(LAYOUTS)),
    residual=st.sampled_from(RESIDUALS),
    act=st.sampled_from([act for act in ACTS if act.name in ("identity", "silu", "gelu")]),
    gained=st.booleans(),
    dropout=st.sampled_from((0.0, 0.5, 1.0)),
    added=st.booleans(),
)
def test_any_shape(n, c, h, w, layout, residual, act, gained, dropout, added):
    training = n * h * w > 8  # of fewer values, statistics may be anything at all
    case = Case(LAYOUTS[layout], (n, c, h, w), torch.float32, residual, act, training, gained=gained, dropout=dropout)
    close_to_reference(case, addend=LAYOUTS[layout](case.y.shape, torch.float32, 7) if added else None)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gained", [True, False])
@pytest.mark.parametrize("shape", [(0, 5, 3, 3), (2, 5, 0, 3)])
def test_empty_tensors(isa, layout, gained, shape):
    y = LAYOUTS[layout](shape)
    operands = (y, y, None, y, None, 1, 0.0)
    gain = torch.ones(shape[:2]) if gained else None
    sums, emitted = torch.ops.fusedres.join_backward_reduce_cpu(*operands, True, gain, 0.5, torch.tensor([1]))
    assert torch.equal(sums, torch.zeros((3, *shape[:2]) if gained else (3, 5))) and emitted.shape == shape
    found = torch.ops.fusedres.join_backward_apply_cpu(*operands, None, 1.0, False, False, True, gain, 0.0, None, gain)
    assert [t.shape for t in found] == [shape, shape]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize(("gained", "dropout"), [(False, 0.0), (True, 0.0), (True, 0.3)])
def test_emitted_value_is_the_forwards(isa, layout, dtype, residual, gained, dropout):
    act = Activation("hardswish")
    case = Case(LAYOUTS[layout], (2, 21, 4, 5), dtype, residual, act, gained=gained, dropout=dropout)
    args, modifiers = case.operands(), case.modifiers
    _, value = torch.ops.fusedres.join_backward_reduce_cpu(*args, True, *modifiers)
    assert torch.equal(value, torch.ops.fusedres.join_cpu(*args[1:], *modifiers))


@pytest.mark.parametrize("act", ["relu", "relu6", "leaky_relu", "hardswish"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_gradients_travel_as_in_stock(isa, act, value):
    case = Case(channels_last, (1, 19, 3, 4), torch.float32, "plain", Activation(act, 0.125), training=False)
    case.grad[0, 3] = value
    for ours, expected in zip(case.kernels()[:2], case.autograd()[:2]):
        torch.testing.assert_close(ours, expected, equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("act", ["relu", "relu6", "leaky_relu"])  # stock's hardswish has two answers itself
def test_gradients_of_nan_values_are_those_of_stock(isa, act):
    case = Case(channels_last, (1, 19, 3, 4), torch.float32, "plain", Activation(act, 0.125), training=False)
    case.y[0, 3, 1] = float("nan")
    for ours, expected in zip(case.kernels()[:2], case.autograd()[:2]):
        assert torch.equal(ours.isnan(), expected.isnan())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bitwise_the_same_for_any_number_of_threads(layout, threads):
    shape, act = (3, 48, 33, 33), Activation("silu")
    case = Case(LAYOUTS[layout], shape, torch.bfloat16, "affine", act, gained=True, dropout=0.3)
    for one, two in zip(threads(1, case.kernels), threads(2, case.kernels)):
        assert torch.equal(one, two)


def test_wrong_input_raises():
    case = Case(channels_last, (2, 5, 4, 3), torch.float32, "affine", Activation("relu"))
    grad, *rest = case.operands()
    reduce, apply = torch.ops.fusedres.join_backward_reduce_cpu, torch.ops.fusedres.join_backward_apply_cpu
    with pytest.raises(RuntimeError, match="grad differs"):
        reduce(grad[:1], *rest, False)
    with pytest.raises(RuntimeError, match="grad must have the layout"):
        reduce(expanded(case.y.shape), *rest, False)
    with pytest.raises(RuntimeError, match="grad must have the layout"):
        apply(grad.contiguous(), *rest, None, 1.0, False, False, True)
    with pytest.raises(RuntimeError, match="need the sums"):
        apply(grad, *rest, None, 1.0, True, False, True)
    for sums in (
        torch.ones(3, 4),
        torch.ones(1, 5),
        torch.ones(5, 5),
        torch.ones(3, 2, 5),
        torch.ones(5, 3).t(),
        torch.ones(3, 5).double(),
    ):
        with pytest.raises(
            RuntimeError, match=r"sums must be a contiguous float32 tensor of shape \[R, 5\] with R from 2 to 4"
        ):
            apply(grad, *rest, sums, 1.0, True, False, True)
    with pytest.raises(RuntimeError, match="R from 4 to 4: the residual's norm is in training beside"):
        apply(grad, *rest, torch.ones(3, 5), 1.0, True, True, True, torch.ones(2, 5))


@pytest.mark.parametrize("name", ["gain", "offset", "addend", "into"])
def test_wrong_modifiers_raise(name):
    case = Case(channels_last, (2, 5, 4, 3), torch.float32, "plain", Activation("relu"), training=False)
    wrong = {
        "per sample": (torch.ones(2, 4), torch.ones(5), torch.ones(2, 5).double(), torch.ones(5, 2).t()),
        "whole": (case.y[:1], case.y.bfloat16(), case.y.contiguous(), case.y[:, :4], case.y[0]),
    }
    apply = torch.ops.fusedres.join_backward_apply_cpu
    for value in wrong["per sample" if name in ("gain", "offset") else "whole"]:
        with pytest.raises(RuntimeError, match=f"join_backward_apply_cpu: {name} "):
            apply(*case.operands(), None, 1.0, False, False, True, **{name: value})
    if name == "gain":
        with pytest.raises(RuntimeError, match="join_backward_reduce_cpu: gain "):
            torch.ops.fusedres.join_backward_reduce_cpu(*case.operands(), False, torch.ones(2, 4))


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("emit", [True, False])
def test_both_passes_at_once_are_the_passes(residual, emit):
    case = Case(channels_last, (2, 5, 4, 3), torch.float32, residual, Activation("silu"), dropout=0.5)
    args, modifiers = case.operands(), case.modifiers
    flags = True, residual == "affine", True
    sums, value = torch.ops.fusedres.join_backward_reduce(*args, emit, *modifiers)
    gradients = torch.ops.fusedres.join_backward_apply(*args, sums, 24.0, *flags, *modifiers)
    found = torch.ops.fusedres.join_backward(*args, emit, 24.0, *flags, *modifiers[1:])
    assert all(torch.equal(a, b) for a, b in zip(found, (sums, value, *gradients), strict=True))


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("emit", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("make", [channels_last, contiguous, sliced])
def test_mask_is_the_residuals_gradient_and_the_first_pass(make, residual, emit, dropout):
    """join_backward_mask in one pass; what it writes is what the second pass gives a residual without a norm."""
    case = Case(make, (2, 5, 4, 3), torch.float32, residual, Activation("silu"), dropout=dropout)
    args, seed = case.operands(), case.seed
    g, sums, value = torch.ops.fusedres.join_backward_mask(*args, emit, dropout, seed)
    expected = torch.ops.fusedres.join_backward_reduce(*args, emit, None, dropout, seed)
    assert torch.equal(sums, expected[0]) and torch.equal(value, expected[1])
    beside = torch.zeros_like(case.y) if case.residual is None else None
    plain = (*args[:3], args[3] if beside is None else beside, args[4])
    if args[4] is None:
        dy_and_g = torch.ops.fusedres.join_backward_apply(
            *plain, *args[5:], None, 1.0, False, False, True, None, dropout, seed
        )
        torch.testing.assert_close(g, dy_and_g[1])
    torch.testing.assert_close(g.sum((0, 2, 3)), sums[0])
    if make is not sliced:
        assert g.stride() == case.y.stride()
