"""Which module's forward is rewritten, what is declined and why, and the selection."""

from __future__ import annotations

import importlib
import random
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from survey_blocks import BottleneckBlock, MyResNet, ResidualBlock
from torch import fx, nn
from torch import is_grad_enabled as gradients_are_on
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from torchvision_shim import timm_models, torchvision_models, torchvision_ops

from fusedres.patch import explain, patch, unpatch

from .blocks import Layers, check_patched, images, settled


def reasons(report) -> dict[str, str]:
    return {d.path: d.reason for d in report.declined}


def patterns(report) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for site in report.fused:
        found.setdefault(site.path, []).append(site.pattern)
    return found


# -- whose forward ---------------------------------------------------------------------------------------------------


def test_a_stage_of_one_block_leaves_it_to_the_block():
    report = check_patched(nn.Sequential(nn.Sequential(ResidualBlock(4))))
    assert list(patterns(report)) == ["0.0"]


def test_a_block_swallows_the_submodules_that_a_region_cuts_through():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
            self.gate = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))

        def forward(self, x):
            y = torch.relu(self.body(x) + x)
            return y * torch.sigmoid(self.gate(y))

    model = Block()
    called = []
    report = check_patched(model)
    assert patterns(report) == {
        "": ["post-activation residual (identity)"],
        "gate": ["conv-relu-conv"],
    }
    patch(model.double())
    model.gate.register_forward_hook(lambda *_: called.append("gate"))
    model(images())
    assert called == ["gate"]


def test_a_part_that_cannot_be_traced_does_not_spoil_the_rest():
    class DropPath(nn.Module):
        def forward(self, x):
            return x if float(x.shape[0]) > 0 else x * 2

    class Block(Layers):
        def __init__(self):
            super().__init__()
            self.drop = DropPath()

        def forward(self, x):
            return self.drop(self.branch(x)) + x

    report = check_patched(Block())
    assert patterns(report) == {"": ["conv-bn-relu-conv-bn"]}
    assert "self.drop(" in report.source("")


def test_wrappers_are_looked_into():
    model = settled(nn.DataParallel(ResidualBlock(4)))
    assert list(patterns(patch(model))) == ["module"]


# -- reasons: a layer that is not plain ------------------------------------------------------------------------------


class StandardizedConv(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias, padding=self.padding)


class PlainSubclass(nn.Conv2d):
    pass


class ScaledNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


class Doubled(nn.Module):
    def forward(self, x):
        return x * 2


def replaced_forward(m: Layers) -> None:
    stock = m.conv1.forward
    m.conv1.forward = lambda x: stock(x) * 2


def replaced_conv_forward(m: Layers) -> None:
    """As the hack that makes images tile does it."""
    m.conv1._conv_forward = lambda x, weight, bias: F.conv2d(x.roll(1, -1), weight, bias, padding=1)


def share_weight(m: Layers) -> None:
    m.conv1.weight = m.conv2.weight


def share_norm_weight(m: Layers) -> None:
    m.bn1.weight = m.bn2.weight


