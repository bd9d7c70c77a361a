"""Checks of the CUDA kernels against float64, for tensors of any device: the emulator's (the CPU) or a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fusedres.ops.activations import Activation
from fusedres.ops.bn_join import BN_JOIN
from fusedres.ops.bn_norm import BN_NORM
from fusedres.ops.bn_stats import BN_STATS
from fusedres.ops.gated_join import GATED_JOIN, GATED_JOIN_BACKWARD
from fusedres.ops.join import JOIN, JOIN_STATS, join_argument
from fusedres.ops.join_backward import JOIN_BACKWARD, JOIN_BACKWARD_APPLY, JOIN_BACKWARD_REDUCE
from fusedres.ops.join_pool import JOIN_POOL, JOIN_POOL_BACKWARD, PoolWindow, pool_window
from fusedres.ops.rk_combine import RK_COMBINE, RK_COMBINE_BACKWARD, RK_ERROR
from fusedres.testing import assert_within_budget, channels_last, contiguous, rms, sliced

__all__ = [
    "DENSE",
    "DTYPES",
    "LAYOUTS",
    "POOLINGS",
    "RESIDUALS",
    "RK_WEIGHTS",
    "THRESHOLD",
    "TOLERANCES",
    "JoinCase",
    "PoolCase",
    "check_bn_join",
    "check_bn_norm",
    "check_bn_stats",
    "check_gated_join",
    "check_rk",
    "check_rounded_tolerances",
    "gated_operands",
    "on_device",
    "rk_operands",
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DENSE = {"channels_last": channels_last, "contiguous": contiguous}
LAYOUTS = {**DENSE, "sliced": sliced}
RESIDUALS = ("none", "plain", "affine")
SEED = torch.tensor([0x1234_5678_9ABC_DEF0])


def wide(value: Any) -> Any:
    """Tensors of floating dtypes in float64."""
    if isinstance(value, (tuple, list)):
        return type(value)(map(wide, value))
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def on_device(t: Tensor, device: str) -> Tensor:
    """``t`` on a device, with its strides."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device).copy_(t)


def compare(name: str, op: Any, args: tuple, scales: tuple[float | None, ...] | None = None) -> list[Tensor]:
    """Runs an op's CUDA kernel, its reference and its reference in float64; returns the kernel's results.

    ``scales`` are what one rounding of each result is relative to, where that is not the result itself.
    """
    results = []
    for overload, arguments in (("cuda", args), ("reference", args), ("reference", wide(args))):
        result = op.overload(overload)(*arguments)
        results.append(result if isinstance(result, (tuple, list)) else (result,))
    for index, (ours, plain, exact) in enumerate(zip(*results, strict=True)):
        scale = scales[index] if scales else None
        assert_within_budget(ours, plain, exact, f"{name}, result {index}", scale=scale)
    return list(results[0])


# ---------------------------------------------------------------------------------------------------------------------
# Batch norm
# ---------------------------------------------------------------------------------------------------------------------


def check_bn_stats(x: Tensor, per_sample: bool, into: Tensor | None = None) -> Tensor:
    """Checks means and M2 on their own: they differ in size."""
    ours = BN_STATS.overload("cuda")(x, per_sample, into)
    plain = BN_STATS.overload("reference")(x, per_sample)
    exact = BN_STATS.overload("reference")(x.double(), per_sample)
    count = x.numel() / x.shape[1] / (x.shape[0] if per_sample else 1)
    deviation = float((exact[1] / count).mean().sqrt())
    for row, scale in ((0, deviation + rms(exact[0])), (1, None)):
        assert_within_budget(ours[row], plain[row], exact[row], f"row {row}", scale=scale)
    if into is not None:
        assert torch.equal(into, x)
    return ours


