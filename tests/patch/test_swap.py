"""Life of a patched model: undoing, copying, pickling, hooks, modes, and what tracebacks show."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import subprocess
import sys
import traceback
from importlib import import_module
from pathlib import Path

import pytest
import torch
from survey_blocks import DenseBottleneckBlock, MyResNet, ResidualBlock, SEBottleneckBlock
from torch import fx, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from torchvision_shim import torchvision_models

from fusedres.patch import explain, patch, unpatch
from fusedres.testing import compare

from .blocks import Layers, assert_same, check_patched, images, settled


def classes(model: nn.Module) -> dict[str, type]:
    return {path: type(module) for path, module in model.named_modules()}


def state(model: nn.Module) -> dict[str, dict]:
    return {path: dict(module.__dict__) for path, module in model.named_modules()}


# -- doing and undoing -----------------------------------------------------------------------------------------------


def test_unpatch_is_exact():
    model = settled(MyResNet(3, 4, 2)).eval()
    before, attributes, parameters = classes(model), state(model), list(model.parameters())
    keys = list(model.state_dict())
    assert patch(model).coverage == 1.0
    assert classes(model) != before
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters))
    assert isinstance(model.layers[0], ResidualBlock)
    model(images(3))
    assert unpatch(model) == 3
    assert classes(model) == before
    assert state(model) == attributes
    assert unpatch(model) == 0


def test_patching_twice_changes_nothing():
    model = MyResNet(3, 4, 2)
    first = patch(model)
    once = classes(model)
    second = patch(model)
    assert classes(model) == once
    assert second.coverage == first.coverage == 1.0
    assert [site.path for site in second.fused] == [site.path for site in first.fused]
    assert not any(site.already for site in first.fused)
    assert all(site.already for site in second.fused)
    assert second.source("stem") == first.source("stem")
    assert unpatch(model) == 3


def test_patch_after_a_partial_unpatch():
    model = MyResNet(3, 4, 2)
    patch(model)
    assert unpatch(model.layers) == 2
    assert [site.already for site in patch(model).fused] == [True, False, False]
    assert unpatch(model) == 3


def test_explain_and_dry_run_change_nothing():
    model = MyResNet(3, 4, 2)
    before = classes(model)
    for report in (explain(model), patch(model, dry_run=True)):
        assert report.dry_run
        assert report.coverage == 1.0
        assert classes(model) == before
    assert [site.path for site in report.fused] == [site.path for site in patch(model).fused]


def test_no_class_is_touched_globally():
    other, forward = ResidualBlock(4), ResidualBlock.forward
    patch(ResidualBlock(4))
    assert type(other) is ResidualBlock
    assert ResidualBlock.forward is forward


def test_equal_sites_share_a_class_and_others_do_not():
    model = MyResNet(3, 4, 2)
    patch(model)
    assert type(model.layers[0]) is type(model.layers[1])
    other = ResidualBlock(4)
    patch(other, memory="low")
    assert type(other) is not type(model.layers[0])


def test_options_stay_with_the_site():
    model = settled(ResidualBlock(4))
    source = patch(model, memory="low", backend="reference").source("")
    assert "run(block_0, self, x, backend = 'reference', memory = 'low')" in source
    assert explain(model).fused[0].backend == "reference"


# -- copies and files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: copy.copy(m)], ids=["deepcopy", "copy"])
def test_copies_stay_patched(duplicate):
    model = settled(MyResNet(3, 4, 1)).eval()
    patch(model)
    with torch.no_grad():
        model(images(3))  # folded weights exist now, and are no part of a copy
    twin = duplicate(model)
    assert classes(twin) == classes(model)
    block = duplicate(model.layers[0])
    assert type(block) is type(model.layers[0])


def test_deepcopy_is_independent():
    stock = settled(MyResNet(3, 4, 1))
    model = copy.deepcopy(stock)
    patch(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same(twin, stock, images(3))
    assert unpatch(twin) == 2
    assert type(model.layers[0]).__name__ == "FusedResidualBlock"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_holds_the_stock_class(protocol):
    model = settled(MyResNet(3, 4, 1))
    patch(model)
    with torch.no_grad():
        model.eval()(images(3))  # folded weights exist now, and are no part of the file
    loaded = pickle.loads(pickle.dumps(model, protocol))
    assert {type(m) for m in loaded.modules()} == {type(m) for m in MyResNet(3, 4, 1).modules()}
    assert type(model.layers[0]).__name__ == "FusedResidualBlock"
    assert_same(loaded, copy.deepcopy(loaded), images(3))


LOAD_WITHOUT_FUSEDRES = """
import sys
sys.modules["fusedres"] = None  # makes every import of it fail
sys.path.insert(0, sys.argv[1])
import torch
model = torch.load(sys.argv[2], weights_only=False).eval()
assert [type(m).__name__ for m in model.modules()].count("ResidualBlock") == 2, model
torch.save(model(torch.load(sys.argv[3])), sys.argv[4])
assert not any(name.startswith("fusedres.") for name in sys.modules)
"""

STANDALONE = """
import torch
from torch import nn


class ResidualBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        return torch.relu(self.bn(self.conv(x)) + x)
"""


def test_torch_save_loads_without_fusedres(tmp_path, monkeypatch):
    (tmp_path / "standalone_model.py").write_text(STANDALONE)
    monkeypatch.syspath_prepend(tmp_path)
    module = __import__("standalone_model")
    model = settled(nn.Sequential(module.ResidualBlock(), module.ResidualBlock())).eval()
    expected = model(images())
    assert patch(model).coverage == 1.0
    model(images())
    torch.save(model, tmp_path / "model.pt")
    torch.save(images(), tmp_path / "x.pt")
    files = [str(tmp_path / name) for name in ("", "model.pt", "x.pt", "y.pt")]
    subprocess.run([sys.executable, "-c", LOAD_WITHOUT_FUSEDRES, *files], check=True, cwd=tmp_path)
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), expected)


class Reduced(Layers):
    """A block with pickling and copying of its own."""

    def __reduce_ex__(self, protocol):
        return _rebuild, (type(self), self.state_dict())

    def __deepcopy__(self, memo):
        twin = _rebuild(type(self), self.state_dict())
        twin.copied = True
        return twin


class Stateful(Layers):
    def __getstate__(self):
        return {**self.__dict__, "saved": True}


def _rebuild(cls, state_dict):
    model = cls().double()
    model.load_state_dict(state_dict)
    return model


def test_classes_with_their_own_pickling():
    model = settled(Reduced())
    patch(model)
    loaded, twin = pickle.loads(pickle.dumps(model)), copy.deepcopy(model)
    assert type(loaded) is Reduced
    assert type(twin) is type(model) is not Reduced
    assert twin.copied
    unpatch(model)
    assert_same(twin, copy.deepcopy(model), images())
    stateful = settled(Stateful())
    patch(stateful)
    loaded = pickle.loads(pickle.dumps(stateful))
    assert type(loaded) is Stateful
    assert loaded.saved


def test_data_parallel_replicas():
    model = settled(ResidualBlock(4))
    patch(model)
    replica = model._replicate_for_data_parallel()
    assert type(replica) is type(model)


# -- the module in use -----------------------------------------------------------------------------------------------


def test_hooks_on_the_block_run():
    model, seen = settled(MyResNet(3, 4, 1)), []
    model.layers[0].register_forward_pre_hook(lambda *_: seen.append("before"))
    report = patch(model)
    model.layers[0].register_forward_hook(lambda *_: seen.append("after"))
    model.layers[0].register_full_backward_hook(lambda *_: seen.append("backward"))
    assert report.coverage == 1.0
    model(images(3)).sum().backward()
    assert seen == ["before", "after", "backward"]


def test_modes_are_those_of_each_norm():
    """A frozen norm inside a training model, and the reverse."""
    stock = settled(ResidualBlock(4))
    model = copy.deepcopy(stock)
    patch(model)
    for frozen in ("bn1", "bn2"):
        for m in (stock, model):
            m.train()
            m.get_submodule(frozen).eval()
        assert not model.get_submodule(frozen).training
        before = model.get_submodule(frozen).running_mean.clone()
        torch.testing.assert_close(model(images()), stock(images()), rtol=1e-9, atol=1e-11)
        assert torch.equal(model.get_submodule(frozen).running_mean, before)
        for name, buffer in stock.named_buffers():
            torch.testing.assert_close(model.get_buffer(name), buffer, rtol=1e-9, atol=1e-11)


def test_patching_leaves_the_modes():
    model = MyResNet(3, 4, 2).eval()
    model.layers[0].bn1.train()
    before = {path: m.training for path, m in model.named_modules()}
    patch(model)
    assert {path: m.training for path, m in model.named_modules()} == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_may_change(dtype):
    def patch_in_double(model):
        patch(model.double())
        model.eval()(images(3))
        model.to(dtype)

    stock = settled(MyResNet(3, 4, 2)).eval()
    compare(stock, patch_in_double, lambda seed: [images(3)], dtype=dtype).check()


def test_frozen_parameters_get_no_gradient():
    stock = settled(MyResNet(3, 4, 2))
    model = copy.deepcopy(stock)
    patch(model)
    for m in (stock, model):
        m.stem.requires_grad_(False)
        m.layers[0].bn1.requires_grad_(False)
        m.layers[1].conv2.bias.requires_grad_(False)
    assert_same(model, stock, images(3))


def test_loading_weights_reaches_folded_ones():
    stock, model = settled(MyResNet(3, 4, 2)).eval(), settled(MyResNet(3, 4, 2), seed=5).eval()
    patch(model)
    with torch.no_grad():
        before = model(images(3))
        model.load_state_dict(stock.state_dict())
        torch.testing.assert_close(model(images(3)), stock(images(3)), rtol=1e-9, atol=1e-11)
        assert not torch.equal(before, model(images(3)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_around_blocks(reentrant):
    class Checkpointed(MyResNet):
        def forward(self, x):
            x = self.stem(x)
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=reentrant)
            return x

    report = check_patched(Checkpointed(3, 4, 2), images(3))
    assert report.coverage == 1.0


def test_part_of_a_patched_model():
    """What reads features from the middle of a model builds a new one from its children."""
    stock = settled(MyResNet(3, 4, 2)).eval()
    model = copy.deepcopy(stock)
    patch(model)
    part = nn.Sequential(model.stem, model.layers[0])
    assert type(part[1]).__name__ == "FusedResidualBlock"
    torch.testing.assert_close(part(images(3)), stock.layers[0](stock.stem(images(3))), rtol=1e-9, atol=1e-11)


def test_a_patched_model_is_traced_as_its_stock_layers():
    model = settled(MyResNet(3, 4, 2)).eval()
    expected = model(images(3))
    patch(model)
    graph = fx.symbolic_trace(model)
    assert "layers.1.conv2" in {node.target for node in graph.graph.nodes}
    torch.testing.assert_close(graph(images(3)), expected, rtol=1e-9, atol=1e-11)


EXPORTED = {
    "one block": (lambda: ResidualBlock(4), lambda: images()),
    "network": (lambda: MyResNet(3, 4, 2), lambda: images(3)),
    "dense": (lambda: DenseBottleneckBlock(2, 4, 2), lambda: images()),
    "gated": (lambda: Gated(), lambda: images()),
}


class Gated(Layers):
    def forward(self, x):
        m = torch.sigmoid(self.conv2(x))
        return m * self.bn1(self.conv1(x)) + (1 - m) * x


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("name", EXPORTED)
def test_a_traced_model_has_stock_ops(name, grad):
    make, x = EXPORTED[name]
    model = settled(make()).eval()
    expected = model(x())
    assert patch(model).fused
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, (x(),))
    kinds = {node.kind().partition("::")[0] for node in traced.inlined_graph.nodes()}
    assert kinds <= {"aten", "prim"}
    torch.testing.assert_close(traced(x()), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize("name", EXPORTED)
def test_onnx_has_stock_ops(name, dynamo, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    make, x = EXPORTED[name]
    model = settled(make()).float().eval()
    assert patch(model).fused
    with torch.no_grad():
        torch.onnx.export(model, (x().float(),), tmp_path / "model.onnx", dynamo=dynamo, verbose=False)
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    assert "Conv" in {node.op_type for node in nodes}
    assert {node.domain for node in nodes} <= {"", "ai.onnx"}


@pytest.mark.filterwarnings("ignore")
def test_exported_programs_have_stock_ops():
    model = settled(MyResNet(3, 4, 1)).eval()
    expected = model(images(3))
    patch(model)
    program = torch.export.export(model, (images(3),))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "aten.conv2d.default" in targets
    assert all(target.startswith("aten.") for target in targets)
    torch.testing.assert_close(program.module()(images(3)), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.filterwarnings("ignore")
def test_scripting_says_what_to_do():
    model = MyResNet(3, 4, 1)
    patch(model)
    with pytest.raises(RuntimeError, match=r"call fusedres.unpatch\(model\) first"):
        torch.jit.script(model)
    unpatch(model)
    torch.jit.script(model)


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_optimizer_made_before_or_after(when):
    stock, model = settled(MyResNet(3, 4, 2)), settled(MyResNet(3, 4, 2))
    theirs = torch.optim.SGD(stock.parameters(), 0.1, momentum=0.9)
    if when == "before":
        ours = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        patch(model)
    else:
        patch(model)
        ours = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for m, optimizer in ((stock, theirs), (model, ours)):
        for _ in range(2):
            optimizer.zero_grad()
            m(images(3)).square().mean().backward()
            optimizer.step()
    for (name, ours), theirs in zip(model.named_parameters(), stock.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11, msg=name)


def test_averaged_copies():
    """An exponential moving average is a deep copy whose parameters are written to in place."""
    stock, model = settled(MyResNet(3, 4, 1)), settled(MyResNet(3, 4, 1))
    patch(model)
    kept = [AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True) for m in (stock, model)]
    for average, m in zip(kept, (stock, model)):
        average.eval()
        with torch.no_grad():
            average(images(3))
            for parameter in m.parameters():
                parameter.mul_(1.5)
        average.update_parameters(m)
        average.update_parameters(m)
    assert type(kept[1].module.layers[0]).__name__ == "FusedResidualBlock"
    with torch.no_grad():
        torch.testing.assert_close(kept[1](images(3)), kept[0](images(3)), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("move", ["half", "bfloat16", "channels_last", "float and back"])
def test_moving_a_patched_model(move):
    stock, model = settled(MyResNet(3, 4, 1)).float().eval(), settled(MyResNet(3, 4, 1)).float().eval()
    patch(model)
    with torch.no_grad():
        model(images(3).float())  # folded weights exist now, and must not be used again
        if move == "channels_last":
            moved, x = model.to(memory_format=torch.channels_last), images(3).float()
        elif move == "float and back":
            moved, x = model.double().float(), images(3).float()
        else:
            moved, x = getattr(model, move)(), getattr(images(3), move)()
        out = moved(x)
    assert out.dtype == x.dtype
    tolerance = {torch.float16: 2e-2, torch.bfloat16: 1e-1}.get(x.dtype, 1e-5)
    torch.testing.assert_close(out.float(), stock(images(3).float()), rtol=tolerance, atol=tolerance)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(
    "change",
    [
        lambda conv: parametrizations.weight_norm(conv),
        lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
        lambda conv: weight_norm(conv),
    ],
    ids=["parametrization", "pruning", "weight norm"],
)
def test_layers_that_are_changed_after_patching(change):
    stock, model = settled(MyResNet(3, 4, 1)).eval(), settled(MyResNet(3, 4, 1)).eval()
    patch(model)
    with torch.no_grad():
        model(images(3))
    for m in (stock, model):
        change(m.layers[0].conv1)
        with torch.no_grad():
            for parameter in m.layers[0].conv1.parameters():
                parameter.mul_(1.25)
    torch.testing.assert_close(model(images(3)), stock(images(3)), rtol=1e-9, atol=1e-11)
    fused = classes(model)
    for look in (explain, patch):
        report = look(model)
        assert "layers.0.conv1" in {d.path for d in report.declined}
        assert "layers.0.conv2" in {c for site in report.fused for c in site.convolutions}
        assert (classes(model) == fused) == report.dry_run
    torch.testing.assert_close(model(images(3)), stock(images(3)), rtol=1e-9, atol=1e-11)


def test_features_of_a_model_that_is_patched_afterwards_and_before():
    getter = import_module("torchvision.models._utils").IntermediateLayerGetter if torchvision_models() else None
    model = settled(torchvision_models().resnet18()).eval()
    expected = getter(model, {"layer1": "a"})(images(3, 32))["a"]
    part = getter(model, {"layer1": "a"})
    assert patch(part).coverage > 0
    torch.testing.assert_close(part(images(3, 32))["a"], expected, rtol=1e-9, atol=1e-11)


def test_feature_extraction():
    models = torchvision_models()
    feature_extraction = import_module("torchvision.models.feature_extraction")
    getter = import_module("torchvision.models._utils").IntermediateLayerGetter
    stock = settled(models.resnet18()).eval()
    model = copy.deepcopy(stock)
    patch(model)
    nodes = {"layer1": "a", "layer2": "b"}
    x = images(3, 32)
    for extract in (getter, feature_extraction.create_feature_extractor):
        ours, theirs = extract(model, nodes)(x), extract(stock, nodes)(x)
        for name in ("a", "b"):
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-9, atol=1e-11)


def test_a_train_method_of_its_own_is_not_called():
    class Frozen(ResidualBlock):
        def train(self, mode=True):
            raise AssertionError("called")

    assert patch(nn.Sequential(Frozen(4))).coverage == 1.0


def test_a_sequential_that_grows_runs_what_it_holds():
    model = settled(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())).eval()
    x = images()
    expected = model(x)
    assert patch(model).coverage == 1.0
    part = model[:2]
    assert type(part) is nn.Sequential
    assert len(part) == 2
    assert part(x).min() < 0
    model.append(nn.Hardtanh(0.0, 0.1))
    torch.testing.assert_close(model(x), expected.clamp(0, 0.1))


def test_repr_shows_the_class():
    model = MyResNet(3, 4, 1)
    patch(model)
    said = "(0): FusedResidualBlock(\n      survey_blocks.ResidualBlock, fused by fusedres\n      (conv1)"
    assert said in repr(model)
    assert "(conv1): Conv2d(4, 4" in repr(model)


def test_repr_keeps_what_the_class_says():
    class Named(ResidualBlock):
        def extra_repr(self):
            return f"of {self.conv1.in_channels} channels"

    model = Named(4)
    patch(model)
    assert model.extra_repr().splitlines() == [f"{__name__}.{Named.__qualname__}, fused by fusedres", "of 4 channels"]
    unpatch(model)
    assert model.extra_repr() == "of 4 channels"


# -- the generated code ----------------------------------------------------------------------------------------------


def test_source_is_what_runs():
    model = ResidualBlock(4)
    source = patch(model).source("")
    assert source.splitlines() == [
        f"# {ResidualBlock.__module__}.ResidualBlock, with a forward written by fusedres.patch",
        "# block_0: relu(x -> conv1 -> bn1 -> relu -> conv2 -> bn2  +  x)",
        "",
        "def forward(self, x):",
        "    if changed(self, watched):",
        "        return stock.forward(self, x)",
        "    return fusedres_block.run(block_0, self, x)",
    ]
    assert inspect.getsource(type(model).forward).strip() == "\n".join(source.splitlines()[3:])


def test_tracebacks_show_the_line():
    model = ResidualBlock(4)
    patch(model)
    with pytest.raises(RuntimeError) as caught:
        model(torch.zeros(1, 5, 6, 6))
    assert "return fusedres_block.run(block_0, self, x)" in "".join(traceback.format_tb(caught.value.__traceback__))


def test_leftover_code_keeps_its_meaning():
    class Busy(Layers):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(1))
            self.register_buffer("offset", torch.ones(4, 1, 1))

        def forward(self, x):
            n, c = x.size(0), x.shape[1]
            y = torch.relu(self.branch(x) + x) * self.gain + self.offset
            y = torch.cat([y, x[:, :1]], dim=1).reshape(n, (c + 1), -1)
            return {"out": y.mean(-1), "pair": (y.amax(-1), n)}["pair"][0]

    assert check_patched(Busy()).coverage == 1.0


def test_buffers_in_files_and_streams():
    model = settled(MyResNet(3, 4, 1))
    patch(model)
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    stream.seek(0)
    assert list(torch.load(stream)) == list(MyResNet(3, 4, 1).state_dict())


def test_importing_submodules_leaves_the_function():
    code = (
        "import fusedres, sys\n"
        "from fusedres.patch import patch\n"
        "import fusedres.patch.report, fusedres.patch.trace, fusedres.patch.patterns.chain\n"
        "assert fusedres.patch is patch and callable(fusedres.patch), fusedres.patch\n"
        "assert fusedres.unpatch and fusedres.explain and fusedres.PatchReport\n"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


def test_compilers_may_freeze_a_patched_model():
    """They make an empty instance of a module's class for it, without what its constructor asks for."""
    model = settled(ResidualBlock(4)).eval()
    patch(model)
    empty = type(model).__new__(type(model))
    empty.__dict__ = model.__dict__
    assert type(empty) is type(model)
    with torch.no_grad():
        assert torch.equal(empty(images()), model(images()))


def test_forward_mode_differentiates_the_modules():
    model = settled(ResidualBlock(4)).eval()
    stock = copy.deepcopy(model)
    patch(model)
    tangent = torch.ones_like(images())
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients), forward_ad.dual_level():
            found, expected = (
                forward_ad.unpack_dual(m(forward_ad.make_dual(images(), tangent))).tangent for m in (model, stock)
            )
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("make", [lambda: ResidualBlock(4), lambda: SEBottleneckBlock(4, 8, 2, 2)])
def test_shapes_on_the_meta_device(make):
    model = make()
    patch(model)
    stock = copy.deepcopy(model)
    assert unpatch(stock)
    x = torch.empty(2, 4, 8, 8, device="meta")
    for training in (True, False):
        assert model.to("meta").train(training)(x).shape == stock.to("meta").train(training)(x).shape
