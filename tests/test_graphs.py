"""Compiled models keep the engine's ops, in the modes and with the modules that they are guarded for."""

from __future__ import annotations

import copy
import gc
import json
from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from trained import small_resnet

import fusedres
from fusedres import env
from fusedres import nn as blocks
from fusedres.binding import Binder
from fusedres.block import Act, Block, Conv, Norm, run
from fusedres.engine.graph import _FOLDED, as_constants, from_constants
from fusedres.models import densenet121, resnet50
from fusedres.ops.activations import RELU
from fusedres.testing import INPUTS, channels_last, compare

needs_library = pytest.mark.skipif(env.library_missing() is not None, reason=str(env.library_missing()))
SHAPE = (4, 32, 14, 14)


def images(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return channels_last(SHAPE, dtype, seed)


def bottleneck(**options) -> nn.Module:
    torch.manual_seed(0)
    return blocks.BottleneckBlock(32, 32, **options).to(memory_format=torch.channels_last)


class Recorder:
    """A compiler that runs what it is given as it is, and counts the ops of this library in it."""

    def __init__(self) -> None:
        self.ops: Counter[str] = Counter()
        self.graphs = 0

    def __call__(self, gm: torch.fx.GraphModule, example: list[Tensor]) -> Callable:
        self.graphs += 1
        return aot_autograd(fw_compiler=self._record, bw_compiler=self._record)(gm, example)

    def _record(self, gm: torch.fx.GraphModule, example: list[Tensor]) -> Callable:
        for node in gm.graph.nodes:
            for op in (node.target, *node.args[:1]):
                name = str(op)
                if node.op == "call_function" and name.startswith("fusedres."):
                    self.ops[name.split(".")[1]] += 1
        return gm.forward


def recorded(module: nn.Module, x: Tensor, backward: bool = True) -> Recorder:
    torch._dynamo.reset()
    recorder = Recorder()
    out = torch.compile(module, backend=recorder, fullgraph=True)(x)
    if backward:
        out.sum().backward()
    return recorder


def test_training_is_made_of_the_engines_ops():
    ops = recorded(bottleneck(), images()).ops
    forward = {name for name in ops if "backward" not in name}
    assert {name.removesuffix("_cpu") for name in forward} >= {"bn_stats", "bn_norm", "join"}
    assert any(name.startswith("join_backward") for name in ops)


def test_inference_is_one_op():
    with torch.no_grad():
        assert recorded(bottleneck().eval(), images(), backward=False).ops == {"infer_block": 1}


def test_export_keeps_stock_ops():
    program = torch.export.export(bottleneck().eval(), (images(),), strict=True)
    assert not any("fusedres" in str(node.target) for node in program.graph.nodes)


def hooked() -> nn.Module:
    block = bottleneck()
    next(m for m in block.modules() if isinstance(m, nn.Conv2d)).register_forward_hook(lambda m, args, out: out * 2)
    return block


def replaced() -> nn.Module:
    class Twice(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    block = bottleneck()
    block.conv2.__class__ = Twice
    return block


def idle() -> nn.Module:
    """Convolutions with ReLUs, of which training would save nothing."""
    model = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 1), nn.ReLU())
    fusedres.patch(model.to(memory_format=torch.channels_last))
    return model


@pytest.mark.parametrize("make", [hooked, replaced, idle])
def test_what_the_engine_leaves_to_the_modules(make):
    assert recorded(make(), images()).ops == {}

    def compile_(module: nn.Module) -> None:
        torch._dynamo.reset()
        module.compile(backend="aot_eager", fullgraph=True)

    compare(make(), compile_, lambda seed: [images(seed)]).check()


def test_each_module_has_its_own_settings():
    """One function compiled for two blocks of a class, whose norms differ in what is a constant of the graph."""
    first, second = bottleneck(), bottleneck()
    for norm in second.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eps = 0.5
    torch._dynamo.reset()
    compiled = torch.compile(lambda block, x: block(x), backend="aot_eager", fullgraph=True)
    for block in (first, second, first):
        expected = copy.deepcopy(block)(images())
        torch.testing.assert_close(compiled(block, images()), expected, rtol=0, atol=0)


def test_equal_blocks_share_a_graph():
    torch._dynamo.reset()
    recorder = Recorder()
    for _ in range(10):
        block = bottleneck()
        for p in block.parameters():
            nn.init.normal_(p, std=0.1)
        expected = copy.deepcopy(block)(images())
        block.compile(backend=recorder, fullgraph=True)
        torch.testing.assert_close(block(images()), expected, rtol=0, atol=0)
    assert recorder.graphs == 1