def check_bn_norm(channels: int, partials: int | None, dtype: torch.dtype, device: str, absent: str = "") -> None:
    """``absent`` names what is not given, among stats, affine and running."""
    draw = torch.randn(6, max(partials or 1, 1), channels, generator=generator(3))
    stats = torch.stack((draw[0], draw[1].abs() * 50)).to(device)
    stats = stats[:, 0].contiguous() if partials is None else stats
    vectors = [draw[i, 0].to(device, dtype) for i in (2, 3, 4)] + [draw[5, 0].abs().to(device, dtype) + 0.5]
    gamma, beta, mean, var = (None, None, *vectors[2:]) if absent == "affine" else vectors
    if absent == "running":
        mean = var = None
    count = 60.0 * (partials or 1)
    found = []
    for overload, widen in (("cuda", False), ("reference", False), ("reference", True)):
        buffers = [None if t is None else (t.double() if widen else t.clone()) for t in (mean, var)]
        args = (None if absent == "stats" else stats, count, gamma, beta)
        args = wide(args) if widen else args
        rows = BN_NORM.overload(overload)(*args, *buffers, 0.3, 1e-5)
        found.append([*rows.unbind(0), *(t for t in buffers if t is not None)])
    names = ("mean", "rstd", "scale", "shift", "running_mean", "running_var")
    for name, ours, plain, exact in zip(names, *found):
        assert_within_budget(ours, plain, exact, name)


