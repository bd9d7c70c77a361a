"""What changes in a patched model after patching, in modules that its generated forwards no longer call."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from survey_blocks import ResidualBlock, SEBottleneckBlock
from torch import Tensor, nn
from torchvision_shim import torchvision_models

import fusedres
from fusedres.patch import patch
from fusedres.patch.swap import template_of
from fusedres.patch.watch import changed

from .blocks import Layers, images, settled


class Rates:
    """A configuration of the user's."""

    def __init__(self) -> None:
        self.rate, self.unused = 1.0, 1.0


class Busy(Layers):
    """Activations, identities and containers as modules, and settings that the forward reads."""

    inherited = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.act, self.last, self.drop = nn.LeakyReLU(0.1), nn.ReLU(), nn.Dropout(0.0)
        self.skip = nn.Sequential(nn.Conv2d(self.C, self.C, 1), nn.BatchNorm2d(self.C))
        self.idle = nn.Sequential()
        self.scale, self.joins = 1.0, True
        self._scale, self._unused, self.finish, self.by_attribute = 1.0, 1.0, torch.clone, 1.0
        self.settings, self.factors, self.rates = {"joins": True}, [1.0, 1.0], Rates()

    def forward(self, x):
        out = self.idle(self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))))
        out = self.drop(out)
        if self.joins and self.settings["joins"]:
            out = out + self.skip(x)
        return self.scaled(self.finish(self.last(out) * self.scale))

    def scaled(self, x):
        x = x * self._scale * self.factors[0] * self.inherited
        return x * self.rates.rate * getattr(self, "by_attribute")  # noqa: B009


def replace(name: str, module: nn.Module):
    return lambda m: setattr(m, name, module)


class TiledConv(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x.roll(1, -1), weight, bias)


class CalledTwiceConv(nn.Conv2d):
    def __call__(self, x):
        return super().__call__(super().__call__(x))


CHANGES = {
    "activation": replace("act", nn.SiLU()),
    "slope": lambda m: setattr(m.act, "negative_slope", 0.5),
    "activation behind the sum": replace("last", nn.Identity()),
    "identity": replace("idle", nn.Hardtanh(-0.1, 0.1)),
    "identity that grows": lambda m: m.idle.append(nn.Hardtanh(-0.1, 0.1)),
    "shortcut that grows": lambda m: m.skip.append(nn.Hardtanh(-0.1, 0.1)),
    "shortcut": replace("skip", nn.AvgPool2d(3, 1, 1)),
    "convolution": replace("conv1", nn.Conv2d(4, 4, 5, padding=2)),
    "convolution for nothing": replace("conv1", nn.Identity()),
    "convolution that convolves in its own way": replace("conv1", TiledConv(4, 4, 3, padding=1)),
    "convolution that is called in its own way": replace("conv1", CalledTwiceConv(4, 4, 3, padding=1)),
    "norm for nothing": replace("bn2", nn.Identity()),
    "norm of another kind": replace("bn1", nn.InstanceNorm2d(4)),
    "scale": lambda m: setattr(m, "scale", 2.0),
    "switch": lambda m: setattr(m, "joins", False),
    "private scale, read by a method": lambda m: setattr(m, "_scale", 2.0),
    "scale that is a tensor now": lambda m: setattr(m, "scale", torch.full((4, 1, 1), 2.0, dtype=torch.float64)),
    "attribute by its name": lambda m: setattr(m, "by_attribute", 2.0),
    "attribute of the class": lambda m: setattr(m, "inherited", 2.0),
    "function": lambda m: setattr(m, "finish", torch.sigmoid),
    "method": lambda m: setattr(m, "scaled", torch.exp),
    "item of a dictionary": lambda m: m.settings.update(joins=False),
    "dictionary": lambda m: setattr(m, "settings", {"joins": False}),
    "item of a list": lambda m: m.factors.__setitem__(0, 2.0),
    "attribute of an object": lambda m: setattr(m.rates, "rate", 2.0),
    "forward of a layer": lambda m: setattr(m.conv1, "forward", lambda x: x * 2),
    "convolution of a layer": lambda m: setattr(m.conv1, "_conv_forward", lambda x, weight, bias: x * 2),
    "forward of an activation": lambda m: setattr(m.act, "forward", lambda x: x * 2),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_take_effect(name):
    stock = settled(Busy()).eval()
    model = copy.deepcopy(stock)
    assert patch(model).coverage == 1.0
    x = images()
    unchanged = stock(x)
    torch.testing.assert_close(model(x), unchanged, rtol=1e-9, atol=1e-11)
    for m in (stock, model):
        torch.manual_seed(1)
        CHANGES[name](m)
        m.double().eval()
    torch.testing.assert_close(model(x), stock(x), rtol=1e-9, atol=1e-11)
    assert not torch.allclose(stock(x), unchanged)


def compiled(model: nn.Module, x: Tensor) -> Tensor:
    torch._dynamo.reset()
    return torch.compile(model, backend="eager", fullgraph=True)(x)


def exported(model: nn.Module, x: Tensor, strict: bool = False) -> Tensor:
    return torch.export.export(model, (x,), strict=strict).module()(x)


WRITTEN_DOWN = {"compiled": compiled, "exported": exported, "exported, strict": partial(exported, strict=True)}
HOOKS = {
    f"hook on {path}": lambda m, path=path: m.get_submodule(path).register_forward_hook(lambda *args: 2 * args[2])
    for path in ("act", "skip")
}


@pytest.mark.parametrize("how", WRITTEN_DOWN)
@pytest.mark.parametrize("name", [*CHANGES, *HOOKS])
def test_compilers_and_exporters_see_changes(name, how):
    stock = settled(Busy()).eval()
    model = copy.deepcopy(stock)
    patch(model)
    x = images()
    unchanged = stock(x)
    for m in (stock, model):
        torch.manual_seed(1)
        (CHANGES | HOOKS)[name](m)
        m.double().eval()
    torch.testing.assert_close(WRITTEN_DOWN[how](model, x), stock(x), rtol=1e-9, atol=1e-11)
    assert not torch.allclose(stock(x), unchanged)


@pytest.mark.parametrize("name", CHANGES)
def test_changes_between_compiled_calls(name):
    stock = settled(Busy()).eval()
    model = copy.deepcopy(stock)
    patch(model)
    torch._dynamo.reset()
    again = torch.compile(model, backend="eager", fullgraph=True)
    again(images())
    for m in (stock, model):
        torch.manual_seed(1)
        CHANGES[name](m)
        m.double().eval()
    torch.testing.assert_close(again(images()), stock(images()), rtol=1e-9, atol=1e-11)


def test_hooks_on_all_modules_run_in_a_compiled_model():
    stock = settled(Busy()).eval()
    model = copy.deepcopy(stock)
    patch(model)
    double = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: 2 * out if isinstance(module, nn.LeakyReLU) else None
    )
    try:
        torch.testing.assert_close(compiled(model, images()), stock(images()), rtol=1e-9, atol=1e-11)
    finally:
        double.remove()


