"""Bytes of a training step: against tensors counted in real runs, and against sums by hand."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fusedres
from fusedres import models
from fusedres.analysis import DEVICES, Device, depth_network, traffic
from fusedres.analysis.traffic import OUTSIDE, SCHEDULES, fused_backend
from fusedres.cli import main
from fusedres.models.densenet import DenseStage
from fusedres.select import use_backend

ENDLESS = Device("endless", 1.0, {torch.float32: float("inf"), torch.bfloat16: float("inf")})
"""One byte per second and any arithmetic: its seconds are bytes."""


# ---------------------------------------------------------------------------------------------------------------------
# Counted in a real run
# ---------------------------------------------------------------------------------------------------------------------


FREE = {
    "aten.empty.memory_format",
    "aten.empty_like.default",
    "aten.new_empty.default",
    "aten.new_empty_strided.default",
    "fusedres.all_finite.default",
    "fusedres.fingerprint.default",
}
"""What touches no memory, besides views; our guards of oneDNN's convolutions, a GPU has no need of."""


class Counting(TorchDispatchMode):
    """Adds up what every op of a real run is given, gives back, and is seen to have changed."""

    def __init__(self) -> None:
        super().__init__()
        self.touched = 0
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if func.is_view or name in FREE:
            return func(*args, **(kwargs or {}))
        given = [t for t in tensors((args, kwargs)) if t.layout is torch.strided]
        before = [t.clone() for t in given]
        out = func(*args, **(kwargs or {}))
        returned = tensors(out)
        changed = [t for t, old in zip(given, before) if not torch.equal(t, old) and not any(t is r for r in returned)]
        self.ops[name] += bool(given or returned)
        only_written = {i for i, argument in enumerate(func._schema.arguments) if argument.name == "into"}
        skipped = unread(name, args) | only_written
        self.touched += size(t for i, t in enumerate(args) if i not in skipped) + size(returned + changed)
        return out


def unread(name: str, args: tuple) -> set[int]:
    """The arguments that are given for their shape, or to be overwritten."""
    if name == "aten.convolution_backward.default":  # dgrad reads no input, wgrad no weight
        needs_input, needs_weight, _ = args[10]
        return {i for i, needed in ((1, needs_weight), (2, needs_input)) if not needed}
    if name == "fusedres.conv_fused_dgrad.default":  # its input, unless that is pending; and what it writes into
        return {12} | ({4} if args[5] is None and args[6] == 0 else set())
    others = {"aten.copy_": 0, "fusedres.conv_wgrad": 8, "fusedres.conv_fused_wgrad": 10}
    others |= {"aten.max_pool2d_with_indices_backward": 1, "fusedres.join_pool_backward": 2}
    return {others.get(name.removesuffix(".default"))}


def tensors(tree) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def size(tree) -> int:
    """Bytes of the distinct tensors in ``tree``; those of a broadcast are the bytes of what is broadcast."""
    leaves = [t for t in tensors(list(tree)) if t.numel()]
    packed = sum(t.numel() * t.element_size() for t in leaves if t.layout is not torch.strided)
    found = {t.untyped_storage().data_ptr(): t for t in leaves if t.layout is torch.strided}
    return packed + sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in found.values())


def backend_of(schedule: str):
    return use_backend("stock") if schedule == "stock" else fused_backend(ENDLESS, torch.float32)


def counted(model: nn.Module, shape: tuple[int, ...], schedule: str, training: bool = True) -> Counting:
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    model = model.to(memory_format=torch.channels_last).train(training)
    count = Counting()
    if not training:
        with torch.no_grad(), backend_of(schedule), count:
            model(x)
        return count
    with backend_of(schedule), count:
        out = model(x)
    gradient = torch.randn_like(out)
    with backend_of(schedule), count:
        out.backward(gradient)
    return count


BLOCKS = {
    "basic": lambda: fusedres.nn.ResidualBlock(8),
    "basic, projection": lambda: fusedres.nn.ResidualBlock(8, 16, stride=2),
    "bottleneck": lambda: fusedres.nn.BottleneckBlock(16, 16),
    "bottleneck, projection": lambda: fusedres.nn.BottleneckBlock(8, 16, stride=2, bias=False),
    "padded shortcut": lambda: models.cifar.CifarBlock(8, 16, 2),
    "plain": lambda: depth_network("plain", 8, fused=False).layer2[0],
    "pre-activation": lambda: depth_network("pre-activation", 8, fused=False).layer2[0],
    "grouped": lambda: models.resnext50_32x4d(fused=False).layer4[1],
    "dense": lambda: DenseStage(3, 8, 4, 2, 0.0),
    "stem": lambda: nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
}
CHANNELS = {"bottleneck": 16, "plain": 16, "pre-activation": 16, "grouped": 2048}
MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])