def test_a_block_that_never_ran():
    block = Block((Conv("conv"), Norm("norm"), Act(RELU)))
    module = nn.ModuleDict({"conv": nn.Conv2d(32, 32, 3, padding=1), "norm": nn.BatchNorm2d(32)})
    module.to(memory_format=torch.channels_last)
    expected = run(block, copy.deepcopy(module), images())
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: run(block, module, x), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images()), expected, rtol=0, atol=0)


def test_parameters_given_for_a_call():
    block = bottleneck()
    given = {name: 2 * p.detach() for name, p in block.named_parameters()}
    buffers = {name: b.clone() for name, b in block.named_buffers()}

    def call(x: Tensor) -> Tensor:
        return torch.func.functional_call(block, {**given, **buffers}, (x,))

    expected = call(images())
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(call, backend="aot_eager", fullgraph=True)(images()), expected)


@pytest.mark.parametrize(
    "options", [{"drop_path": 0.5}, {"drop_path": 0.5, "reduction": 4}], ids=["drop path", "drop path, excitation"]
)
def test_chance_is_drawn_anew_in_every_call(options):
    kind = blocks.SEBottleneckBlock if "reduction" in options else blocks.BottleneckBlock
    block = kind(32, 32, **options).to(memory_format=torch.channels_last)
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    torch.manual_seed(0)
    outputs = [compiled(images()) for _ in range(8)]
    assert any(not torch.equal(outputs[0], other) for other in outputs[1:])
    outputs[-1].sum().backward()
    torch.manual_seed(0)
    again = compiled(images())
    torch.testing.assert_close(again, outputs[0], rtol=0, atol=0)


def test_memory_low_is_lower_in_a_graph_too():
    def saved(memory: str) -> int:
        model = small_resnet().to(memory_format=torch.channels_last)
        fusedres.patch(model, memory=memory)
        torch._dynamo.reset()
        found = []

        def keep(gm: torch.fx.GraphModule, example: list[Tensor]) -> Callable:
            found.append(sum(n.meta["val"].nbytes for n in gm.graph.find_nodes(op="placeholder") if "val" in n.meta))
            return gm.forward

        backend = aot_autograd(fw_compiler=lambda gm, example: gm.forward, bw_compiler=keep)
        torch.compile(model, backend=backend, fullgraph=True)(channels_last((4, 3, 64, 64))).sum().backward()
        return found[0]

    assert saved("low") <= saved("auto")