def test_dropout_that_is_switched_on():
    model = settled(Busy())
    patch(model)
    model.drop.p = 1.0
    assert model.train()(images() * 0).equal(model(images() * 0))
    without_branch = F.relu(model.skip(images()))
    torch.testing.assert_close(model(images()), without_branch)


@pytest.mark.parametrize("path", ["act", "last", "idle", "skip", "skip.0", "conv1", "bn2", "drop"])
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_added_later_run(path, register):
    model, seen = settled(Busy()).eval(), []
    expected = model(images())
    patch(model)
    handle = getattr(model.get_submodule(path), register)(lambda *_: seen.append(path))
    torch.testing.assert_close(model(images()), expected, rtol=1e-9, atol=1e-11)
    assert seen == [path]
    handle.remove()
    model(images())
    assert seen == [path]


def test_hooks_on_all_modules_run():
    """As profilers and counters of operations register them."""
    stock = settled(Busy()).eval()
    model, block = copy.deepcopy(stock), nn.Sequential(fusedres.nn.ResidualBlock(4)).double().eval()
    patch(model)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        for one in (stock, model, block):
            one(images())
    finally:
        handle.remove()
    half = seen.index(stock) + 1
    assert [type(m) for m in seen[:half]] == [type(m) for m in seen[half : 2 * half - 1]] + [Busy]
    assert {type(m) for m in seen[2 * half :]} >= {nn.Conv2d, nn.BatchNorm2d}
    count = len(seen)
    model(images())
    assert len(seen) == count


def test_hooks_inside_a_gate_run():
    model, seen = settled(SEBottleneckBlock(4, 8, 2, 2)), []
    assert patch(model).coverage == 1.0
    for path in ("se", "se.fc1", "downsample", "downsample.1"):
        model.get_submodule(path).register_forward_hook(lambda *_, p=path: seen.append(p))
    model(images())
    assert sorted(seen) == ["downsample", "downsample.1", "se", "se.fc1"]


def test_backward_hooks_added_later_run():
    model, seen = settled(Busy()), []
    patch(model)
    model.act.register_full_backward_hook(lambda *_: seen.append("act"))
    model(images()).sum().backward()
    assert seen == ["act"]


def test_a_removed_shortcut():
    block = settled(torchvision_models().resnet.BasicBlock(4, 4, downsample=nn.Sequential(nn.Conv2d(4, 4, 1)))).eval()
    stock = copy.deepcopy(block)
    patch(block)
    block.downsample = stock.downsample = None
    torch.testing.assert_close(block(images()), stock(images()), rtol=1e-9, atol=1e-11)


def test_patching_again_takes_the_change_in():
    model = settled(Busy()).eval()
    patch(model)
    model.act = nn.SiLU()
    expected = model(images())
    report = patch(model)
    assert [site.already for site in report.fused] == [False]
    assert "-> silu ->" in report.source("")
    assert patch(model).fused[0].already
    torch.testing.assert_close(model(images()), expected, rtol=1e-9, atol=1e-11)


def test_what_nothing_depends_on_may_change():
    model = ResidualBlock(4)
    patch(model)
    model.note, model.training, model._note = "a new attribute", False, "a private one"
    forward, called = ResidualBlock.forward, []
    try:
        ResidualBlock.forward = lambda self, x: called.append(1) or forward(self, x)
        model(torch.zeros(1, 4, 3, 3))
    finally:
        ResidualBlock.forward = forward
    assert called == []


def test_private_settings_that_the_code_does_not_name_may_change():
    model = settled(Busy())
    patch(model)
    model._unused = model.rates.unused = 2.0
    assert not changed(model, template_of(model).watched)
    assert not changed(copy.deepcopy(model), template_of(model).watched)
