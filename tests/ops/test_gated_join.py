"""The gated join and its backward: kernels, the public function, and what autograd keeps, against stock PyTorch."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fusedres
from fusedres import select
from fusedres.benchmarking.memory import saved_bytes
from fusedres.ops import gated_join
from fusedres.testing import INPUTS, assert_within_budget, channels_last, compare, contiguous

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = {"channels_last": channels_last, "contiguous": contiguous}
THRESHOLD = 0.4
KINDS = {
    "smooth": {},
    "sparse": {"threshold": THRESHOLD},
    "straight through": {"threshold": THRESHOLD, "straight_through": True},
}
relaxed = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


def stock(f: Tensor, logits: Tensor, x: Tensor, threshold: float | None = None, straight_through: bool = False):
    """As the survey writes it."""
    gate = torch.sigmoid(logits)
    if threshold is not None:
        mask = (gate > threshold).to(gate.dtype)
        gate = mask + (gate - gate.detach()) if straight_through else mask
    return gate * f + (1 - gate) * x


def off_the_threshold(logits: Tensor) -> Tensor:
    """Moves logits away from where rounding decides whether a gate is open."""
    logits[(torch.sigmoid(logits.double()) - THRESHOLD).abs() < 0.02] += 0.5
    return logits


def operands(make, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """``f``, ``logits``, ``x`` and a gradient."""
    f, logits, x, grad = (make(shape, dtype, seed) for seed in range(4))
    return [f, off_the_threshold(logits.clone()), x, grad]


def of_stock(tensors: list[Tensor], options: dict) -> list[Tensor | None]:
    """Output and the gradients of ``f``, ``logits`` and ``x``."""
    *leaves, grad = (t.detach() for t in tensors)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    out = stock(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad, allow_unused=True)]


def of_kernels(tensors: list[Tensor], options: dict, suffix: str = "_cpu") -> list[Tensor | None]:
    f, logits, x, grad = tensors
    threshold = options.get("threshold")
    out = getattr(torch.ops.fusedres, f"gated_join{suffix}")(f, logits, x, threshold)
    differentiable = threshold is None or "straight_through" in options
    sides = (f, x) if differentiable else (None, None)
    backward = getattr(torch.ops.fusedres, f"gated_join_backward{suffix}")
    df, dlogits, dx = backward(grad, logits, *sides, threshold, True, True)
    assert differentiable or dlogits.numel() == 0
    return [out, df, dlogits if differentiable else None, dx]


# ---------------------------------------------------------------------------------------------------------------------
# The kernels
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_against_float64(isa, layout, dtype, kind):
    tensors = operands(LAYOUTS[layout], (2, 37, 7, 5), dtype)
    exact = of_stock([t.double() for t in tensors], KINDS[kind])
    names = "output", "df", "dlogits", "dx"
    for name, ours, expected, reference in zip(
        names, of_kernels(tensors, KINDS[kind]), of_stock(tensors, KINDS[kind]), exact
    ):
        if expected is None:
            assert ours is None and name == "dlogits" and kind == "sparse"
            continue
        assert ours.stride() == tensors[0].stride()
        assert_within_budget(ours, expected, reference, name)


def close_to_reference(tensors: list[Tensor], options: dict) -> None:
    for ours, reference in zip(of_kernels(tensors, options), of_kernels(tensors, options, "")):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_every_remainder(isa, kind):
    for length in range(1, 68):
        close_to_reference(operands(contiguous, (length,)), KINDS[kind])


@relaxed
@given(
    shape=st.one_of(
        st.tuples(st.integers(0, 3), st.integers(1, 70), st.integers(0, 17), st.integers(1, 17)),
        st.tuples(st.integers(0, 9), st.integers(1, 300)),
        st.tuples(st.integers(1, 5), st.integers(0, 5), st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)),
    ),
    layout=st.sampled_from(sorted(LAYOUTS)),
    kind=st.sampled_from(sorted(KINDS)),
)
def test_any_shape(shape, layout, kind):
    make = LAYOUTS[layout] if len(shape) == 4 else contiguous
    close_to_reference(operands(make, shape), KINDS[kind])


@pytest.mark.parametrize("kind", ["smooth", "sparse"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_values_travel_as_in_stock(isa, dtype, kind):
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 1.5])
    # Every combination, on long enough a tensor to reach the vector loop and its tail.
    f, logits, x, grad = (t.flatten().to(dtype) for t in torch.meshgrid(*[values] * 4, indexing="ij"))
    ours, expected = (of([f, logits, x, grad], KINDS[kind]) for of in (of_kernels, of_stock))
    for name, a, b in zip(("output", "df", "dlogits", "dx"), ours, expected):
        if name == "dlogits":
            continue  # grad f - grad x, as autograd computes it, has NaN where grad (f - x) has infinity
        assert torch.equal(a.isnan(), b.isnan()), name
        assert torch.equal(a[a.isinf()], b[b.isinf()]), name


def test_a_saturated_gate_is_exactly_open_or_shut(isa):
    logits = torch.tensor([-200.0, -89.0, 200.0]).repeat(11)
    f, x = torch.full_like(logits, 3.0), torch.full_like(logits, 5.0)
    out = torch.ops.fusedres.gated_join_cpu(f, logits, x, None)
    assert torch.equal(out, torch.tensor([5.0, 5.0, 3.0]).repeat(11))


def test_bitwise_the_same_for_any_number_of_threads(threads):
    tensors = operands(channels_last, (3, 48, 33, 33), torch.bfloat16)
    for one, two in zip(threads(1, of_kernels, tensors, {}), threads(2, of_kernels, tensors, {})):
        assert torch.equal(one, two)


def test_kernels_refuse_what_does_not_fit():
    f = torch.zeros(2, 3, 4, 5)
    with pytest.raises(RuntimeError, match="logits differs"):
        torch.ops.fusedres.gated_join_cpu(f, f[:, :2].contiguous(), f, None)
    with pytest.raises(RuntimeError, match="x must have the dtype"):
        torch.ops.fusedres.gated_join_cpu(f, f, f.bfloat16(), None)
    with pytest.raises(RuntimeError, match="contiguous"):
        torch.ops.fusedres.gated_join_cpu(f, f, f.contiguous(memory_format=torch.channels_last), None)


# ---------------------------------------------------------------------------------------------------------------------
# The public function
# ---------------------------------------------------------------------------------------------------------------------


class Join(nn.Module):
    """The function, or the survey's formula, as a module of three inputs."""

    def __init__(self, function, kind: str) -> None:
        super().__init__()
        self.function, self.kind = function, kind

    def forward(self, f: Tensor, logits: Tensor, x: Tensor) -> Tensor:
        return self.function(f, logits, x, **KINDS[self.kind])


