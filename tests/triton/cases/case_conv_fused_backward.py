"""The gradients of fused convolutions, against float64 and against the autograd of stock PyTorch's ops."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from triton_operands import GEOMETRIES, WAYS, rows, walked

from fusedres.ops.bn_norm import BN_NORM
from fusedres.ops.bn_stats import BN_STATS
from fusedres.ops.conv import ConvGeometry, output_size
from fusedres.ops.conv_fused import CONV_FUSED_FPROP
from fusedres.ops.conv_fused_backward import BN_GRAD_ROWS, CONV_FUSED_DGRAD, CONV_FUSED_WGRAD
from fusedres.ops.join import JOIN
from fusedres.ops.join_backward import JOIN_BACKWARD_REDUCE
from fusedres.testing import assert_within_budget, channels_last, rms, sliced

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINKS = (-3.0, 0.0, 3.0, 6.0)
relaxed = settings(deadline=None, max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
DGRADS = ["1x1", "1x1 stride 2", "3x3", "3x3 dilated"]


class Case:
    """Operands of both gradients; no argument of the activation is near a kink."""

    def __init__(self, device, shape, filters, geometry, dtype, act=1, normed=True, behind=True, addend=False,
                 make=channels_last):  # fmt: skip
        self.kernel, *self.geometry = GEOMETRIES[geometry]
        n, c, h, w = shape
        size = output_size((h, w), self.kernel, ConvGeometry(*self.geometry, 1))
        self.act = act
        self.norm = rows(c, 2, "cpu") if normed else None
        self.x = make(shape, dtype, 1)
        for _ in range(30):
            z = JOIN.reference(self.x, self.norm, None, None, 0, 0.0).double()
            near = torch.stack([(z - kink).abs() < 0.05 for kink in KINKS]).any(0)
            self.x[near] += 0.3
        assert not near.any()
        self.g, self.y = make((n, filters, *size), dtype, 3), make((n, filters, *size), dtype, 4)
        self.grad_rows = rows(filters, 5, "cpu") if behind else None
        weight = torch.randn(filters, c, *self.kernel, generator=torch.Generator().manual_seed(6))
        self.weight = (weight / filters**0.5).to(dtype)
        self.addend = make(shape, dtype, 7) if addend else None
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.to(device))

    def dgrad(self, op, cast=lambda t: t, into=None):
        def of(*values):
            return [cast(t) if isinstance(t, torch.Tensor) else t for t in values]

        operands = of(self.g, self.y, self.grad_rows, self.weight, self.x, self.norm, self.act, 0.125)
        return op(*operands, *map(list, self.geometry), *of(self.addend), into)

    def wgrad(self, op, cast=lambda t: t, out=None):
        def of(*values):
            return [cast(t) if isinstance(t, torch.Tensor) else t for t in values]

        out = torch.empty_like(cast(self.weight)) if out is None else out
        operands = of(self.g, self.y, self.grad_rows, self.x, self.norm, self.act, 0.125)
        op(*operands, *map(list, self.geometry), out)
        return out

    def every(self, run, op):
        return run(op.overload("triton")), run(op.reference), run(op.reference, lambda t: t.double())


def check_dgrad(case):
    ours, plain, exact = case.every(case.dgrad, CONV_FUSED_DGRAD)
    assert ours[0].is_contiguous(memory_format=torch.channels_last)
    assert_within_budget(ours[0], plain[0], exact[0], "dx")
    if case.norm is None:
        assert ours[1].numel() == 0
        return
    # The sums are of what was stored, as a pass over it would find them.
    stored = JOIN_BACKWARD_REDUCE.reference(ours[0].double(), case.x.double(), case.norm.double(), *_NOTHING)[0][:2]
    again = JOIN_BACKWARD_REDUCE.reference(ours[0], case.x, case.norm, *_NOTHING)[0][:2]
    assert_within_budget(ours[1], again, stored, "sums", scale=rms(ours[0]) * (case.x.numel() / case.x.shape[1]) ** 0.5)


_NOTHING = (None, None, 0, 0.0, False)


@pytest.mark.parametrize("geometry", DGRADS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dgrad(device, dtype, geometry):
    check_dgrad(Case(device, (2, 37, 9, 7), 45, geometry, dtype))


@pytest.mark.parametrize("act", range(7))
def test_dgrad_through_every_activation(device, act):
    check_dgrad(Case(device, (1, 16, 5, 5), 24, "1x1", torch.float32, act, normed=act != 3))


@pytest.mark.parametrize("geometry", DGRADS)
def test_dgrad_plain(device, geometry):
    check_dgrad(Case(device, (2, 16, 6, 5), 24, geometry, torch.float32, 0, normed=False, behind=False))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("geometry", ["1x1", "1x1 stride 2", "3x3"])
@pytest.mark.parametrize("pending", [False, True])
def test_dgrad_adds_the_skip(device, geometry, in_place, pending):
    if pending and geometry == "1x1 stride 2":
        pytest.skip("refused: see test_what_dgrad_refuses")
    case = Case(device, (2, 16, 6, 5), 24, geometry, torch.bfloat16, int(pending), pending, addend=True)
    expected, plain, exact = case.every(case.dgrad, CONV_FUSED_DGRAD)
    assert_within_budget(expected[0], plain[0], exact[0])
    buffer = channels_last((2, 40, 6, 5), torch.bfloat16, 8).to(device)
    into = buffer[:, 8:24]
    if in_place:
        case.addend = into.copy_(case.addend)
    before = buffer.clone()
    dx, sums = case.dgrad(CONV_FUSED_DGRAD.overload("triton"), into=into)
    assert dx.numel() == 0 and torch.equal(into, expected[0]) and torch.equal(sums, expected[1])
    assert torch.equal(buffer[:, :8], before[:, :8]) and torch.equal(buffer[:, 24:], before[:, 24:])


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_wgrad(device, dtype, geometry):
    case = Case(device, (2, 37, 9, 7), 45, geometry, dtype)
    assert_within_budget(*case.every(case.wgrad, CONV_FUSED_WGRAD))


@pytest.mark.parametrize(
    "normed,behind,act", [(False, False, 0), (False, True, 0), (True, False, 4), (False, False, 2)]
)
def test_wgrad_with_fewer_prologues(device, normed, behind, act):
    case = Case(device, (2, 16, 6, 5), 24, "3x3", torch.float32, act, normed, behind)
    assert_within_budget(*case.every(case.wgrad, CONV_FUSED_WGRAD))


def test_wgrad_of_another_dtype_and_layout(device):
    case = Case(device, (2, 16, 6, 5), 24, "3x3", torch.bfloat16)
    narrow = case.wgrad(CONV_FUSED_WGRAD.overload("triton"))
    for layout in (torch.contiguous_format, torch.channels_last):
        out = torch.empty(24, 16, 3, 3, device=device).contiguous(memory_format=layout)
        assert torch.equal(case.wgrad(CONV_FUSED_WGRAD.overload("triton"), out=out).bfloat16(), narrow)


def launched(run, op):
    """The first launch of a pass, which does not run."""
    from fusedres.triton.launch import recorded

    with recorded() as launches:
        run(op.overload("triton"))
    return launches[0]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("geometry", DGRADS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_way_of_dgrad_over_the_tiles(device, dtype, geometry, way):
    case = Case(device, (2, 40, 9, 7), 48, geometry, dtype)
    with walked(way):
        check_dgrad(case)
        launch = launched(case.dgrad, CONV_FUSED_DGRAD)
    assert launch.meta["DESCRIPTORS"] == WAYS[way].descriptors
    assert launch.grid == (2,) or not WAYS[way].persistent


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("geometry", ["1x1", "1x1 stride 2", "3x3"])
def test_every_way_of_dgrad_adds_the_skip_in_place(device, geometry, way):
    case = Case(device, (2, 40, 6, 5), 24, geometry, torch.bfloat16, 0, normed=False, addend=True)
    _, plain, exact = case.every(case.dgrad, CONV_FUSED_DGRAD)
    case.addend = case.addend.clone(memory_format=torch.channels_last)
    with walked(way):
        case.dgrad(CONV_FUSED_DGRAD.overload("triton"), into=case.addend)
    assert_within_budget(case.addend, plain[0], exact[0])


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_wgrad_by_descriptor(device, dtype, geometry):
    case = Case(device, (2, 40, 9, 7), 48, geometry, dtype)
    with walked("by descriptor"):
        assert_within_budget(*case.every(case.wgrad, CONV_FUSED_WGRAD))
        assert launched(case.wgrad, CONV_FUSED_WGRAD).meta["DESCRIPTORS"]


def test_what_descriptors_cannot_describe_comes_by_address(device):
    case = Case(device, (2, 40, 6, 5), 37, "1x1", torch.bfloat16)
    with walked("persistent"):
        check_dgrad(case)
        assert_within_budget(*case.every(case.wgrad, CONV_FUSED_WGRAD))
        assert not launched(case.dgrad, CONV_FUSED_DGRAD).meta["DESCRIPTORS"]
        assert not launched(case.wgrad, CONV_FUSED_WGRAD).meta["DESCRIPTORS"]


@relaxed
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 80), st.integers(3, 8), st.integers(3, 8)),
    filters=st.integers(1, 140),
    geometry=st.sampled_from(DGRADS),
    normed=st.booleans(),
    behind=st.booleans(),
    way=st.sampled_from([None, *WAYS]),
)
def test_any_shape(device, shape, filters, geometry, normed, behind, way):
    case = Case(device, shape, filters, geometry, torch.bfloat16, 4, normed, behind)
    with walked(way) if way else nullcontext():
        check_dgrad(case)
    assert_within_budget(*case.every(case.wgrad, CONV_FUSED_WGRAD))


def test_slices_of_a_buffer(device):
    case = Case(device, (2, 24, 6, 5), 16, "3x3", torch.bfloat16, make=sliced)
    check_dgrad(case)
    assert_within_budget(*case.every(case.wgrad, CONV_FUSED_WGRAD))


def test_nothing(device):
    case = Case(device, (0, 8, 4, 4), 16, "1x1", torch.float32)
    dx, sums = case.dgrad(CONV_FUSED_DGRAD.overload("triton"))
    assert dx.shape == (0, 8, 4, 4) and not sums.any()
    assert not case.wgrad(CONV_FUSED_WGRAD.overload("triton")).any()


def test_the_same_from_run_to_run(device):
    case = Case(device, (2, 40, 12, 9), 36, "3x3", torch.bfloat16)
    assert torch.equal(case.wgrad(CONV_FUSED_WGRAD.overload("triton")), case.wgrad(CONV_FUSED_WGRAD.overload("triton")))
    first, second = (case.dgrad(CONV_FUSED_DGRAD.overload("triton")) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_what_dgrad_refuses(device):
    op = CONV_FUSED_DGRAD.overload("triton")
    with pytest.raises(ValueError, match=r"stride \(2, 2\) needs a 1x1 kernel"):
        Case(device, (1, 8, 5, 5), 8, "3x3 stride 2", torch.float32).dgrad(op)
    with pytest.raises(ValueError, match="takes no addend"):
        Case(device, (1, 8, 5, 5), 8, "1x1 stride 2", torch.float32, addend=True).dgrad(op)
    with pytest.raises(ValueError, match="takes no padding"):
        Case(device, (1, 8, 5, 5), 8, "1x1 padded", torch.float32).dgrad(op)


@pytest.mark.parametrize("training", [True, False])
def test_grad_rows(device, training):
    norm = rows(150, 1, device)
    sums = torch.randn(3, 150, generator=torch.Generator().manual_seed(2)).to(device) if training else None
    ours, plain = (op(norm, sums, 70.0) for op in (BN_GRAD_ROWS.overload("triton"), BN_GRAD_ROWS.reference))
    exact = BN_GRAD_ROWS.reference(norm.double(), None if sums is None else sums.double(), 70.0)
    for tensors in zip(ours, plain, exact):
        assert_within_budget(*tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_chain_is_differentiated_as_by_stock(device, dtype):
    """conv, norm, SiLU, conv, norm: forward and backward by the fused ops alone, from one raw tensor to the next."""
    x, top = channels_last((2, 16, 8, 7), dtype, 1).to(device), channels_last((2, 24, 8, 7), dtype, 2).to(device)
    generator = torch.Generator().manual_seed(3)
    weights = [
        torch.randn(s, generator=generator).mul(0.2).to(dtype).to(device) for s in ((20, 16, 3, 3), (24, 20, 1, 1))
    ]
    affines = [torch.randn(2, c, generator=generator).add(1.2).to(device) for c in (20, 24)]
    paddings = ([1, 1], [0, 0])

    def stock(wide):
        leaves = [t.to(wide).requires_grad_() for t in (x, *weights)]
        vectors = [t.to(torch.promote_types(wide, torch.float32)).requires_grad_() for t in affines]
        value = leaves[0]
        for i in range(2):
            value = F.conv2d(value if i == 0 else F.silu(value), leaves[1 + i], None, 1, paddings[i])
            value = F.batch_norm(value, None, None, vectors[i][0], vectors[i][1], True, 0.0, 1e-5)
        return torch.autograd.grad(value, leaves + vectors, top.to(wide))

    def op(declared, *args):
        return declared.overload("triton")(*args)

    raws, norms = [x], [None]
    for i in range(2):
        geometry = ([1, 1], paddings[i], [1, 1])
        y, stats = op(CONV_FUSED_FPROP, raws[i], norms[i], 4 * i, 0.0, weights[i], None, *geometry, True)
        raws.append(y)
        norms.append(op(BN_NORM, stats, y.numel() / y.shape[1], *affines[i], None, None, 0.0, 1e-5))
    assert torch.equal(norms[1][0], op(BN_STATS, raws[1])[0]) or rms(norms[1][0] - op(BN_STATS, raws[1])[0]) < 1e-6
    g, sums = top, op(JOIN_BACKWARD_REDUCE, top, raws[2], norms[2], None, None, 0, 0.0, False)[0]
    dweights, dvectors = [None, None], [None, None]
    for i in (1, 0):
        geometry = ([1, 1], paddings[i], [1, 1])
        dvectors[i] = torch.stack((sums[1], sums[0]))
        behind = g, raws[i + 1], op(BN_GRAD_ROWS, norms[i + 1], sums, g.numel() / g.shape[1])
        dweights[i] = torch.empty_like(weights[i])
        op(CONV_FUSED_WGRAD, *behind, raws[i], norms[i], 4 * i, 0.0, *geometry, dweights[i])
        g, sums = op(CONV_FUSED_DGRAD, *behind, weights[i], raws[i], norms[i], 4 * i, 0.0, *geometry)
    for i, tensors in enumerate(zip((g, *dweights, *dvectors), stock(dtype), stock(torch.float64))):
        assert_within_budget(*tensors, f"gradient {i}")
