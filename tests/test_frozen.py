"""Batch norms of buffers: recognised by what they compute, and fused in every mode and dtype."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from test_graphs import recorded
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import fusedres
from fusedres.frozen import FrozenNorm, frozen_norm
from fusedres.testing import channels_last, compare
from fusedres.vision import import_with_torchvision

SHAPE = (4, 16, 14, 14)


def images(seed: int = 0) -> Tensor:
    return channels_last(SHAPE, seed=seed)


class Buffers(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(n))
        self.register_buffer("bias", torch.zeros(n))
        self.register_buffer("running_mean", torch.zeros(n))
        self.register_buffer("running_var", torch.ones(n))


class DetrFrozenBatchNorm2d(Buffers):
    """As in Hugging Face's DETR, with eps in the forward."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.reshape(1, -1, 1, 1)
        bias = self.bias.reshape(1, -1, 1, 1)
        running_var = self.running_var.reshape(1, -1, 1, 1)
        running_mean = self.running_mean.reshape(1, -1, 1, 1)
        epsilon = 1e-5
        scale = weight * (running_var + epsilon).rsqrt()
        bias = bias - running_mean * scale
        return x * scale + bias


class Detectron2FrozenBatchNorm2d(Buffers):
    """As in detectron2, whose result keeps the input's dtype."""

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__(num_features)
        self.num_features = num_features
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            bias = self.bias - self.running_mean * scale
            scale = scale.reshape(1, -1, 1, 1)
            bias = bias.reshape(1, -1, 1, 1)
            return x * scale.to(x.dtype) + bias.to(x.dtype)
        buffers = (self.running_mean, self.running_var, self.weight, self.bias)
        return F.batch_norm(x, *buffers, training=False, eps=self.eps)


def torchvisions(n: int) -> nn.Module:
    return import_with_torchvision("torchvision.ops.misc").FrozenBatchNorm2d(n)


NORMS = {"torchvision": torchvisions, "DETR": DetrFrozenBatchNorm2d, "detectron2": Detectron2FrozenBatchNorm2d}


class Block(nn.Module):
    """A bottleneck of torchvision's, with a projection or without."""

    def __init__(self, norm, width: int = 16, out: int = 16) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(16, width, 1, bias=False), norm(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), norm(width)
        self.conv3, self.bn3 = nn.Conv2d(width, out, 1, bias=False), norm(out)
        self.downsample = nn.Sequential(nn.Conv2d(16, out, 1, bias=False), norm(out)) if out != 16 else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return F.relu(out)


class PreActivation(nn.Module):
    """Norms before convolutions; the shortcut reads the activated input."""

    def __init__(self, norm) -> None:
        super().__init__()
        self.bn1, self.conv1 = norm(16), nn.Conv2d(16, 16, 3, padding=1)
        self.bn2, self.conv2 = norm(16), nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        start = F.relu(self.bn1(x))
        return self.conv2(F.relu(self.bn2(self.conv1(start)))) + start


class Chain(nn.Module):
    def __init__(self, norm) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(16, 24, 3, padding=1), norm(24)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


BLOCKS = {
    "identity": Block,
    "projection": lambda norm: Block(norm, out=32),
    "pre-activation": PreActivation,
    "chain": Chain,
}


def settled(module: nn.Module) -> nn.Module:
    """With buffers that are not those of a fresh norm."""
    generator = torch.Generator().manual_seed(0)
    for buffer in module.buffers():
        buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return module.to(memory_format=torch.channels_last)


def make(block: str = "identity", norm: str = "torchvision") -> nn.Module:
    torch.manual_seed(0)
    return settled(BLOCKS[block](NORMS[norm]))


def fuse(module: nn.Module, **options: str) -> None:
    assert fusedres.patch(module, **options).coverage == 1.0


# ---------------------------------------------------------------------------------------------------------------------
# Recognising
# ---------------------------------------------------------------------------------------------------------------------


