"""The budgets: what passes, what does not, and that the inputs are what they say."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fusedres.testing import FACTOR, INPUTS, assert_within_budget, budget, channels_last, compare, rms

EXACT = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
STOCK = EXACT.float() * (1 + 1e-5)


def test_budget_is_twice_stocks_error_and_a_rounding():
    error = rms(STOCK.double() - EXACT)
    assert budget(STOCK, EXACT) == pytest.approx(FACTOR * error, rel=0.01)
    assert 0 < budget(EXACT.float(), EXACT) < 3e-7 * rms(EXACT)
    assert budget(STOCK, EXACT, scale=1e6) > 0.01


def test_within_and_over():
    assert_within_budget(EXACT.float() * (1 + 1.9e-5), STOCK, EXACT)
    with pytest.raises(AssertionError, match=r"weight: error .* over budget"):
        assert_within_budget(EXACT.float() * (1 + 2.1e-5), STOCK, EXACT, "weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_one_wrong_element_is_over(value):
    wrong = EXACT.float()
    wrong[wrong.abs().argmax()] = value
    with pytest.raises(AssertionError):
        assert_within_budget(wrong, STOCK, EXACT)


def test_shapes_and_dtypes_must_be_stocks():
    with pytest.raises(AssertionError, match=r"\(1000,\) torch.float64 against stock's \(1000,\) torch.float32"):
        assert_within_budget(EXACT, STOCK, EXACT)
    with pytest.raises(AssertionError, match=r"\(1, 1000\)"):
        assert_within_budget(STOCK[None], STOCK, EXACT)


class Norm(nn.BatchNorm2d):
    """A batch norm that can be made wrong."""

    wrong = ""

    def forward(self, x):
        out = super().forward(x)
        if self.wrong == "output":
            return out + 1e-3
        if self.wrong == "gradient":
            return out + 1e-3 * (x - x.detach())
        if self.wrong == "buffer":
            self.running_mean.data += 1e-4
        return out


def compared(wrong: str, **options):
    def fuse(module: nn.Module) -> nn.Module:
        module = copy.deepcopy(module)
        module.wrong = wrong
        return module

    return compare(Norm(8), fuse, lambda seed: [channels_last((4, 8, 6, 6), seed=seed)], **options)


def test_compare_accepts_the_same_and_finds_what_differs():
    compared("").check()
    for wrong, names in (("output", ["output"]), ("gradient", ["grad of input 0"]), ("buffer", ["running_mean"])):
        report = compared(wrong)
        assert [entry.name for entry in report.entries if not entry.ok] == names
        assert "over budget" in str(report)
        with pytest.raises(AssertionError, match=names[0]):
            report.check()


def test_compare_names_every_tensor():
    names = [entry.name for entry in compared("").entries]
    buffers = ["running_mean", "running_var", "num_batches_tracked"]
    assert names == ["output", "grad of input 0", "grad of weight", "grad of bias", *buffers]
    assert [entry.name for entry in compared("", backward=False).entries] == ["output", *buffers]


@pytest.mark.parametrize(
    ("wrong", "ok", "drawn"), [([0], True, 3), ([0, 1, 5], True, 31), (range(15), True, 31), (range(16), False, 31)]
)
def test_bad_luck_is_forgiven_unless_half_of_all_draws_have_it(wrong, ok, drawn):
    seeds = []

    def fuse(module: nn.Module) -> nn.Module:
        module = copy.deepcopy(module)
        module.wrong = "output" if seeds[-1] in wrong else ""
        return module

    def inputs(seed: int) -> list[torch.Tensor]:
        seeds.append(seed)
        return [channels_last((4, 8, 6, 6), seed=seed)]

    assert compare(Norm(8), fuse, inputs).ok is ok
    assert seeds == list(range(drawn))


def test_compare_leaves_the_module_alone():
    module = Norm(8)
    before = copy.deepcopy(module.state_dict())
    compare(module, lambda m: m, lambda seed: [channels_last((4, 8, 6, 6), seed=seed)], dtype=torch.bfloat16).check()
    assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), before.values()))
    assert all(p.grad is None for p in module.parameters())


def test_inputs_hold_normal_numbers_in_the_layout_of_their_name():
    shape = (3, 5, 4, 6)
    made = {name: make(shape, torch.float32, 1) for name, make in INPUTS.items()}
    for name, x in made.items():
        assert x.shape == shape and x.isfinite().all()
        if name != "expanded":
            assert torch.equal(x, made["contiguous"])
    last = {"memory_format": torch.channels_last}
    assert made["contiguous"].is_contiguous() and made["channels_last"].is_contiguous(**last)
    assert not any(
        made[n].is_contiguous() or made[n].is_contiguous(**last) for n in ("sliced", "transposed", "expanded")
    )
    assert made["expanded"].stride()[0] == made["expanded"].stride()[3] == 0


def test_uninitialised_memory_is_poisoned():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        assert torch.empty(5, dtype=dtype).isnan().all()
        assert torch.zeros(5, dtype=dtype).new_empty(5).isnan().all()
        assert torch.empty_like(torch.zeros(2, 3, 4, 5, dtype=dtype)).isnan().all()