# ---------------------------------------------------------------------------------------------------------------------
# Inference, and what is kept for it
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("how", ["trained", "loaded", "stepped"])
def test_inference_follows_the_parameters(how):
    block = bottleneck()
    other = bottleneck()
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    block.eval()
    compiled(images())
    if how == "trained":
        block.train()
        compiled(images(1))
        block.eval()
    elif how == "loaded":
        block.load_state_dict({name: t + 1 if t.is_floating_point() else t for name, t in other.state_dict().items()})
    else:
        for p in block.parameters():
            p.mul_(1.5)
    stock = copy.deepcopy(block)
    with fusedres.use_backend("stock"):
        torch.testing.assert_close(compiled(images()), stock(images()), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@needs_library
def test_weights_are_folded_once_and_go_with_the_module():
    torch._dynamo.reset()
    gc.collect()
    before = len(_FOLDED)
    block = bottleneck().eval()
    compiled = torch.compile(block, backend="inductor", fullgraph=True)
    compiled(images())
    assert len(_FOLDED) == before + 1
    (entry,) = _FOLDED[block.conv1.weight].values()
    folds = {slot: id(folded[1]) for slot, folded in entry.items()}
    assert len(folds) == 3
    compiled(images(1))
    assert {slot: id(folded[1]) for slot, folded in entry.items()} == folds
    del block, compiled, entry
    torch._dynamo.reset()
    gc.collect()
    assert len(_FOLDED) == before


# What it yields has no gradient, of which PyTorch warns where its check differentiates all the same.
@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@needs_library
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("requiring", ["nothing", "the input", "the parameters", "both"])
def test_opcheck_of_inference(layout, dtype, requiring):
    block = bottleneck().eval()
    binder = Binder(block)
    program = json.dumps(as_constants(block._block.bound(binder)))
    of_parameters, of_input = requiring in ("the parameters", "both"), requiring in ("the input", "both")
    tensors = [
        None if t is None else t.detach().requires_grad_(t.requires_grad and of_parameters) for t in binder.tensors
    ]
    x = INPUTS[layout](SHAPE).requires_grad_(of_input)
    torch.library.opcheck(torch.ops.fusedres.infer_block.default, (program, x, None, tensors, dtype))


@pytest.mark.parametrize("dense", [False, True])
def test_programs_survive_as_constants(dense):
    block = (
        blocks.DenseBottleneckBlock(2, 32, 8, dropout=0.1)
        if dense
        else blocks.SEBottleneckBlock(32, 32, 2, drop_path=0.2)
    )
    for training in (True, False):
        program = block.train(training)._block.bound(Binder(block))
        assert from_constants(as_constants(program)) == program
        assert from_constants(json.loads(json.dumps(as_constants(program)))) == program


# ---------------------------------------------------------------------------------------------------------------------
# Through the compiler to the end
# ---------------------------------------------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_through_inductor(training, dynamic):
    def compile_(module: nn.Module) -> None:
        torch._dynamo.reset()
        module.compile(fullgraph=True, dynamic=dynamic)

    compare(bottleneck().train(training), compile_, lambda seed: [images(seed)]).check()


def compile_quickly(module: nn.Module, **options) -> None:
    torch._dynamo.reset()
    module.compile(backend="aot_eager", fullgraph=True, **options)


@needs_library
def test_under_autocast():
    options = {"autocast": torch.bfloat16}
    for training in (True, False):
        compare(bottleneck().train(training), compile_quickly, lambda seed: [images(seed)], **options).check()


AUTOCAST = {
    "bottlenecks": lambda: nn.Sequential(bottleneck(), bottleneck()),
    "squeeze-excitation": lambda: nn.Sequential(*(blocks.SEBottleneckBlock(32, 32, reduction=4) for _ in range(2))),
    "dense": lambda: blocks.DenseBlock(3, 32, 8),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", AUTOCAST)
def test_inference_under_autocast(name, dtype):
    block = AUTOCAST[name]().to(memory_format=torch.channels_last).eval()
    compare(block, compile_quickly, lambda seed: [images(seed)], autocast=dtype, backward=False).check()


def test_inference_of_a_network_under_autocast():
    def draw(seed: int) -> list[Tensor]:
        return [channels_last((4, 3, 64, 64), seed=seed)]

    def fuse(model: nn.Module) -> None:
        fusedres.patch(model)
        compile_quickly(model)

    compare(small_resnet().eval(), fuse, draw, autocast=torch.bfloat16, backward=False).check()


@torch.no_grad()
def test_nan_under_autocast():
    """What meets NaN runs other convolutions, of whose operands some are wider than the input is already."""
    block = bottleneck().eval()
    x = images(dtype=torch.bfloat16)
    x[0] = float("nan")
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = compiled(x)
    assert out.dtype == torch.bfloat16
    assert out[0].isnan().all() and not out[1:].isnan().any()


@pytest.mark.parametrize("dense", [False, True])
def test_inference_for_any_size(dense):
    block = (AUTOCAST["dense"]() if dense else bottleneck()).to(memory_format=torch.channels_last).eval()
    compare(block, partial(compile_quickly, dynamic=True), lambda seed: [images(seed)], backward=False).check()


def stem() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(32, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1, ceil_mode=True))
    fusedres.patch(model)
    return model.to(memory_format=torch.channels_last)


@needs_library
def test_a_max_pooling_is_in_the_graph():
    ops = recorded(stem(), images()).ops
    assert ops["join_pool_cpu"] == ops["join_pool_backward_cpu"] == 1
    with torch.no_grad():
        assert recorded(stem().eval(), images(), backward=False).ops == {"infer_block": 1}


@needs_library
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_max_pooling(training, dynamic):
    fuse = partial(compile_quickly, dynamic=dynamic)
    compare(stem().train(training), fuse, lambda seed: [images(seed)], backward=training).check()


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [None, True])
def test_settings_changed_between_calls(dynamic):
    block = bottleneck().eval()
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    before = compiled(images())
    for eps in (0.1, 0.2):
        for norm in block.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.eps = eps
        assert not torch.allclose(compiled(images()), before, rtol=1e-3)
        torch.testing.assert_close(compiled(images()), block(images()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [resnet50, densenet121])
def test_whole_networks_in_one_graph(make):
    model = make(num_classes=5).to(memory_format=torch.channels_last)
    recorder = recorded(model, channels_last((2, 3, 64, 64)))
    assert recorder.graphs == 1
    assert sum(recorder.ops.values()) > 50