def test_libraries_write_it_in_their_own_ways():
    assert frozen_norm(type(torchvisions(2))) == FrozenNorm(None, True)
    assert frozen_norm(DetrFrozenBatchNorm2d) == FrozenNorm(1e-5, True)
    assert frozen_norm(Detectron2FrozenBatchNorm2d) == FrozenNorm(None, False)
    assert frozen_norm(nn.BatchNorm2d) is None


class _EpsOutside(Buffers):
    def forward(self, x):
        scale = self.weight / (self.running_var.sqrt() + 1e-5)
        return (x - self.running_mean.view(1, -1, 1, 1)) * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


class _AnotherInTraining(DetrFrozenBatchNorm2d):
    def forward(self, x):
        return x if self.training else DetrFrozenBatchNorm2d.forward(self, x)


class _NoGradient(DetrFrozenBatchNorm2d):
    def forward(self, x):
        epsilon = 1e-5
        scale = (self.weight * (self.running_var + epsilon).rsqrt()).view(1, -1, 1, 1)
        return x.detach() * scale + (self.bias.view(1, -1, 1, 1) - self.running_mean.view(1, -1, 1, 1) * scale)


class _Counting(DetrFrozenBatchNorm2d):
    def forward(self, x):
        self.running_mean = self.running_mean + 0.0
        return DetrFrozenBatchNorm2d.forward(self, x)


class _InPlace(Buffers):
    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        x -= self.running_mean.view(1, -1, 1, 1)
        x *= scale.view(1, -1, 1, 1)
        x += self.bias.view(1, -1, 1, 1)
        return x


@pytest.mark.parametrize("base", [_EpsOutside, _AnotherInTraining, _NoGradient, _Counting, _InPlace])
def test_the_name_alone_is_not_enough(base):
    cls = type("FrozenBatchNorm2d", (base,), {"forward": base.forward})
    torch.manual_seed(0)
    stock = settled(Chain(cls))
    ours = copy.deepcopy(stock)
    reasons = {declined.reason for declined in fusedres.patch(ours).declined}
    assert any("is a FrozenBatchNorm2d, whose forward is not that of a batch norm with" in r for r in reasons), reasons
    assert torch.equal(ours(images()), stock(images()))


def test_a_forward_that_reads_a_switch_is_not_what_was_run():
    class FrozenBatchNorm2d(DetrFrozenBatchNorm2d):
        frozen = True

        def forward(self, x):
            epsilon = 1e-5
            if not self.frozen:
                return F.batch_norm(x, None, None, training=True)
            scale = (self.weight * (self.running_var + epsilon).rsqrt()).view(1, -1, 1, 1)
            return x * scale + (self.bias.view(1, -1, 1, 1) - self.running_mean.view(1, -1, 1, 1) * scale)

    module = Chain(FrozenBatchNorm2d)
    module.bn.frozen = False
    assert any("reads a setting of its own ('frozen')" in d.reason for d in fusedres.patch(module).declined)


def test_what_the_caller_has_switched_on_does_not_count():
    def norm() -> type:
        return type("FrozenBatchNorm2d", (Buffers,), {"forward": DetrFrozenBatchNorm2d.forward})

    autocast = torch.autocast("cpu", torch.bfloat16)
    for context in (torch.inference_mode(), autocast, FakeTensorMode(), torch.device("meta")):
        with context:
            assert frozen_norm(norm()) == FrozenNorm(1e-5, True)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("block", BLOCKS)
def test_results_are_within_the_budget(block, norm, training):
    module = make(block, norm).train(training)
    compare(module, fuse, lambda seed: [images(seed)]).check()
    compare(module, fuse, lambda seed: [images(seed)], backward=False).check()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("backward", [True, False])
def test_autocast_has_results_of_the_dtype_that_stocks_have(block, norm, backward):
    """Stock's formula promotes to the dtype of its buffers."""
    module = make(block, norm).train()
    for dtype in (torch.float32, torch.bfloat16):
        options = {"autocast": torch.bfloat16, "backward": backward, "input_gradients": False}
        compare(module, fuse, lambda seed, dtype=dtype: [images(seed).to(dtype).float()], **options).check()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("block", BLOCKS)
def test_bfloat16(block, norm):
    compare(make(block, norm), fuse, lambda seed: [images(seed)], dtype=torch.bfloat16).check()