# ---------------------------------------------------------------------------------------------------------------------
# Joins
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class JoinCase:
    """A join's operands, and the checks of its three passes."""

    shape: tuple[int, int, int, int]
    layout: str = "channels_last"
    dtype: torch.dtype = torch.float32
    residual: str = "none"
    act: Activation = field(default_factory=lambda: Activation("relu"))
    normed: bool = True
    gained: bool = False
    dropout: float = 0.0
    device: str = "cpu"

    def __post_init__(self) -> None:
        make = LAYOUTS[self.layout]
        n, c, *_ = self.shape
        self.grad, self.y = self._tensor(make, 6), self._tensor(make, 3)
        self.side = None if self.residual == "none" else self._tensor(make, 4)
        draw = torch.randn(2, 4, c, generator=generator(5))
        draw[:, 1] = draw[:, 1].abs() + 0.5
        self.norm = draw[0].to(self.device) if self.normed else None
        self.res_norm = draw[1].to(self.device) if self.residual == "affine" else None
        self.gain = (torch.rand(n, c, generator=generator(7)) + 0.5).to(self.device) if self.gained else None
        self.seed = SEED if self.dropout else None

    def _tensor(self, make: Callable[..., Tensor], seed: int) -> Tensor:
        return on_device(make(self.shape, self.dtype, seed), self.device)

    def __str__(self) -> str:
        gained = ", gain" if self.gained else ""
        return f"{self.shape} {self.layout} {self.dtype} residual {self.residual} {self.act}{gained} p {self.dropout}"

    @property
    def operands(self) -> tuple:
        return self.y, self.norm, self.side, self.res_norm, self.act.code, self.act.param

    @property
    def modifiers(self) -> tuple:
        return self.gain, self.dropout, self.seed

    @property
    def count(self) -> float:
        return self.y.numel() / self.y.shape[1]

    def _leave_the_kinks(self) -> None:
        """Moves values away from where two right answers have different gradients."""
        if self.act.name in ("identity", "silu", "gelu"):
            return
        for _ in range(60):
            z = self._argument()
            near = torch.stack([(z - kink).abs() < 0.02 for kink in (-3.0, 0.0, 3.0, 6.0)]).any(0)
            if not near.any():
                return
            self.y[near] += 0.37
        raise AssertionError("some values stay at the kinks")

    def _argument(self) -> Tensor:
        return join_argument(*(wide(t) for t in (self.y, self.norm, self.side, self.res_norm, self.gain)))

    def check_forward(self) -> Tensor:
        (out,) = compare(str(self), JOIN, (*self.operands, *self.modifiers))
        assert out.stride() == torch.empty_like(self.y).stride()
        return out

    def check_stats(self) -> Tensor:
        """The statistics of the result, which must be the join's bits, against float64's of the same bits."""
        out, ours = JOIN_STATS.overload("cuda")(*self.operands, *self.modifiers)
        assert torch.equal(out, JOIN.overload("cuda")(*self.operands, *self.modifiers))
        assert out.stride() == torch.empty_like(self.y).stride()
        plain, exact = BN_STATS.reference(out), BN_STATS.reference(out.double())
        deviation = float((exact[1] / self.count).mean().sqrt())
        for row, scale in ((0, deviation + rms(exact[0])), (1, None)):
            assert_within_budget(ours[row], plain[row], exact[row], f"{self}, row {row}", scale=scale)
        return ours

    def check_reduce(self) -> Tensor:
        """The sums, with the forward's result emitted, which must be the forward's bits."""
        self._leave_the_kinks()
        values = self.count / (self.y.shape[0] if self.gained else 1)
        terms = rms(self.grad) * values**0.5  # a sum of numbers that cancel: one rounding of those is always allowed
        args = (self.grad, *self.operands)
        sums, emitted = compare(str(self), JOIN_BACKWARD_REDUCE, (*args, True, *self.modifiers), (terms, None))
        assert torch.equal(emitted, JOIN.overload("cuda")(*self.operands, *self.modifiers))
        again, none = JOIN_BACKWARD_REDUCE.overload("cuda")(*args, False, *self.modifiers)
        assert torch.equal(again, sums) and none.numel() == 0
        return sums

    def sums(self) -> Tensor:
        """Plausible totals for the second pass: rows of u, u yhat, g rhat and g."""
        draw = torch.randn(4, self.y.shape[1], generator=generator(8)) * self.count**0.5
        return draw.to(self.device)

    def check_apply(self, training: bool, *, offset: bool = False, addend: bool = False, into: Any = None) -> None:
        """``into``: a pair of a tensor to write to, and a check that nothing else of its buffer was written."""
        self._leave_the_kinks()
        sums = self.sums() if self.gained or offset else self.sums()[:3].contiguous()
        terms = torch.randn(self.shape[:2], generator=generator(9)).to(self.device) * 0.1 if offset else None
        more = self._tensor(LAYOUTS[self.layout], 10) if addend else None
        flags = (training and self.normed, training and self.residual == "affine", self.side is not None)
        args = (self.grad, *self.operands, sums if training else None, self.count, *flags, *self.modifiers, terms, more)
        compare(f"{self}, training {training}", JOIN_BACKWARD_APPLY, args)
        if into is not None:
            target, untouched = into
            expected, _ = JOIN_BACKWARD_APPLY.overload("cuda")(*args)
            empty, _ = JOIN_BACKWARD_APPLY.overload("cuda")(*args, target)
            assert empty.numel() == 0 and torch.equal(target, expected)
            untouched()

    def check_both(self, training: bool, *, emit: bool = True, addend: bool = False, into: Any = None) -> None:
        """Both passes at once, without a gain; what is given as for :meth:`check_apply`."""
        self._leave_the_kinks()
        more = self._tensor(LAYOUTS[self.layout], 10) if addend else None
        flags = (training and self.normed, training and self.residual == "affine", self.side is not None)
        args = (self.grad, *self.operands, emit, self.count, *flags, self.dropout, self.seed, more)
        # In training a gradient is what is left of terms that cancel; of a few pixels, to nothing.
        terms = [
            rms(self.grad) * (rms(norm[2]) if taken else 1) for norm, taken in zip((self.norm, self.res_norm), flags)
        ]
        scales = (rms(self.grad) * self.count**0.5, None, *terms)
        expected = compare(f"{self}, training {training}, both", JOIN_BACKWARD, args, scales)
        if into is not None:
            target, untouched = into
            found = JOIN_BACKWARD.overload("cuda")(*args, target)
            assert found[2].numel() == 0 and torch.equal(target, expected[2])
            assert all(torch.equal(found[i], expected[i]) for i in (0, 1, 3))
            untouched()