@MODES
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("schedule", ["stock", "fused"])
def test_a_block_touches_what_is_counted(name, schedule, training):
    block, shape = BLOCKS[name](), (2, CHANNELS.get(name, 8), 6, 6)
    found = traffic(block, shape, torch.float32, ENDLESS, training=training).total(schedule).touched
    if schedule == "fused":
        fusedres.patch(block)
    assert found == counted(block, shape, schedule, training).touched


def test_the_layers_of_a_dense_block_are_one_block():
    found = traffic(nn.Sequential(DenseStage(3, 8, 4, 2, 0.0)), (2, 8, 6, 6), torch.float32, ENDLESS)
    assert list(found.blocks) == ["0", OUTSIDE]
    assert found.total("fused").kernels > 0 and found.blocks[OUTSIDE]["fused"].kernels == 0


@MODES
@pytest.mark.parametrize("schedule", ["stock", "fused"])
def test_resnet50_touches_what_is_counted(schedule, training):
    model, shape = models.resnet50(fused=False, num_classes=10), (2, 3, 64, 64)
    found = traffic(model, shape, torch.float32, ENDLESS, training=training)
    if schedule == "fused":
        fusedres.patch(model)
    real = counted(model, shape, schedule, training)
    assert found.total(schedule).touched == real.touched
    assert found.total(schedule).kernels == sum(real.ops.values())


# ---------------------------------------------------------------------------------------------------------------------
# Summed by hand, in units of a bottleneck's narrow tensor
# ---------------------------------------------------------------------------------------------------------------------

STOCK_PASSES = {
    # reads and writes: convolution; batch norm reads twice; ReLU and the addition in place
    "forward": (4 + 1) + (1 + 1) + (1 + 4) + (3 + 3 + 12) + (2 + 2 + 8) + 12,
    # ReLU; batch norm reads gradient and input twice; dgrad and wgrad both read the gradient; the two paths' sum
    "backward": (12 + 3 + 3) + (20 + 5 + 5) + (10 + 4 + 10) + 12,
}
FUSED_PASSES = {
    # 1x1 with statistics, join, 3x3, statistics, 1x1 that applies its input, last join
    "forward": (4 + 1) + 2 + 2 + 1 + (1 + 4) + 12,
    # last join; 1x1 with both gradients of what is pending; the 3x3's gradient applied, its dgrad, the mask that emits
    # its input, its wgrad; 1x1, onto the shortcut's gradient
    "backward": 16 + (9 + 10) + 3 + 2 + 4 + 2 + (6 + 10),
}


@pytest.mark.parametrize(("schedule", "passes"), [("stock", STOCK_PASSES), ("fused", FUSED_PASSES)])
def test_an_identity_bottleneck_by_hand(schedule, passes):
    n, size = 4, 56
    unit = n * 64 * size * size * 2
    # The norm in front makes the block's input one that needs a gradient.
    model = nn.Sequential(nn.BatchNorm2d(256), models.resnet50(fused=False).layer1[1])
    found = traffic(model, (n, 256, size, size), torch.bfloat16, ENDLESS).blocks["1"][schedule]
    weights_and_rows = found.nbytes / unit - sum(passes.values())
    assert 0 < weights_and_rows < 0.5


def test_inference_of_an_identity_bottleneck_by_hand():
    """Stock normalises in a pass and activates in another; a compiler does both in one; ours has them in the
    convolution."""
    n, size = 4, 56
    unit = n * 64 * size * size * 2
    block = models.resnet50(fused=False).layer1[1]
    found = traffic(block, (n, 256, size, size), torch.bfloat16, ENDLESS, training=False).blocks[""]
    passes = {
        "stock": (4 + 1) + (1 + 1) + (1 + 4) + (2 + 2 + 8) + (2 + 2 + 8) + 12,
        "inductor": (4 + 1) + (1 + 1) + (1 + 4) + (2 + 2 + 12),
        "fused": (4 + 1) + (1 + 1) + (1 + 4 + 4),
    }
    for schedule, count in passes.items():
        assert 0 < found[schedule].nbytes / unit - count < 0.5
    assert found["stock"].flops == found["fused"].flops == 2 * n * size * size * (2 * 256 * 64 + 9 * 64 * 64)


