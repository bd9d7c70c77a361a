"""Mixed precision as people use it, on patched networks: autocast, gradient scaling, parameters of two dtypes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from described import conv, norm
from torch import Tensor, nn
from trained import check_training, images, small_resnet

import fusedres
from fusedres.testing import Results, channels_last, compare, compare_results, run_and_collect

HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("mode", ["train", "frozen", "infer"])
@pytest.mark.parametrize("dtype", HALVES)
def test_autocast(dtype, mode):
    def inputs(seed: int) -> list[Tensor]:
        return [channels_last((4, 3, 64, 64), seed=seed)]

    model = small_resnet().train(mode == "train")
    compare(model, fusedres.patch, inputs, autocast=dtype, backward=mode != "infer").check()


# ---------------------------------------------------------------------------------------------------------------------
# Parameters of two dtypes
# ---------------------------------------------------------------------------------------------------------------------


def halved(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """``model.half()`` with norms in float32, as training code for GPUs has it."""
    model.to(dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    return model


def whole(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return model.bfloat16() if dtype == torch.bfloat16 else model.half()


@pytest.mark.parametrize("mode", ["train", "frozen", "infer"])
@pytest.mark.parametrize("first", ["patched", "cast"])
@pytest.mark.parametrize("halved", [halved, whole], ids=["norms in float32", "whole"])
@pytest.mark.parametrize("dtype", HALVES)
def test_models_in_half_precision(dtype, halved, first, mode):
    """Every gradient and statistic has its parameter's dtype, whether the model was patched or cast first."""

    def draw(seed: int) -> tuple[Results, Results, Results]:
        torch.manual_seed(seed)
        layers = [conv(16, 16, 3), norm(16), nn.ReLU(), conv(16, 16, 3), norm(16), nn.ReLU()]
        model = nn.Sequential(*layers).train(mode == "train")
        stock = halved(copy.deepcopy(model), dtype)
        if first == "patched":
            assert fusedres.patch(model).coverage == 1.0
            patched = halved(model, dtype)
        else:
            patched = copy.deepcopy(stock)
            assert fusedres.patch(patched).coverage == 1.0
        x = channels_last((8, 16, 24, 24), dtype, seed).requires_grad_(mode != "infer")
        exact_x = x.detach().double().requires_grad_(x.requires_grad)
        backward = mode != "infer"
        exact_stock = copy.deepcopy(stock).double()
        expected = run_and_collect(stock, [x], None, backward)
        exact = run_and_collect(exact_stock, [exact_x], None, backward, like=expected["output"])
        return run_and_collect(patched, [x], None, backward), expected, exact

    compare_results(draw).check()


# ---------------------------------------------------------------------------------------------------------------------
# Autocast inside a model
# ---------------------------------------------------------------------------------------------------------------------


class Around(nn.Module):
    """A model that casts for itself: float32 stem, bfloat16 stages, float32 head."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 16, 3), norm(16), nn.ReLU())
        self.stages = nn.Sequential(conv(16, 32, 3, 2), norm(32), nn.ReLU(), conv(32, 16, 3), norm(16), nn.ReLU())
        self.head = nn.Sequential(conv(16, 8, 1), norm(8))
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        # The double of a comparison is not cast: autocast leaves float64 alone.
        x = self.stem(x)
        with torch.autocast("cpu", self.dtype):
            x = self.stages(x)
        return self.head(x.to(self.head[0].weight.dtype))


class Within(nn.Module):
    """A block that casts in the middle of its own forward, behind a convolution in the caller's precision."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = conv(16, 16, 3), norm(16), conv(16, 16, 3), norm(16)
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        with torch.autocast("cpu", self.dtype):
            out = self.bn2(self.conv2(out))
        return torch.relu(out.to(x.dtype) + x)


@pytest.mark.parametrize("mode", ["train", "infer"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", [Around, Within])
def test_autocast_inside_a_forward(kind, dtype, mode):
    """The context is kept: it is entered around fused blocks; a block that holds one is left alone, with the reason."""
    channels = 3 if kind is Around else 16
    model = kind(dtype).train(mode == "train")
    report = fusedres.explain(model)
    if kind is Around:
        assert report.coverage == 1.0
    else:
        assert "autocast" in str(report)
    inputs = lambda seed: [channels_last((8, channels, 24, 24), seed=seed)]  # noqa: E731
    compare(model, fusedres.patch, inputs, backward=mode == "train").check()


def test_autocast_switched_off_inside():
    """A region in full precision inside autocast runs in full precision."""
    model = nn.Sequential(conv(16, 16, 3), norm(16), nn.ReLU()).train()
    fusedres.patch(model)
    x = channels_last((2, 16, 8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert model(x).dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# Gradient scaling
# ---------------------------------------------------------------------------------------------------------------------


def scaled_steps(model: nn.Module, seed: int, overflow: Callable[[int], bool] = lambda step: False) -> list[float]:
    """Three steps with a loss scale, under autocast where the model is in float32; returns the scales."""
    scaler, scales = torch.amp.GradScaler("cpu", init_scale=128.0, growth_interval=2), []
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    dtype = next(model.parameters()).dtype
    for step in range(3):
        x, y = images(10 * seed + step, dtype)
        with torch.autocast("cpu", torch.float16, enabled=dtype == torch.float32):
            loss = nn.functional.cross_entropy(model(x).to(dtype), y)
        optimizer.zero_grad()
        scaler.scale(loss * (float("inf") if overflow(step) else 1.0)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


def test_loss_scaling_in_training():
    def fit(model: nn.Module, seed: int) -> None:
        assert scaled_steps(model, seed) == [128.0, 256.0, 256.0]

    check_training(fit)


def test_a_step_that_overflows_is_skipped():
    """An infinite gradient passes a fused block, so that the scaler sees it, skips the step and halves the scale."""
    scales = []
    for patches in (False, True):
        model = small_resnet().train()
        if patches:
            fusedres.patch(model)
        before = model.layer1[0].conv1.weight.clone()
        scales.append(scaled_steps(model, 0, overflow=lambda step: True))
        assert torch.equal(model.layer1[0].conv1.weight, before)
    assert scales[0] == scales[1] == [64.0, 32.0, 16.0]


# ---------------------------------------------------------------------------------------------------------------------
# The precision of float32
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["highest", "high", "medium"])
def matmul_precision(request) -> Iterator[str]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("mode", ["train", "infer"])
@pytest.mark.usefixtures("matmul_precision")
def test_float32_matmul_precision(mode):
    def inputs(seed: int) -> list[Tensor]:
        return [channels_last((4, 3, 64, 64), seed=seed)]

    compare(small_resnet().train(mode == "train"), fusedres.patch, inputs, backward=mode == "train").check()


@pytest.fixture
def convolutions_in_bfloat16() -> Iterator[None]:
    """float32 convolutions whose products oneDNN may take in bfloat16."""
    setting = torch.backends.mkldnn.conv
    before, setting.fp32_precision = setting.fp32_precision, "bf16"
    yield
    setting.fp32_precision = before


@pytest.mark.parametrize("mode", ["train", "infer"])
@pytest.mark.usefixtures("convolutions_in_bfloat16")
def test_float32_convolutions_in_bfloat16(mode):
    def inputs(seed: int) -> list[Tensor]:
        return [channels_last((4, 3, 64, 64), seed=seed)]

    compare(small_resnet().train(mode == "train"), fusedres.patch, inputs, backward=mode == "train").check()