@pytest.mark.parametrize("make", INPUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("run", [{}, {"dtype": torch.bfloat16}, {"dtype": torch.float64}], ids=str)
def test_function_against_stock(kind, make, run):
    def inputs(seed: int) -> list[Tensor]:
        f, logits, x = (INPUTS[make]((3, 20, 9, 8), seed=3 * seed + i) for i in range(3))
        return [f, off_the_threshold(logits.clone()), x]

    compare(Join(stock, kind), lambda plain: Join(gated_join, kind), inputs, **run).check()


@pytest.mark.parametrize("kind", KINDS)
def test_operands_and_gradients_of_any_strides(kind):
    def inputs(seed: int) -> list[Tensor]:
        f, logits, x = (make((3, 20, 9, 8), seed=seed + i) for i, make in enumerate(INPUTS.values()) if i < 3)
        return [f, off_the_threshold(logits.clone()), x]

    def expanded(out: Tensor) -> Tensor:
        return torch.randn((), generator=torch.Generator().manual_seed(1)).to(out.dtype).expand(out.shape)

    compare(Join(stock, kind), lambda plain: Join(gated_join, kind), inputs, cotangent=expanded).check()


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_takes_what_stock_takes(kind):
    f, logits, x, _ = operands(channels_last, (2, 16, 6, 6))
    given = [f.bfloat16(), logits.bfloat16(), x]
    results = []
    for function in (stock, gated_join):
        leaves = [t.clone().requires_grad_() for t in given]
        with torch.autocast("cpu", torch.bfloat16):
            out = function(*leaves, **KINDS[kind])
        out.backward(torch.ones_like(out))
        results.append([out, *(leaf.grad for leaf in leaves)])
    exact_leaves = [t.double().requires_grad_() for t in given]
    exact = stock(*exact_leaves, **KINDS[kind])
    exact.backward(torch.ones_like(exact))
    for expected, ours, reference in zip(*results, [exact, *(leaf.grad for leaf in exact_leaves)]):
        if expected is None:
            assert ours is None
        else:
            assert_within_budget(ours.detach(), expected.detach(), reference.detach())


@pytest.mark.parametrize("kind", ["smooth", "straight through"])
def test_gradcheck(kind):
    leaves = [t.requires_grad_() for t in operands(contiguous, (2, 3, 2, 2), torch.float64)[:3]]
    if kind == "smooth":
        torch.autograd.gradcheck(gated_join, leaves)
        torch.autograd.gradgradcheck(gated_join, leaves)
        return
    # A finite difference does not see a gradient that is passed straight through; its definition does.
    ours, expected = (
        torch.autograd.grad(function(*leaves, **KINDS[kind]).square().sum(), leaves) for function in (gated_join, stock)
    )
    torch.testing.assert_close(ours, expected)


def test_every_choice_of_gradients():
    tensors = operands(channels_last, (2, 12, 4, 4))[:3]
    for wanted in range(1, 8):
        for kind, options in KINDS.items():
            leaves = [t.clone().requires_grad_(bool(wanted >> i & 1)) for i, t in enumerate(tensors)]
            out = gated_join(*leaves, **options)
            if not out.requires_grad:
                assert kind == "sparse" and wanted == 2
                continue
            out.sum().backward()
            expected = of_stock([*tensors, torch.ones_like(out)], options)[1:]
            for leaf, gradient in zip(leaves, expected):
                assert (leaf.grad is None) == (not leaf.requires_grad or gradient is None)
                if leaf.grad is not None:
                    torch.testing.assert_close(leaf.grad, gradient)


@pytest.mark.parametrize("kind, tensors", [("smooth", 3), ("sparse", 1), ("straight through", 3)])
def test_what_autograd_keeps(kind, tensors):
    leaves = [t.requires_grad_() for t in operands(channels_last, (2, 16, 8, 8))[:3]]
    kept = saved_bytes(nn.Identity(), lambda: gated_join(*leaves, **KINDS[kind]))
    assert kept == tensors * leaves[0].nbytes
    assert kept < saved_bytes(nn.Identity(), lambda: stock(*leaves, **KINDS[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_and_transformed_it_is_stock(kind):
    f, logits, x, _ = operands(contiguous, (2, 6, 4, 4))
    options = KINDS[kind]
    expected = stock(f, logits, x, **options)
    compiled = torch.compile(lambda *tensors: gated_join(*tensors, **options), backend="eager", fullgraph=True)
    assert torch.equal(compiled(f, logits, x), expected)
    assert torch.equal(torch.vmap(lambda *tensors: gated_join(*tensors, **options))(f, logits, x), expected)
    with fusedres.use_backend("stock"):
        assert torch.equal(gated_join(f, logits, x, **options), expected)


def test_small_tensors_run_as_stock_unless_a_backend_is_forced(monkeypatch):
    monkeypatch.setitem(select.FEWEST_ELEMENTS, "elementwise", 100)
    for elements, fused in ((99, False), (100, True)):
        leaves = [torch.randn(elements, requires_grad=True) for _ in range(3)]
        assert ("GatedJoin" in gated_join(*leaves).grad_fn.name()) is fused
        with fusedres.use_backend("reference"):
            assert "GatedJoin" in gated_join(*leaves).grad_fn.name()


def test_a_backend_without_the_op_leaves_it_to_stock(monkeypatch):
    module = sys.modules["fusedres.ops.gated_join"]
    leaf = torch.randn(8, requires_grad=True)
    for backend, fused in (("cpu", True), ("reference", True), ("another", False), ("stock", False)):
        monkeypatch.setattr(module, "backend_for", lambda *_, backend=backend: backend)
        assert ("GatedJoin" in gated_join(leaf, leaf, leaf).grad_fn.name()) is fused


def test_empty_batches():
    leaves = [torch.zeros(0, 4, 3, 3, requires_grad=True) for _ in range(3)]
    out = gated_join(*leaves)
    out.sum().backward()
    assert out.shape == (0, 4, 3, 3) and all(leaf.grad.shape == out.shape for leaf in leaves)


def test_wrong_arguments_are_named():
    f = torch.zeros(2, 3, 4, 5)
    with pytest.raises(TypeError, match="logits must be a tensor, got list"):
        gated_join(f, [1.0], f)
    with pytest.raises(ValueError, match=r"x of shape \(2, 3, 4, 4\) does not fit f of shape \(2, 3, 4, 5\)"):
        gated_join(f, f, f[..., :4])
    with pytest.raises(TypeError, match=r"logits of shape .* is torch.bfloat16, expected torch.float32"):
        gated_join(f, f.bfloat16(), f)
    with pytest.raises(TypeError, match=r"f must be of a dtype among .*, got torch.int64"):
        gated_join(f.long(), f, f)
    with pytest.raises(TypeError, match="threshold must be a number or None, got str"):
        gated_join(f, f, f, threshold="0.5")
    with pytest.raises(ValueError, match="straight_through=True needs a threshold"):
        gated_join(f, f, f, straight_through=True)
