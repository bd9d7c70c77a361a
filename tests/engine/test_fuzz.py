"""Random blocks with random lives against stock PyTorch: 300 here, 20,000 with ``make fuzz``.

What they have found is below, each as a test with a name.
"""

from __future__ import annotations

import pickle

import pytest
import torch
from described import Described, Gate, conv, fuse, norm
from fuzzed import Call, Case, Mode, Written, cases, check, decides_nothing, described_blocks, written_models
from hypothesis import HealthCheck, Phase, given, settings
from torch import nn

import fusedres
from fusedres.block import Act, Block, Conv, Norm, unsupported
from fusedres.ops.activations import RELU
from fusedres.testing import channels_last, compare, contiguous, expanded

FUZZING = settings.get_current_profile_name() == "fuzz"


def fuzzed(count: int) -> settings:
    """``count`` cases in the suite; the profile's number when fuzzing."""
    common = settings(deadline=None, suppress_health_check=list(HealthCheck))
    if FUZZING:
        return settings(common, max_examples=settings().max_examples)
    # To shrink what fails takes minutes: fuzzing does that.
    return settings(common, max_examples=count, phases=[Phase.explicit, Phase.generate])


@fuzzed(240)
@given(cases(described_blocks(), fuse))
def test_described_blocks(case: Case):
    check(case)


@fuzzed(60)
@given(cases(written_models(), fusedres.patch))
def test_patched_models(case: Case):
    check(case)


# ---------------------------------------------------------------------------------------------------------------------
# What was found
# ---------------------------------------------------------------------------------------------------------------------


def inputs(seed: int) -> list[torch.Tensor]:
    return [channels_last((4, 8, 9, 9), seed=seed)]


def test_a_shortcut_that_normalises_the_branchs_first_value_is_refused():
    """Its backward took the gradient of the norm's result for that of the value."""
    block = Block((Norm("n"), Act(RELU), Conv("a")), (Norm("m"), Act(RELU), Conv("b")), residual="pending")
    assert unsupported(block) == "a shortcut from the branch's first value begins with a norm or an activation"


class SharedValue(nn.Module):
    """``relu(bn(x))`` is read by the branch, and by a shortcut that normalises it once more."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = norm(8)
        self.branch = nn.Sequential(conv(8, 8, 3), norm(8))
        self.shortcut = nn.Sequential(norm(8), nn.ReLU(), conv(8, 8, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(x))
        return self.branch(x) + self.shortcut(x)


def test_a_shortcut_that_normalises_the_branchs_first_value_when_patched():
    compare(SharedValue().train(), fusedres.patch, inputs).check()


@pytest.mark.parametrize(
    "options", [{"size": 2, "padding": "same"}, {"size": 3, "padding_mode": "reflect"}, {"size": 3, "stride": [2, 2]}]
)
@pytest.mark.parametrize("training", [True, False])
def test_settings_that_only_the_module_knows_run_as_the_module(options, training):
    """An uneven ``padding="same"`` raised, another padding mode was ignored."""
    block = Described([conv(8, 8, **options), norm(8), "relu"]).train(training)
    block.branch[0].stride = options.get("stride", block.branch[0].stride)
    compare(block, fuse, inputs).check()


@pytest.mark.parametrize("training", [True, False])
def test_a_padding_mode_set_after_patching_is_obeyed(training):
    def patched(model: nn.Module) -> None:
        model.branch[0].padding_mode = "zeros"
        assert fusedres.patch(model).coverage == 1.0
        model.branch[0].padding_mode = "circular"

    layers = [conv(8, 8, 3, padding_mode="circular"), norm(8)]
    compare(Written(layers, [], nn.ReLU(), False).train(training), patched, inputs).check()


def test_a_pickled_block_has_the_hash_of_the_process_that_loads_it():
    block = Block((Conv("a"), Norm("b")))
    object.__setattr__(block, "_hash", 1)  # as another process, with another seed for strings, would have it
    assert hash(pickle.loads(pickle.dumps(block))) == hash(Block((Conv("a"), Norm("b"))))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("training", [True, False])
def test_low_memory_recomputes_a_projection_from_the_shared_value(training, dropout):
    """It was recomputed from the block's input: every gradient was wrong."""
    branch = [norm(8), "relu", nn.Dropout(dropout), conv(8, 16, 3), norm(16)]
    block = Described(branch, [conv(8, 16, 1), norm(16)], residual="pending", memory="low")
    compare(block.train(training), fuse, inputs).check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("make", [channels_last, contiguous])