def check_bn_join(
    case: JoinCase, affine: bool = True, running: torch.dtype | None = torch.float32
) -> tuple[Tensor, ...]:
    """The norm of ``case.y``'s batch statistics and the join behind it; returns the kernel's results."""
    draw = torch.randn(3, case.shape[1], generator=generator(12)).to(case.device)
    gamma, beta = (draw[0] + 1.5, draw[1]) if affine else (None, None)
    found = []
    for overload, widen in (("cuda", False), ("reference", False), ("reference", True)):
        buffers = [None, None] if running is None else [draw[2].to(running), draw[0].abs().to(running) + 0.5]
        tensors = (case.y, gamma, beta, *buffers, case.side, case.res_norm)
        y, g, b, mean, var, side, res_norm = wide(tensors) if widen else tensors
        ending = (case.act.code, case.act.param, case.dropout, case.seed)
        out, rows = BN_JOIN.overload(overload)(y, g, b, mean, var, 0.3, 1e-5, side, res_norm, *ending)
        found.append([out, *rows.unbind(0), *(t for t in (mean, var) if t is not None)])
    # What the mean, and so the shift, are made of are values that may cancel.
    scales = [None, rms(case.y), None, None, rms(found[2][3]) * rms(case.y), rms(case.y)]
    names = ("out", "mean", "rstd", "scale", "shift", "running_mean", "running_var")
    for name, scale, ours, plain, exact in zip(names, [*scales, None], *found):
        assert_within_budget(ours, plain, exact, f"{case}, {name}", scale=scale)
    assert found[0][0].stride() == torch.empty_like(case.y).stride()
    return tuple(found[0])


# ---------------------------------------------------------------------------------------------------------------------
# Max pooling
# ---------------------------------------------------------------------------------------------------------------------

POOLINGS = {
    "3, stride 2, padded": pool_window(3, 2, 1),
    "2": pool_window(2),
    "3, stride 2, ceil": pool_window(3, 2, 0, ceil_mode=True),
    "3, stride 1, padded": pool_window(3, 1, 1),
    "asymmetric": pool_window((2, 5), (3, 1), (1, 2)),
    "gaps": pool_window((2, 1), 3, ceil_mode=True),
}


