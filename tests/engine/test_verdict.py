"""Which backend a block runs on where measurements decide: here the CPU, by tables written by hand and a fake timer."""

from __future__ import annotations

import json

import pytest
import torch
from described import BLOCKS, DenseBlock, fuse
from torch import nn
from torch._subclasses import FakeTensorMode

import fusedres
from fusedres import env, select
from fusedres.engine import verdict
from fusedres.engine.verdict import posed
from fusedres.ops.registry import OPS
from fusedres.testing import channels_last, contiguous
from fusedres.triton import tuning
from fusedres.triton.tuning import Verdict
from fusedres.tune import blocks, measure_block, tune

WON, LOST = Verdict("reference", 1.0, 2.0), Verdict("stock", 2.0, 1.0)


@pytest.fixture(autouse=True)
def measured(monkeypatch, tmp_path):
    """The CPU is a device whose measurements decide, the reference a backend that they may choose; nothing is tuned."""
    monkeypatch.setenv("FUSEDRES_CACHE", str(tmp_path))
    monkeypatch.setattr(select, "_AUTOMATIC", {})
    monkeypatch.setattr(select, "MEASURED", ("reference",))
    caches = (select._resolve, select._kernels, tuning._table, tuning._looked_up, verdict._winner)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def node(block: nn.Module, x: torch.Tensor) -> str:
    """What runs a training call: the engine's node, or one of stock PyTorch's."""
    return type(block(x.requires_grad_()).grad_fn).__name__


def is_fused(block: nn.Module, shape=(4, 24, 8, 8), make=channels_last) -> bool:
    return "FunctionBackward" in node(block, make(shape))


def key_of(block: nn.Module, x: torch.Tensor) -> str:
    with posed() as seen:
        block(x)
    (key,) = seen
    return key


def decide(found: Verdict, *keys: str) -> None:
    tuning.record_verdicts("cpu", dict.fromkeys(keys, found))
    verdict.forget()


def fused(name: str = "basic") -> nn.Module:
    block = BLOCKS[name]().train()
    fuse(block)
    return block


def test_stock_until_measured_and_then_what_won():
    block, x = fused(), channels_last((4, 24, 8, 8)).requires_grad_()
    assert not is_fused(block)
    key = key_of(block, x)
    decide(LOST, key)
    assert not is_fused(block)
    decide(WON, key)
    assert is_fused(block)


def test_a_forced_backend_is_asked_for_no_verdict():
    block = fused()
    with posed() as seen, fusedres.use_backend("reference"):
        assert is_fused(block)
    assert not seen


def test_inference_and_training_are_two_verdicts():
    block, x = fused(), channels_last((4, 24, 8, 8))
    with posed() as seen:
        block(x)
        with torch.no_grad():
            block.eval()(x)
    assert [key.split("_")[0] for key in seen] == ["training", "inference"]
    decide(WON, *(key for key in seen if key.startswith("inference")))
    assert not is_fused(block.train())


@pytest.mark.parametrize(
    ("shape", "make", "expected"),
    [
        ((8, 24, 8, 8), channels_last, True),
        ((2, 24, 8, 8), channels_last, True),
        ((1, 24, 16, 16), channels_last, True),
        ((16, 24, 8, 8), channels_last, False),
        ((4, 24, 8, 8), contiguous, False),
    ],
)
def test_a_near_size_stands_for_another(shape, make, expected):
    block = fused()
    decide(WON, key_of(block, channels_last((4, 24, 8, 8))))
    assert is_fused(block, shape, make) is expected


def test_the_nearest_of_several_sizes():
    block = fused()
    decide(WON, key_of(block, channels_last((4, 24, 8, 8))))
    decide(LOST, key_of(block, channels_last((8, 24, 8, 8))))
    assert is_fused(block, (5, 24, 8, 8)) and not is_fused(block, (7, 24, 8, 8))


@pytest.mark.parametrize("name", BLOCKS)
def test_no_verdict_is_for_another_block(name):
    keys = {key_of(fused(other), channels_last((4, 32 if other == "bottleneck" else 24, 8, 8))) for other in BLOCKS}
    assert len(keys) == len(BLOCKS)
    size = 32 if name == "bottleneck" else 24
    own = key_of(fused(name), channels_last((4, size, 8, 8)))
    decide(WON, *(keys - {own}))
    assert not is_fused(fused(name), (4, size, 8, 8))


def test_dense_blocks_and_those_too_small_on_a_cpu(monkeypatch):
    for mode in select.FEWEST_ELEMENTS:
        monkeypatch.setitem(select.FEWEST_ELEMENTS, mode, 2**40)
    block = DenseBlock().train()
    fuse(block)
    assert not is_fused(block, (3, 10, 8, 8))
    decide(WON, key_of(block, channels_last((3, 10, 8, 8))))
    assert is_fused(block, (3, 10, 8, 8))
    other = fused()
    decide(WON, key_of(other, channels_last((4, 24, 8, 8))))
    assert is_fused(other)