def test_a_compiler_s_schedule_by_hand():
    """conv, batch norm, ReLU, conv: the normalised value is written once, for the second convolution."""
    pair = nn.Sequential(
        nn.Conv2d(64, 64, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 1, bias=False)
    )
    n, size = 4, 32
    unit = n * 64 * size * size * 4
    found = traffic(pair, (n, 64, size, size), torch.float32, ENDLESS).blocks[""]["inductor"]
    forward = 2 + 1 + (1 + 1) + 2  # convolution, statistics, normalise and ReLU, convolution
    backward = (2 + 1 + 1) + 3 + (3 + 1) + 2  # dgrad and wgrad, sums, gradient, wgrad alone
    assert 0 < found.nbytes / unit - (forward + backward) < 0.5


# ---------------------------------------------------------------------------------------------------------------------
# What it tells
# ---------------------------------------------------------------------------------------------------------------------


def test_schedules_are_in_order_and_total_is_their_sum():
    found = traffic(models.resnet18(fused=False), (8, 3, 64, 64), device="H100")
    nbytes = {schedule: found.total(schedule).nbytes for schedule in SCHEDULES}
    assert nbytes["fused"] < nbytes["stock"]
    assert nbytes["inductor"] < nbytes["stock"]
    assert sum(costs["stock"].nbytes for costs in found.blocks.values()) == nbytes["stock"]
    assert list(found.blocks)[-1] == OUTSIDE
    assert len(found.blocks) == 9
    assert "H100 SXM" in str(found)
    json.dumps(found.to_dict())


def test_patched_or_not_and_blocks_of_this_library_are_counted_alike():
    stock, patched = models.resnet18(fused=False), models.resnet18(fused=True)
    shape = (4, 3, 64, 64)
    assert traffic(stock, shape, device=ENDLESS).blocks == traffic(patched, shape, device=ENDLESS).blocks
    assert fusedres.explain(patched).fused[0].already  # and it is still patched
    block = fusedres.nn.ResidualBlock(8)
    found = traffic(block, (4, 8, 64, 64), device=ENDLESS)
    assert found.total("fused").nbytes < found.total("stock").nbytes


def test_flops_are_the_networks():
    """Three times the forward's, less the stem's dgrad."""
    found = traffic(models.resnet50(fused=False), (2, 3, 224, 224), device="H100")
    stem = 2 * 64 * 112 * 112 * 49 * 3
    for schedule in SCHEDULES:
        assert found.total(schedule).flops == 2 * (3 * 2 * 4_089_184_256 - stem)


def test_low_memory_recomputes():
    model, shape = models.resnet50(fused=False), (2, 3, 64, 64)
    auto, low = (traffic(model, shape, device=ENDLESS, memory=memory).total("fused") for memory in ("auto", "low"))
    assert low.flops > auto.flops
    assert low.nbytes > auto.nbytes


def test_the_roofline():
    block, shape = fusedres.nn.ResidualBlock(8), (4, 8, 16, 16)
    by_bytes = traffic(block, shape, torch.float32, ENDLESS).total("stock")
    assert by_bytes.seconds == by_bytes.nbytes
    slow = Device("slow", float("inf"), {torch.float32: 1.0})
    by_flops = traffic(block, shape, torch.float32, slow).total("stock")
    assert by_flops.seconds == by_flops.flops > 0
    assert Device("both", 10.0, {torch.float32: 2.0}).seconds(100, 10, torch.float32) == 10


def test_bad_arguments():
    model = nn.Conv2d(3, 4, 1)
    with pytest.raises(ValueError, match="'H100', 'H200', 'A100', 'RTX4090', got 'TPU'"):
        traffic(model, (1, 3, 4, 4), device="TPU")
    with pytest.raises(ValueError, match=r"torch\.float64"):
        traffic(model, (1, 3, 4, 4), torch.float64, "H100")
    with pytest.raises(ValueError, match="requires a gradient"):
        traffic(nn.ReLU(), (1, 3, 4, 4))


def test_the_command(tmp_path, capsys):
    figure, results = tmp_path / "figure.png", tmp_path / "results.json"
    options = ["--shape", "2,3,32,32", "--device", "H100", "A100", "--out", str(figure), "--json", str(results)]
    assert main(["traffic", "cifar_resnet", *options]) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    content = json.loads(results.read_text())
    assert [found["device"] for found in content["found"]] == [DEVICES[name].name for name in ("H100", "A100")]
    assert "layer3.2" in capsys.readouterr().out
    assert main(["traffic", "cifar_resnet", *options, "--inference"]) == 0
    content = json.loads(results.read_text())
    assert [found["training"] for found in content["found"]] == [False, False]
    assert main(["traffic", "nothing"]) == 2
