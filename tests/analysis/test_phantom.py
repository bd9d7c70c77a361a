"""A recorded run without memory is that of a real one, op by op."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils import deterministic

import fusedres
from fusedres import models
from fusedres.analysis.peak import resident
from fusedres.analysis.phantom import Recorder, phantom_input, phantom_model
from fusedres.analysis.traffic import record_step
from fusedres.ops.registry import OPS
from fusedres.select import use_backend, why_not

BACKENDS = ["stock", "reference"] + ["cpu"] * (why_not("cpu", "cpu", torch.float32) is None)


def network(**options: bool) -> nn.Module:
    return models.cifar_resnet(8, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_phantom_step_is_recorded_as_the_real_one(backend):
    model = network().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    real = record_step(model, x, use_backend(backend), phantom=False)
    phantom = record_step(phantom_model(model), phantom_input(x.shape), use_backend(backend))
    assert len(real) > 50
    for a, b in zip(real, phantom, strict=True):
        assert a == b


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_phantom_inference_is_recorded_as_the_real_one(backend):
    model = fusedres.models.cifar_resnet(8, fused=True).to(memory_format=torch.channels_last).eval()
    x = torch.randn(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), use_backend(backend):
        model(x)  # folds the norms into the weights
    real = record_step(model, x, use_backend(backend), phantom=False)
    phantom = record_step(model, phantom_input(x.shape), use_backend(backend))
    assert len(real) > 10
    for a, b in zip(real, phantom, strict=True):
        assert a == b


def test_values_are_followed_through_views_and_in_place_ops():
    recorder = Recorder({}, phantom=False)
    with recorder:
        x = torch.ones(4, 4)
        y = x * 2
        y.view(16)[:8].add_(1)
        z = y + x
    first, made, update, total = recorder.calls
    assert made.reads[0].value == first.writes[0].value
    assert update.reads[0].value == made.writes[0].value
    assert update.writes[0].value != made.writes[0].value
    assert {t.value for t in total.reads} == {update.writes[0].value, first.writes[0].value}
    assert update.touched == 2 * 8 * 4
    assert total.touched == 3 * z.nbytes


CONVOLUTIONS = {
    "conv_wgrad": lambda op, x, w, g: op(g, x, None, 0, 0.0, *GEOMETRY, torch.empty_like(w)),
    "conv_fused_wgrad": lambda op, x, w, g: op(g, None, None, x, None, 0, 0.0, *GEOMETRY, torch.empty_like(w)),
    "conv_fused_dgrad": lambda op, x, w, g: op(g, None, None, w, x, None, 0, 0.0, *GEOMETRY),
    "conv_fused_fprop": lambda op, x, w, g: op(x, None, 0, 0.0, w, None, *GEOMETRY, True),
    "conv_fused_join": lambda op, x, w, g: op(x, None, 0, 0.0, w, None, *GEOMETRY, None, None, None, 0, 0.0),
    "conv_epilogue": lambda op, x, w, g: op(x, w, torch.ones(4), torch.zeros(4), None, *GEOMETRY),
    "conv_winograd": lambda op, x, w, g: op(x, packed(w), 4, None, None, 0, 0.0, [0, 0]),
}
GEOMETRY = ([2, 2], [1, 1], [1, 1])


def packed(weight):
    return OPS["conv_winograd_pack"].reference(weight)


def test_no_convolution_of_this_library_is_missing():
    """A new op that convolves needs its arithmetic in the table, or the roofline misses it."""
    assert {name for name in OPS if "conv" in name} == {*CONVOLUTIONS, "conv_winograd_pack"}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_arithmetic_of_a_convolution_of_this_library(name):
    x, w, g = torch.randn(2, 8, 5, 5), torch.randn(4, 8, 3, 3), torch.randn(2, 4, 3, 3)
    recorder = Recorder({}, phantom=False)
    with recorder:
        CONVOLUTIONS[name](OPS[name].overload("reference"), x, w, g)
    assert recorder.calls[-1].flops == 2 * 2 * 3 * 3 * 4 * 8 * 9


def test_broadcasts_are_read_once():
    recorder = Recorder({}, phantom=False)
    with recorder:
        torch.ones(8).expand(64, 8).add(1)
    assert recorder.calls[-1].reads[0].nbytes == 8 * 4


def test_the_model_is_left_alone_and_nothing_takes_memory(monkeypatch):
    monkeypatch.setattr(deterministic, "fill_uninitialized_memory", False)  # it would touch what is not to be touched
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    start = resident()
    record_step(phantom_model(model), phantom_input((512, 3, 256, 256)), use_backend("stock"))
    one_activation = 512 * 16 * 256 * 256 * 4
    assert resident() - start < one_activation / 8
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_model_that_reads_values_is_refused():
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) if x.sum() > 0 else x

    with pytest.raises(ValueError, match="reads a tensor's value"):
        record_step(phantom_model(Reads()), phantom_input((1, 2)), use_backend("stock"))


def test_plain_tensor_attributes_and_shared_parameters_are_copied_too():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    model[0].table = torch.ones(3)
    phantom = phantom_model(model, torch.bfloat16)
    assert phantom[0].weight is phantom[1].weight
    assert phantom[0].weight.dtype == phantom[0].table.dtype == torch.bfloat16
    assert phantom[0].table is not model[0].table


def test_a_patched_model_stays_patched():
    model = network(fused=True)
    assert type(phantom_model(model).layer1[0]) is type(model.layer1[0])
    assert fusedres.unpatch(phantom_model(model)) > 0