def test_inference_on_one_channel(make, dtype):
    """The layout of a convolution's result was taken for its input's, which of one channel are both."""
    block = Described([conv(1, 4, 3)], [conv(1, 4, 1)], "silu").eval()
    compare(block, fuse, lambda seed: [make((1, 1, 7, 5), seed=seed)], dtype=dtype, backward=False).check()


@pytest.mark.parametrize("residual", ["input", "pending"])
@pytest.mark.parametrize("training", [True, False])
def test_a_gate_on_an_input_that_needs_no_gradient(training, residual):
    """Behind a norm without parameters, or none, the gate's own got no gradient."""
    for first in ([norm(8, affine=False)], []):
        branch = [*first, Gate(8, 2), "relu", conv(8, 8, 3), norm(8)]
        block = Described(branch, [conv(8, 8, 1)], residual=residual)
        compare(block.train(training), fuse, inputs, input_gradients=False).check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_inference_of_a_sum_behind_a_grouped_convolution(dtype):
    """It raised in bfloat16: with groups PyTorch does the sum with ReLU by itself, and has that in float32 alone."""
    block = Described([conv(8, 8, 3, groups=2)], [conv(8, 8, 1)], "relu").eval()
    compare(block, fuse, inputs, dtype=dtype, backward=False).check()


@pytest.mark.parametrize(("batch", "decides"), [(2, False), (3, True)])
def test_a_norm_of_two_values_decides_nothing(batch, decides):
    """They become 1 and -1, whatever they were: the gradient is what is left of terms that cancel."""
    block = Described([conv(2, 4, 1), norm(4)])
    call = Call((batch, 1, 1), "contiguous", "grad", False, None)
    assert decides_nothing(Case(block, fuse, 2, 1, torch.float32, (Mode(True), call))) is not decides


@pytest.mark.parametrize(("batch", "bias", "decides"), [(1, False, False), (2, False, True), (1, True, True)])
def test_a_gate_behind_a_norm_of_one_sample_decides_nothing(batch, bias, decides):
    """It squeezes what the norm has centred, so that its ReLU is that of rounding."""
    block = Described([conv(2, 4, 3), norm(4, affine=False), Gate(4, 2, bias=bias), "relu"])
    call = Call((batch, 5, 5), "contiguous", "grad", False, None)
    assert decides_nothing(Case(block, fuse, 2, 1, torch.float64, (Mode(True), call))) is not decides


@pytest.mark.parametrize(
    ("size", "mode", "decides"),
    [((1, 6), "grad", False), ((6, 2), "grad", False), ((4, 4), "grad", True), ((6, 2), "inference", True)],
)
def test_a_step_that_is_longer_than_the_image_decides_nothing(size, mode, decides):
    """PyTorch's weight gradient then was 1e16, now and then, in both modules."""
    block = Described([nn.Conv2d(4, 4, 5, 3, 2), norm(4)])
    call = Call((3, *size), "expanded", mode, True, None)
    assert decides_nothing(Case(block, fuse, 4, 1, torch.float32, (Mode(True), call))) is not decides


def test_the_variance_of_values_that_repeat():
    """What was left of a plane behind its whole vectors was added to the sum of squares in float32, one by one."""
    block = Described([norm(17, momentum=1.0), conv(17, 1, 1)]).train()
    compare(block, fuse, lambda seed: [expanded((2, 17, 6, 5), seed=seed)], input_gradients=False).check()