@dataclass
class PoolCase:
    """A pooling of a join, and the checks of its forward and its backward."""

    shape: tuple[int, int, int, int]
    window: PoolWindow
    layout: str = "channels_last"
    dtype: torch.dtype = torch.float32
    act: Activation = field(default_factory=lambda: Activation("relu"))
    normed: bool = True
    device: str = "cpu"

    def __post_init__(self) -> None:
        join = JoinCase(self.shape, self.layout, self.dtype, act=self.act, normed=self.normed, device=self.device)
        self.y, self.norm = join.y, join.norm

    def __str__(self) -> str:
        norm = "" if self.normed else ", no norm"
        return f"{self.shape} {self.layout} {self.dtype} {self.window} {self.act}{norm}"

    @property
    def operands(self) -> tuple:
        return self.y, self.norm, self.act.code, self.act.param, *self.window

    def pooled(self, record: bool = True) -> tuple[Tensor, Tensor]:
        return JOIN_POOL.overload("cuda")(*self.operands, record)

    def check_forward(self) -> Tensor:
        """Bit by bit the pooling of what the join gives, so that ties are stock PyTorch's; returns the numbers."""
        joined = JOIN.overload("cuda")(self.y, self.norm, None, None, self.act.code, self.act.param)
        expected = JOIN_POOL.overload("reference")(joined, None, 0, 0.0, *self.window, True)
        out, taken = self.pooled()
        for ours, stock in zip((out, taken), expected):
            assert ours.dtype == stock.dtype and self._is_laid_out(ours), str(self)
            torch.testing.assert_close(ours, stock, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{self}: {text}")
        again, none = self.pooled(record=False)
        assert none.shape == (0,) and none.dtype == torch.uint8
        torch.testing.assert_close(again, out, rtol=0, atol=0, equal_nan=True)
        return taken

    def check_against_float64(self) -> None:
        compare(str(self), JOIN_POOL, (*self.operands, False))

    def check_backward(self, grad: Tensor | None = None) -> Tensor:
        _, taken = self.pooled()
        if grad is None:
            make = channels_last if self._format is torch.channels_last else contiguous
            grad = on_device(make(tuple(taken.shape), self.dtype, 6), self.device)
        (found,) = compare(f"{self}, backward", JOIN_POOL_BACKWARD, (grad, taken, self.y, *self.window[:3]))
        assert self._is_laid_out(found), str(self)
        return found

    @property
    def _format(self) -> torch.memory_format:
        """Of the results: channels_last where ``y`` is dense in both layouts."""
        last = self.y.is_contiguous(memory_format=torch.channels_last) or not self.y.is_contiguous()
        return torch.channels_last if last else torch.contiguous_format

    def _is_laid_out(self, result: Tensor) -> bool:
        return result.stride() == torch.empty(result.shape, memory_format=self._format).stride()


# ---------------------------------------------------------------------------------------------------------------------
# Ops that treat every element alike
# ---------------------------------------------------------------------------------------------------------------------

RK_WEIGHTS = [0.125, -0.3, 1.0, 0.7, -1.4, 0.02, 2.0]
TOLERANCES = (1e-3, 1e-4)
THRESHOLD = 0.4
_DRAWS = 9


def rk_operands(
    make: Callable[..., Tensor], shape: tuple[int, ...], stages: int, dtype: torch.dtype, device: str, draw: int = 0
) -> tuple[Tensor, Tensor, list[Tensor], list[float]]:
    """Two states, stages, and their weights."""
    y0, y1, *ks = (on_device(make(shape, dtype, 100 * draw + seed), device) for seed in range(stages + 2))
    return y0, y1, ks, (RK_WEIGHTS * (1 + stages // len(RK_WEIGHTS)))[:stages]


def check_rk(make: Callable[..., Tensor], shape: tuple[int, ...], stages: int, dtype: torch.dtype, device: str) -> None:
    """The update, its backward, and the norm of the error."""
    y0, _, ks, weights = rk_operands(make, shape, stages, dtype, device)
    name = f"{shape} {dtype}, {stages} stages"
    (out,) = compare(name, RK_COMBINE, (y0, ks, weights))
    assert out.stride() == torch.empty_like(y0).stride()
    for grad in compare(f"{name}, backward", RK_COMBINE_BACKWARD, (y0, weights)):
        assert grad.stride() == torch.empty_like(y0).stride()
    # A single number, whose rounding luck may spare: of one draw it says nothing.
    draws = [rk_operands(make, shape, stages, dtype, device, draw) for draw in range(_DRAWS)]
    errors = []
    for overload, operands in (("cuda", draws), ("reference", draws), ("reference", wide(draws))):
        call = RK_ERROR.overload(overload)
        errors.append(torch.stack([call(*each, *TOLERANCES) for each in operands]))
    assert_within_budget(*errors, f"{name}, error")


def check_rounded_tolerances(device: str) -> None:
    """Tolerances that float32 makes smaller by half a unit: the norm is that of those that were given."""
    ones = torch.ones(70, device=device)
    tolerance = 2.0**-10 * (1 + 0.99 * 2.0**-24)
    for rtol, atol in ((0.0, tolerance), (tolerance, 0.0), (tolerance, tolerance)):
        error = RK_ERROR.overload("cuda")(ones, ones, [ones], [1.0], rtol, atol)
        assert torch.equal(error.cpu(), torch.tensor(1 / (rtol + atol))), (rtol, atol)


def gated_operands(
    make: Callable[..., Tensor], shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A gradient, the logits, the branch and the skip; no logit where rounding decides whether its gate is open."""
    grad, logits, f, x = (make(shape, dtype, seed) for seed in range(4))
    logits = logits.clone()
    logits[(torch.sigmoid(logits.double()) - THRESHOLD).abs() < 0.02] += 0.5
    return tuple(on_device(t, device) for t in (grad, logits, f, x))


def check_gated_join(make: Callable[..., Tensor], shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    """The gated join and its backward: smooth and sparse, with every choice of gradients."""
    grad, logits, f, x = gated_operands(make, shape, dtype, device)
    for threshold in (None, THRESHOLD):
        name = f"{shape} {dtype}, threshold {threshold}"
        (out,) = compare(name, GATED_JOIN, (f, logits, x, threshold))
        assert out.stride() == torch.empty_like(f).stride()
        for sides in ((f, x), (None, None)):
            for needed in itertools.product((True, False), repeat=2):
                args = (grad, logits, *sides, threshold, *needed)
                compare(f"{name}, needed {needed}", GATED_JOIN_BACKWARD, args)