CONV1_PROBLEMS = {
    "forward hook": (lambda m: m.conv1.register_forward_hook(lambda *_: None), "conv1 has a forward hook"),
    "forward pre-hook": (lambda m: m.conv1.register_forward_pre_hook(lambda *_: None), "has a forward pre-hook"),
    "backward hook": (lambda m: m.conv1.register_full_backward_hook(lambda *_: None), "has a backward hook"),
    "backward pre-hook": (lambda m: m.conv1.register_full_backward_pre_hook(lambda *_: None), "a backward pre-hook"),
    "parametrization": (lambda m: parametrize.register_parametrization(m.conv1, "weight", Doubled()), "parametriz"),
    "new weight norm": (lambda m: parametrizations.weight_norm(m.conv1), "has a parametrization"),
    "weight norm": (lambda m: weight_norm(m.conv1), "weight norm"),
    "spectral norm": (lambda m: spectral_norm(m.conv1), "spectral norm"),
    "pruning": (lambda m: prune.random_unstructured(m.conv1, "weight", 0.5), "pruning"),
    "padding mode": (lambda m: setattr(m, "conv1", nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")), "circular"),
    "subclass": (lambda m: setattr(m, "conv1", StandardizedConv(4, 4, 3, padding=1)), "forward of its own"),
    "replaced forward": (replaced_forward, "replaced on the instance"),
    "replaced _conv_forward": (replaced_conv_forward, "has a _conv_forward that was replaced on the instance"),
    "shared weight": (share_weight, "shares its weight with another module (conv1, conv2)"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("case", CONV1_PROBLEMS)
def test_conv_that_is_not_plain_is_left_and_the_rest_fused(case):
    spoil, words = CONV1_PROBLEMS[case]
    model = settled(Layers())
    spoil(model)
    model.double()
    expected = model.eval()(images())
    report = patch(model)
    assert words in reasons(report)["conv1"]
    if case != "shared weight":
        assert patterns(report) == {"": ["post-activation residual (second input)"]}
        assert report.coverage == 0.5
    torch.testing.assert_close(model(images()), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("norm", "words"),
    [
        (lambda: nn.GroupNorm(2, 4), "bn1 is a GroupNorm"),
        (lambda: nn.InstanceNorm2d(4), "bn1 is a InstanceNorm2d"),
        (lambda: ScaledNorm(4), "bn1 is a ScaledNorm"),
        (lambda: nn.FeatureAlphaDropout(0.5), "bn1 is a FeatureAlphaDropout"),
        (lambda: nn.Hardtanh(), "bn1 is a Hardtanh"),
    ],
)
def test_layers_that_no_block_has_end_the_region(norm, words):
    model = Layers()
    model.bn1 = norm()
    report = patch(model)
    assert words in reasons(report)["conv1"]
    assert patterns(report) == {"": ["post-activation residual (second input)"]}
    assert "self.bn1(" in report.source("")


@pytest.mark.parametrize(
    ("cls", "method", "layer"),
    [
        (nn.Conv2d, "forward", "conv1"),
        (nn.Conv2d, "_conv_forward", "conv1"),
        (nn.BatchNorm2d, "forward", "bn1"),
    ],
    ids=str,
)
def test_layers_whose_forward_was_replaced_for_all_are_left(monkeypatch, cls, method, layer):
    stock = getattr(cls, method)
    monkeypatch.setattr(cls, method, lambda *args: stock(*args) * 2)
    report = check_patched(Layers())
    assert f"{layer} is a {cls.__name__}, and {cls.__name__}'s forward was replaced on the class" in str(report)


def test_activations_whose_forward_was_replaced_for_all_are_called(monkeypatch):
    class Chain(Layers):
        def forward(self, x):
            return self.relu(self.bn1(self.conv1(x)))

    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: x * 2)
    assert "self.relu(" in check_patched(Chain()).source("")


def test_synchronised_norms_are_taken():
    assert check_patched(nn.SyncBatchNorm.convert_sync_batchnorm(Layers())).coverage == 1.0


def test_synchronised_norms_with_activations_are_taken():
    timm_models()
    layers = importlib.import_module("timm.layers")
    model = nn.Sequential(nn.Conv2d(4, 8, 3), layers.BatchNormAct2d(8), nn.Conv2d(8, 4, 3), layers.BatchNormAct2d(4))
    report = check_patched(layers.convert_sync_batchnorm(model))
    assert report.coverage == 1.0
    model[1] = layers.SyncBatchNormAct(8)
    assert "1 is a SyncBatchNormAct without an activation" in reasons(patch(model))["0"]


def test_norm_that_shares_its_weight_is_left():
    model = Layers()
    share_norm_weight(model)
    report = check_patched(model)
    assert report.fused == ()
    assert "bn1 shares its weight" in reasons(report)["conv1"]


def test_hooked_norm_still_runs_its_hook():
    model, seen = settled(Layers()), []
    model.bn1.register_forward_hook(lambda *_: seen.append(1))
    report = patch(model)
    assert "bn1 has a forward hook" in reasons(report)["conv1"]
    model(images())
    assert seen == [1]


def test_plain_subclass_is_accepted():
    model = Layers()
    model.conv1 = PlainSubclass(4, 4, 3, padding="same")
    assert check_patched(model).coverage == 1.0


def test_convolution_called_twice():
    class Twice(Layers):
        def forward(self, x):
            return torch.relu(self.bn1(self.conv1(torch.relu(self.bn2(self.conv1(x)))))) + x

    report = check_patched(Twice())
    assert report.covered == 0
    assert patterns(report) == {"": ["bn-relu", "bn-relu"]}
    assert "called more than once" in reasons(report)["conv1"]


def test_norm_called_twice():
    class Twice(Layers):
        def forward(self, x):
            return torch.relu(self.bn1(self.conv2(torch.relu(self.bn1(self.conv1(x)))))) + x

    report = check_patched(Twice())
    assert report.fused == ()
    assert "bn1 is called more than once" in reasons(report)["conv1"]


@pytest.mark.parametrize("shared", ["conv1", "bn2"])
def test_a_layer_that_two_blocks_share(shared):
    """Each block runs it once; its gradients add up and its statistics are updated twice, in order."""
    model = nn.Sequential(ResidualBlock(4), ResidualBlock(4))
    setattr(model[1], shared, getattr(model[0], shared))
    assert check_patched(model).coverage == 1.0


def test_a_block_that_is_called_twice():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = ResidualBlock(4)

        def forward(self, x):
            return self.block(self.block(x))

    report = check_patched(Recurrent())
    assert list(patterns(report)) == ["block"]


@pytest.mark.parametrize("layer", ["bn1", "drop", "depth", "se", "se.fc1", "act", "skip", "idle"])
def test_hooks_that_are_there_run(layer):
    class Everything(Layers):
        def __init__(self):
            super().__init__()
            self.act, self.drop, self.idle = nn.ReLU(), nn.Dropout(0.0), nn.Identity()
            self.depth = torchvision_ops().StochasticDepth(0.0, "row")
            self.se = torchvision_ops().SqueezeExcitation(4, 2)
            self.skip = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

        def forward(self, x):
            out = self.conv2(self.drop(self.act(self.bn1(self.conv1(x)))))
            return self.depth(self.se(self.bn2(self.idle(out)))) + self.skip(x)

    seen: list[str] = []
    model = settled(Everything())
    assert explain(model).coverage == 1.0
    expected = model(images())
    model.get_submodule(layer).register_forward_hook(lambda *_: seen.append(layer))
    patch(model)
    seen.clear()
    torch.testing.assert_close(model(images()), expected, rtol=1e-9, atol=1e-11)
    assert seen == [layer]


def test_quantised_layers():
    config = torch.ao.quantization.QConfig(
        activation=torch.ao.quantization.default_observer, weight=torch.ao.quantization.default_weight_observer
    )
    model = Layers()
    model.conv1 = torch.ao.nn.qat.Conv2d(4, 4, 3, padding=1, qconfig=config)
    report = patch(model)
    expected = "conv1 is a torch.ao.nn.qat.modules.conv.Conv2d, which has a forward of its own"
    assert expected in reasons(report)["conv1"]
    assert [site.convolutions for site in report.fused] == [("conv2",)]
    model = Layers()
    model.conv1 = torch.ao.nn.quantized.Conv2d(4, 4, 3, padding=1)
    assert [site.convolutions for site in patch(model).fused] == [("conv2",)]
    assert "self.conv1(" in patch(model).source("")


def test_convolution_under_two_names():
    class Alias(Layers):
        def __init__(self):
            super().__init__()
            self.conv2 = self.conv1

    report = check_patched(Alias())
    assert report.covered == 0
    assert report.total == 1
    assert "called more than once" in reasons(report)["conv1"]


def test_lazy_and_complex_layers():
    model = Layers()
    model.conv1 = nn.LazyConv2d(4, 3, padding=1)
    model.conv2.to(torch.complex64)
    report = explain(model)
    assert report.covered == 0
    assert "lazy" in reasons(report)["conv1"]
    assert "complex" in reasons(report)["conv2"]


def test_scripted_and_compiled_modules():
    model = nn.Sequential(ResidualBlock(4), torch.jit.script(ResidualBlock(4)), ResidualBlock(4))
    model[2].compile(backend="eager")
    report = patch(model)
    assert list(patterns(report)) == ["0"]
    assert "TorchScript" in reasons(report)["1"]
    assert {"2.conv1", "2.conv2"} <= reasons(report).keys()
    assert "torch.compile" in reasons(report)["2.conv1"]
    whole = explain(torch.compile(ResidualBlock(4), backend="eager"))
    assert whole.coverage == 0
    assert whole.total == 2
    assert all("torch.compile" in reason for reason in reasons(whole).values())


def test_graph_module_is_left():
    report = patch(fx.symbolic_trace(ResidualBlock(4)))
    assert report.fused == ()
    assert "GraphModule" in reasons(report)["conv1"]


def test_a_layer_with_a_class_of_its_own_has_its_own_reason():
    """Whatever is the matter with the module that holds it."""

    class Odd(Layers):
        def __init__(self):
            super().__init__()
            self.conv1 = StandardizedConv(4, 4, 3, padding=1)
            self.bn1 = nn.GroupNorm(2, 4)

        def forward(self, x):
            return self.branch(x) if x.sum() > 0 else x

    for prefix, model in (("", Odd()), ("0.", nn.Sequential(Odd()))):
        said = {path.removeprefix(prefix): reason for path, reason in reasons(explain(model)).items()}
        assert said["conv1"] == "conv1 is a StandardizedConv, which has a forward of its own"
        assert said["bn1"] == "bn1 is a GroupNorm, which is left as it is"
        assert "branches on data" in said["conv2"]
        assert "branches on data" in said["bn2"]


# -- reasons: norms, and convolutions that no block has --------------------------------------------------------------


class FrozenBatchNorm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.register_buffer("scale", torch.ones(channels, 1, 1))

    def forward(self, x):
        return x * self.scale


LAYERS = {
    "Conv1d": (nn.Conv1d(4, 4, 1), "other convolution"),
    "Conv3d": (nn.Conv3d(4, 4, 1), "other convolution"),
    "ConvTranspose2d": (nn.ConvTranspose2d(4, 4, 1), "other convolution"),
    "BatchNorm1d": (nn.BatchNorm1d(4), "norm"),
    "BatchNorm3d": (nn.BatchNorm3d(4), "norm"),
    "InstanceNorm2d": (nn.InstanceNorm2d(4), "norm"),
    "GroupNorm": (nn.GroupNorm(2, 4), "norm"),
    "LayerNorm": (nn.LayerNorm(4), "norm"),
    "RMSNorm": (nn.RMSNorm(4), "norm"),
    "LocalResponseNorm": (nn.LocalResponseNorm(2), "norm"),
    "FrozenBatchNorm": (FrozenBatchNorm(4), "norm"),
    "ScaledNorm": (ScaledNorm(4), "norm"),
}


@pytest.mark.parametrize("holder", [nn.Sequential, lambda m: nn.Sequential(nn.Sequential(m))], ids=["flat", "nested"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_no_block_has(name, holder):
    layer, kind = LAYERS[name]
    report = explain(nn.Sequential(ResidualBlock(4), holder(layer)))
    (left,) = report.declined
    assert (report.total, report.coverage, report.covered_norms) == (2, 1.0, 2)
    assert report.total_norms == 2 + (kind == "norm")
    assert left.kind == kind
    assert left.path.startswith("1.0")
    assert f" is a {name}, which " in left.reason


def test_what_only_sounds_like_a_norm():
    class Normalize(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(4, 1, 1))

        def forward(self, x):
            return x - self.mean

    class ConvNorm(nn.Sequential):
        pass

    unit = ConvNorm(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model = nn.Sequential(Normalize(), unit, parametrizations.spectral_norm(nn.Conv2d(4, 4, 1)))
    report = explain(model)
    assert report.total_norms == report.covered_norms == 1
    assert list(reasons(report)) == ["2"]


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda self, x: self.bn1(F.max_pool2d(x, 2)), "bn1 stands alone: no convolution next to it"),
        (lambda self, x: torch.tanh(self.bn1(x)), "bn1 stands alone: no convolution next to it"),
        (lambda self, x: self.bn1(self.odd(x)), "nothing to fuse bn1 with: conv2d is no step of a block"),
        (lambda self, x: self.bn1(self.hooked(x)), "nothing to fuse bn1 with: hooked has a forward hook"),
        (lambda self, x: self.odd(self.bn1(x)), "nothing to fuse bn1 with: conv2d is no step of a block"),
        (lambda self, x: (lambda y: self.bn1(y) * y)(self.conv1(x)), "the output of conv1 is used in more than one"),
        (lambda self, x: (lambda y: self.conv1(y) * y)(self.bn1(x)), "the output of bn1 is used in more than one"),
        (lambda self, x: self.bn1(self.bn1(self.conv1(x))), "bn1 is called more than once"),
        (lambda self, x: self.bn2(x) * torch.relu(self.conv1(x)), "the forward of the module that holds it does not"),
    ],
)
def test_why_a_batch_norm_is_left(forward, reason):
    model = type("Odd", (Layers,), {"forward": forward})()
    model.odd, model.hooked = StandardizedConv(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
    model.hooked.register_forward_hook(lambda *_: None)
    assert reasons(explain(model))["bn1"].startswith(reason)


def test_norms_of_modules_without_convolutions():
    report = explain(nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.BatchNorm2d(4))))
    assert reasons(report) == {"1.0": "0 stands alone: no convolution next to it"}
    unused = type("Unused", (nn.Module,), {"forward": lambda self, x: x})()
    unused.bn = nn.BatchNorm2d(4)
    assert reasons(explain(unused)) == {"bn": "the forward of the module that holds it does not call it"}
    assert reasons(explain(nn.BatchNorm2d(4))) == {"": "it is the whole model"}
    assert str(explain(nn.BatchNorm2d(4))).splitlines()[0].endswith("in 0 sites; 0 of 1 norms")


def test_the_last_norm_of_densenet():
    report = patch(torchvision_models().DenseNet(8, (2, 2), 16, 2, num_classes=7))
    assert reasons(report) == {"features.norm5": "norm5 stands alone: no convolution next to it"}
    assert report.covered_norms == report.total_norms - 1


def test_norms_that_are_left_are_told_of_again():
    model = nn.Sequential(Layers(), nn.MaxPool2d(2), nn.BatchNorm2d(4))
    model[0].bn2 = nn.GroupNorm(2, 4)
    first, second = patch(model), patch(model)
    assert first.declined == second.declined
    assert [(d.path, d.kind) for d in second.declined] == [("0.bn2", "norm"), ("2", "norm")]


# -- reasons: a forward that no graph can stand for ------------------------------------------------------------------


def branches(self, x):
    return self.branch(x) if x.sum() > 0 else self.branch(-x)


def branches_on_shape(self, x):
    return self.branch(x) if x.shape[0] > 1 else x


def keeps_value(self, x):
    self.kept = self.branch(x)
    return self.kept


def appends_value(self, x):
    self.history.append(self.branch(x))
    return self.history[-1]


def counts(self, x):
    self.calls += 1
    return self.branch(x)


def counts_in_buffer(self, x):
    self.counter += 1
    return self.branch(x)


def without_gradient(self, x):
    with torch.no_grad():
        return self.branch(x)


def with_autocast(self, x):
    with torch.autocast("cpu", enabled=True):
        return self.branch(x)


def checkpoints(self, x):
    return torch.utils.checkpoint.checkpoint(self.branch, x, use_reentrant=False)


def asks_for_the_type_of_anything(self, x):
    return self.branch(x) if isinstance(x.view(-1), torch.Tensor) else x


def asks_for_an_attribute(self, x):
    return self.branch(x.tensors if hasattr(x, "tensors") else x)


def draws_torch(self, x):
    return self.branch(x) if torch.rand(()) < 2 else x


def draws_python(self, x):
    return self.branch(x) if random.random() < 2 else x


def draws_numpy(self, x):
    return self.branch(x) if np.random.rand() < 2 else x


def makes_constant(self, x):
    return self.branch(x) + torch.ones(4, 1, 1, dtype=torch.float64)


def trains_differently(self, x):
    return self.branch(x) if self.training else self.bn1(self.conv1(x))


def takes_any(self, *tensors):
    return self.branch(tensors[0])


def odd_default(self, x, sizes=(1, 2)):
    return self.branch(x)


def loops(self, x):
    return sum(self.branch(part) for part in x.split(1))


def stores_item(self, x):
    y = self.branch(x)
    y[0] = 0
    return y


def unregistered(self, x):
    return self.hidden[0](self.branch(x))


def asks_for_gradients(self, x):
    return self.branch(x) if torch.is_grad_enabled() else x


def asks_for_gradients_by_another_name(self, x):
    return self.branch(x) if gradients_are_on() else x


def asks_for_inference_mode(self, x):
    return x if torch.is_inference_mode_enabled() else self.branch(x)


def asks_for_autocast(self, x):
    return x if torch.is_autocast_enabled("cpu") else self.branch(x)


def asks_for_tracing(self, x):
    return x if torch.jit.is_tracing() else self.branch(x)


def asks_for_compiling(self, x):
    return x if torch.compiler.is_compiling() else self.branch(x)


def asks_for_an_export(self, x):
    return x if torch.onnx.is_in_onnx_export() else self.branch(x)


def asks_for_processes(self, x):
    return x if torch.distributed.is_initialized() else self.branch(x)


UNTRACEABLE = {
    asks_for_gradients: "asks whether gradients are on",
    asks_for_gradients_by_another_name: "asks whether gradients are on",
    asks_for_inference_mode: "asks whether gradients are on",
    asks_for_autocast: "asks whether autocast is on",
    asks_for_tracing: "asks whether it is being traced",
    asks_for_compiling: "asks whether it is being traced, compiled",
    asks_for_an_export: "compiled or exported",
    asks_for_processes: "asks whether there are other processes",
    branches: "branches on data",
    branches_on_shape: "branches on data",
    keeps_value: "stores a value on the module ('kept')",
    appends_value: "stores a value on the module ('history')",
    counts: "stores a value on the module ('calls')",
    counts_in_buffer: "stores a value on the module",
    without_gradient: "switches gradients",
    with_autocast: "switches gradients, autocast",
    checkpoints: "checkpointing",
    asks_for_the_type_of_anything: "asks for the type",
    asks_for_an_attribute: "reads 'tensors' of an argument",
    draws_torch: "draws random numbers",
    draws_python: "draws random numbers",
    draws_numpy: "draws random numbers",
    makes_constant: "builds a constant tensor",
    trains_differently: "different things in train and in eval",
    takes_any: "takes *tensors",
    odd_default: "'sizes' is not a plain value",
    loops: "loops over",
    stores_item: "could not be traced (TypeError",
    unregistered: "not registered as a submodule",
}


@pytest.mark.parametrize("forward", UNTRACEABLE, ids=lambda f: f.__name__)
def test_untraceable(forward):
    model = type("Odd", (Layers,), {"forward": forward})()
    model.history, model.calls, model.hidden = [], 0, [nn.Conv2d(4, 4, 1)]
    model.register_buffer("counter", torch.zeros(()))
    settled(model.hidden[0])
    settled(model).eval()
    model.bn1.train()
    before = {name: (dict(m.__dict__), m.training) for name, m in model.named_modules()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    report = patch(model)
    assert report.fused == ()
    for conv in ("conv1", "conv2"):
        assert UNTRACEABLE[forward] in reasons(report)[conv]
    assert type(model).__name__ == "Odd"
    assert {name: (m.__dict__, m.training) for name, m in model.named_modules()} == before
    assert model.history == []
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert (states[2] == np.random.get_state()[1]).all()
    assert all(torch.equal(buffers[name], b) for name, b in model.named_buffers())


def test_installed_libraries_are_the_users_code():
    """The layers of torchvision's DenseNet ask for the type of their input, which a dense block makes a list."""
    densenet = torchvision_models().densenet
    layer = densenet._DenseLayer(4, 2, 2, 0.0)
    assert "not isinstance(input, Tensor)" in explain(layer).source("")
    block = densenet._DenseBlock(2, 4, 2, 2, 0.0)
    block.denselayer1.norm2.register_forward_hook(lambda *_: None)
    report = check_patched(block)
    assert "asks for the type" in reasons(report)["denselayer1.conv1"]


def test_the_reason_shows_the_line():
    report = explain(type("Odd", (Layers,), {"forward": branches})())
    assert "test_plan.py" in reasons(report)["conv1"]
    assert "x.sum() > 0" in reasons(report)["conv1"]


def test_forward_replaced_on_the_block():
    model = Layers()
    model.forward = lambda x: x
    assert "replaced on the instance" in reasons(patch(model))["conv1"]


def test_defaults_are_honoured():
    class Optional(Layers):
        def forward(self, x, scale=1.0, mask=None, *, twice=False):
            out = self.branch(x) * scale
            if mask is not None:
                out = out * mask
            return out + out if twice else out

    stock, model = settled(Optional()).eval(), settled(Optional()).eval()
    assert patch(model).coverage == 1.0
    x = images()
    for args, kwargs in (((), {}), ((2.0,), {}), ((1.0, x), {}), ((), {"twice": True}), ((), {"mask": x})):
        torch.testing.assert_close(model(x, *args, **kwargs), stock(x, *args, **kwargs), rtol=1e-9, atol=1e-11)


def test_required_arguments_may_be_none():
    class Skip(Layers):
        def forward(self, x, skip):
            return self.branch(x) if skip is None else self.branch(x) + skip

    stock, model = settled(Skip()).eval(), settled(Skip()).eval()
    assert patch(model).coverage == 1.0
    for skip in (None, images() * 2):
        torch.testing.assert_close(model(images(), skip), stock(images(), skip), rtol=1e-9, atol=1e-11)


def test_arguments_named_like_the_generated_names():
    class Names(Layers):
        def forward(self, block_0, fusedres_block, stock):
            return self.branch(block_0) + fusedres_block * stock

    report = check_patched(Names(), images(), images() * 2, images() * 3)
    assert report.coverage == 1.0


# -- selection -------------------------------------------------------------------------------------------------------


def blocks() -> nn.Sequential:
    return nn.Sequential(ResidualBlock(4), BottleneckBlock(4, 8), MyResNet(8, 4, 2))


ALL = ["0", "1", "2.stem", "2.layers.0", "2.layers.1"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ALL),
        ({"only": "2"}, ALL[2:]),
        ({"only": "2.layers.*"}, ALL[3:]),
        ({"only": ResidualBlock}, ["0", *ALL[3:]]),
        ({"only": ["1", ResidualBlock], "skip": "*.0"}, ["0", "1", "2.layers.1"]),
        ({"skip": (BottleneckBlock, "2.stem")}, ["0", *ALL[3:]]),
        ({"skip": ""}, []),
        ({"skip": (nn.Conv2d, nn.BatchNorm2d)}, []),
    ],
)
def test_only_and_skip(options, expected):
    model = blocks()
    report = patch(model, **options)
    assert list(patterns(report)) == expected
    assert [p for p, m in model.named_modules() if type(m).__name__.startswith("Fused")] == expected
    kinds = Counter(d.kind for d in report.declined)
    assert kinds["convolution"] + report.covered == report.total
    assert kinds["norm"] + report.covered_norms == report.total_norms
    assert all("only=" in reason or "skip=" in reason for reason in reasons(report).values())


def test_skip_of_one_inner_layer_fuses_the_rest():
    report = check_patched(ResidualBlock(4), skip="conv1")
    assert patterns(report) == {"": ["post-activation residual (second input)"]}
    assert reasons(report) == {"conv1": "conv1 is named by skip="}


def test_skip_of_one_norm_fuses_the_rest():
    report = check_patched(ResidualBlock(4), skip="bn1")
    assert reasons(report)["bn1"] == "bn1 is named by skip="
    assert patterns(report) == {"": ["post-activation residual (second input)"]}


def test_skip_of_the_convolutions_fuses_what_is_around_them():
    report = check_patched(ResidualBlock(4), skip=nn.Conv2d)
    assert patterns(report) == {"": ["bn-relu", "norm and residual (second input)"]}


@pytest.mark.parametrize("argument", ["only", "skip"])
def test_bad_selection(argument):
    with pytest.raises(ValueError, match=f"{argument}: the model has no module 'layer9'"):
        patch(blocks(), **{argument: "layer9"})
    with pytest.raises(TypeError, match=f"{argument} takes paths, globs and classes, got int"):
        patch(blocks(), **{argument: 3})


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got int"):
        patch(3)
    with pytest.raises(ValueError, match="memory must be 'auto' or 'low', got 'high'"):
        patch(blocks(), memory="high")
    with pytest.raises(ValueError, match=r"backend must be 'auto' or one of .* got 'abacus'"):
        patch(blocks(), backend="abacus")


def test_backend_that_cannot_run_leaves_the_model():
    model = settled(blocks())
    with pytest.raises(RuntimeError, match="backend 'cpu' was asked for, but"):
        patch(model, backend="cpu")
    assert unpatch(model) == 0


def test_class_that_refuses_to_be_derived_from():
    class Final(Layers):
        def __init_subclass__(cls):
            raise ValueError("final")

    report = check_patched(nn.Sequential(Final(), ResidualBlock(4)))
    assert list(patterns(report)) == ["1"]
    assert "cannot be derived from (ValueError: final)" in reasons(report)["0.conv1"]


def test_models_without_convolutions():
    for model in (nn.Linear(2, 2), nn.Sequential(), nn.Conv2d(1, 1, 1)):
        report = patch(model)
        assert report.fused == ()
        assert unpatch(model) == 0
        assert report.coverage == 0.0


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_looking_at_a_spectral_norm_does_not_move_it_on(norm):
    model = nn.Sequential(Layers(), norm(nn.Conv2d(4, 4, 3)), nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    before = {name: value.clone() for name, value in model.train().state_dict().items()}
    assert patch(model).covered == 3
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Helped(nn.Module):
    """Its forward asks for the mode, and does nothing in evaluation, but something in training."""

    def forward(self, x):
        return x * 2 if self.training else x


def test_a_module_that_does_nothing_in_evaluation_alone():
    class Block(Layers):
        def __init__(self):
            super().__init__()
            self.helped = Helped()

        def forward(self, x):
            return torch.relu(self.helped(self.branch(x)) + x)

    report = check_patched(Block())
    assert report.coverage == 1.0
    assert "self.helped(" in report.source("")