def test_a_verdict_for_a_backend_that_is_gone_is_ignored():
    block = fused()
    decide(WON._replace(backend="cuda"), key_of(block, channels_last((4, 24, 8, 8))))
    assert not is_fused(block)


def test_verdicts_of_other_sources_are_ignored_and_tiles_kept():
    block = fused()
    key = key_of(block, channels_last((4, 24, 8, 8)))
    decide(WON, key)
    path = tuning.cache_path("cpu")
    text = json.loads(path.read_text())
    path.write_text(json.dumps(text | {"verdict source": "other"}))
    tuning._table.cache_clear(), verdict.forget()
    assert not is_fused(block)
    assert text["source"] == tuning.source_hash()


def test_a_shipped_table_decides_out_of_the_box(monkeypatch, tmp_path):
    block = fused()
    decide(WON, key_of(block, channels_last((4, 24, 8, 8))))
    shipped = tmp_path / "tables"
    shipped.mkdir()
    tuning.cache_path("cpu").rename(shipped / "cpu.json")
    monkeypatch.setattr(tuning, "_TABLES", shipped)
    tuning._table.cache_clear(), verdict.forget()
    assert is_fused(block)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """Two equal blocks, and one with a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            fusedres.models.resnet18().layer1, nn.Conv2d(64, 16, 1), fusedres.nn.WideResidualBlock(16, 16, dropout=0.5)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x)


def timer_of(stock: float, ours: float, log: list[float]):
    """A timer that calls what it times; the engine's calls take ``ours``."""
    from fusedres.engine import training

    def timer(call):
        before = len(log)
        with pytest.MonkeyPatch.context() as patch:
            run = training.forward_block
            patch.setattr(training, "forward_block", lambda *args: (log.append(ours), run(*args))[1])
            call()
        return ours if len(log) > before else stock

    return timer


@pytest.mark.parametrize("faster", [True, False])
def test_tuning_decides_and_is_reported(faster):
    model = Model()
    fusedres.patch(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = channels_last((2, 64, 8, 8))
    assert "until fusedres.tune" in str(fusedres.explain(model))
    log: list[float] = []
    report = tune(model, x, timer=timer_of(2.0, 1.0 if faster else 1.97, log))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    training = {key: v for key, v in report.verdicts.items() if key.startswith("training")}
    assert len(training) == 2 and len(report.verdicts) == 4 and log
    winner = "reference" if faster else "stock"
    assert {v.backend for v in training.values()} == {winner} and not any(v.wrong for v in training.values())
    assert report.path == str(tuning.cache_path("cpu")) and f"{winner}, " in str(report)
    assert (type(model.blocks[0].train()(x).grad_fn).__name__ == "BlockFunctionBackward") is faster
    assert {site.backend for site in fusedres.explain(model).fused} == {"reference or stock" if faster else "stock"}
    assert f"{2 if faster else 0} of 4 measured blocks" in env._measurements()


def test_without_backward_only_inference_is_measured():
    assert all(key.startswith("inference") for key in blocks(Model(), channels_last((2, 64, 8, 8)), False))


@pytest.mark.parametrize("op", ["join", "join_backward_apply"])
def test_wrong_numbers_lose_whatever_their_time(monkeypatch, op):
    """A backend that forgets a part in a hundred, forward or backward."""
    posed_blocks = blocks(Model(), channels_last((2, 64, 8, 8)))
    case = next(c for key, c in posed_blocks.items() if key.startswith("training"))
    found = select.kernels("cpu", torch.float32, "reference")
    right = OPS[op].overload("reference")

    def wrong(*args):
        out = right(*args)
        return out * 1.01 if isinstance(out, torch.Tensor) else (out[0] * 1.01, *out[1:])

    assert measure_block(case, ["reference"], lambda call: 1.0).wrong == ()
    monkeypatch.setattr(found, op, wrong)
    judged = measure_block(case, ["reference"], lambda call: 1.0)
    assert judged.wrong == ("reference",) and judged.backend == "stock"


def test_under_autocast_another_verdict():
    block, x = fused(), channels_last((4, 24, 8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        assert "fp32-bf16" in key_of(block, x)
    assert "fp32-fp32" in key_of(block, x)


@pytest.mark.parametrize("allowed", [False, True])
def test_tensorfloat_32_has_verdicts_of_its_own(allowed):
    """On a GPU alone, where it is much faster: other numbers, other times."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=allowed), FakeTensorMode():
        for device, name in (("cpu", "fp32"), ("cuda:0", "tf32" if allowed else "fp32")):
            x = torch.empty(4, 24, 8, 8, device=device)
            assert verdict._case(x, True)[1] == f"training_fp32-{name}_nchw"
        assert verdict._case(x.double(), True)[1] == "training_fp64-fp64_nchw"