@pytest.mark.parametrize("block", BLOCKS)
def test_a_bfloat16_input_under_autocast(block):
    stock, x = make(block), images().bfloat16()
    ours = copy.deepcopy(stock)
    fuse(ours)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == stock(x).dtype
        with torch.no_grad():
            assert ours(x).dtype == stock(x).dtype


def test_low_memory():
    compare(make("projection"), lambda m: fuse(m, memory="low"), lambda seed: [images(seed)]).check()


def test_norms_in_float32_between_convolutions_in_bfloat16_fail_as_in_stock():
    stock = make()
    for module in stock.modules():
        if isinstance(module, nn.Conv2d):
            module.bfloat16()
    ours = copy.deepcopy(stock)
    fuse(ours)
    for module in (stock, ours):
        with pytest.raises(RuntimeError, match="same"):
            module(images().bfloat16())


# ---------------------------------------------------------------------------------------------------------------------
# What a call sees
# ---------------------------------------------------------------------------------------------------------------------


def edited(module: nn.Module) -> None:
    module.bn1.weight.mul_(-1)
    module.bn2.running_var.add_(1)
    module.bn3.bias.data.sub_(1)


def loaded(module: nn.Module) -> None:
    module.load_state_dict({k: v * 2 + 0.25 for k, v in module.state_dict().items()})


def replaced(module: nn.Module) -> None:
    module.bn1.running_mean = module.bn1.running_mean + 1


def unfrozen(module: nn.Module) -> None:
    module.bn1 = nn.BatchNorm2d(16)


def learnt(module: nn.Module) -> None:
    bias = module.bn1.bias
    del module.bn1.bias
    module.bn1.bias = nn.Parameter(bias)


def asked_for(module: nn.Module) -> None:
    module.bn2.running_mean.requires_grad_()


def hooked(module: nn.Module) -> None:
    module.bn2.register_forward_hook(lambda module, args, out: out + 1)


def other_eps(module: nn.Module) -> None:
    module.bn1.eps = 0.5


def of_another_dtype(module: nn.Module) -> None:
    module.double()
    module.float()


CHANGES = [edited, loaded, replaced, unfrozen, learnt, asked_for, hooked, other_eps, of_another_dtype]


@pytest.mark.parametrize("change", CHANGES)
def test_changes_between_calls_are_seen(change):
    stock, x = make(), images()
    ours = copy.deepcopy(stock)
    fuse(ours)
    for _ in range(2):
        for module in (stock.eval(), ours.eval()):
            with torch.no_grad():
                module(x)
            change(module) if _ == 0 else None
        with torch.no_grad():
            torch.testing.assert_close(ours(x), stock(x), rtol=1e-4, atol=1e-4)
        for module in (stock, ours):
            module.zero_grad()
            module.train()(x).sum().backward()
        for (name, a), b in zip(stock.named_parameters(), ours.parameters()):
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-3, msg=name)


# ---------------------------------------------------------------------------------------------------------------------
# Graphs and networks
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_compiled(norm):
    stock = make(norm=norm).train()
    ours = copy.deepcopy(stock)
    fuse(ours)
    assert recorded(ours, images()).ops
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images()), stock(images()), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images()), stock(images()), rtol=1e-4, atol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            assert compiled(images()).dtype == stock(images()).dtype


def test_a_detector_backbone():
    utils = import_with_torchvision("torchvision.models.detection.backbone_utils")

    def build() -> nn.Module:
        torch.manual_seed(0)
        return settled(utils.resnet_fpn_backbone(backbone_name="resnet50", weights=None)).double()

    stock, ours = build(), build()
    report = fusedres.patch(ours)
    assert report.covered == 53  # all but the pyramid's, which have nothing behind them
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    results = []
    for module in (stock, ours):
        out = module.train()(x)
        sum((level * torch.arange(level.numel()).view_as(level).cos()).sum() for level in out.values()).backward()
        results.append({**out, **{name: p.grad for name, p in module.named_parameters() if p.grad is not None}})
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        error = (results[1][name] - value).abs().max()
        assert error <= 1e-10 * value.abs().max(), name
