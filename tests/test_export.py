"""Patched models written down for other runtimes: by ``torch.export``, both ONNX exporters and ``torch.jit.trace``."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trained import small_resnet

import fusedres
from fusedres.testing import assert_within_budget


def inputs() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def pair(training: bool) -> tuple[nn.Module, nn.Module]:
    stock = small_resnet().train(training)
    patched = copy.deepcopy(stock)
    assert fusedres.patch(patched).coverage == 1.0
    return patched, stock


def check(out: Tensor, stock: nn.Module) -> None:
    """One forward of a model like ``stock`` was within the budget."""
    with torch.no_grad():
        assert_within_budget(out, copy.deepcopy(stock)(inputs()), copy.deepcopy(stock).double()(inputs().double()))


@pytest.mark.parametrize("training", [True, False])
def test_export_runs_and_trains_as_stock(training, tmp_path):
    """Saved, loaded, run: the output, and in training the running statistics; nothing of ours is in the program."""
    patched, stock = pair(training)
    exported = torch.export.export(patched, (inputs(),))
    assert not any("fusedres" in str(node.target) for node in exported.graph.nodes)
    torch.export.save(exported, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    check(loaded(inputs()).detach(), stock)
    exact = copy.deepcopy(stock).double()
    stock(inputs()), exact(inputs().double())
    after, exact_after = dict(stock.named_buffers()), dict(exact.named_buffers())
    for name, buffer in loaded.named_buffers():
        if buffer.is_floating_point():
            assert_within_budget(buffer, after[name], exact_after[name], name)
        else:
            assert torch.equal(buffer, after[name]), name


def test_export_with_any_batch_size():
    patched, stock = pair(training=False)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(patched, (inputs(),), dynamic_shapes=({0: batch},)).module()
    check(program(inputs()).detach(), stock)
    assert program(inputs().repeat(3, 1, 1, 1)).shape[0] == 6


def onnx_of(model: nn.Module, dynamo: bool) -> Any:
    """The ONNX model that an exporter of PyTorch writes."""
    onnx = pytest.importorskip("onnx")
    if dynamo:
        pytest.importorskip("onnxscript")
        return torch.onnx.export(model, (inputs(),), dynamo=True, verbose=False).model_proto
    file = io.BytesIO()
    torch.onnx.export(model, (inputs(),), file, dynamo=False, input_names=["x"])
    return onnx.load_from_string(file.getvalue())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx(dynamo):
    """Either exporter writes for a patched model the operators that it writes for the stock one."""
    runtime = pytest.importorskip("onnxruntime")
    patched, stock = pair(training=False)
    ours, theirs = onnx_of(patched, dynamo), onnx_of(stock, dynamo)
    assert [node.op_type for node in ours.graph.node] == [node.op_type for node in theirs.graph.node]
    assert {node.domain for node in ours.graph.node} <= {"", "ai.onnx"}
    outs = []
    for model in (ours, theirs):
        session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {session.get_inputs()[0].name: inputs().numpy()})
        outs.append(torch.from_numpy(found))
    with torch.no_grad():
        assert_within_budget(*outs, copy.deepcopy(stock).double()(inputs().double()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("training", [True, False])
def test_jit_trace(training):
    """A trace holds stock operators, under ``no_grad`` and with gradients, and is saved and loaded."""
    patched, stock = pair(training)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            traced = torch.jit.trace(copy.deepcopy(patched), (inputs(),), check_trace=False)
        assert {node.kind().split("::")[0] for node in traced.inlined_graph.nodes()} <= {"aten", "prim"}
        assert "PythonOp" not in str(traced.inlined_graph)
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        check(torch.jit.load(file)(inputs()).detach(), stock)


@torch.no_grad()
def test_symbolic_trace_of_an_excitation():
    block = fusedres.nn.SEBottleneckBlock(8, 8, reduction=2).eval()
    x = torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(torch.fx.symbolic_trace(block)(x), block(x))
