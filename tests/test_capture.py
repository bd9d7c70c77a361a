"""What capture does around the recording, with a stand-in for CUDA; tests/cuda/test_capture.py has the rest."""

from __future__ import annotations

import gc
import importlib
import weakref
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from fusedres.capture import Captured, capture


def test_what_is_not_on_a_gpu_is_named():
    with pytest.raises(ValueError, match=r"example\[0\] of shape \(2, 3\) is on cpu"):
        capture(nn.Linear(3, 3), torch.zeros(2, 3))
    with pytest.raises(TypeError, match=r"example\[0\] must be a tensor, got int"):
        capture(nn.Linear(3, 3), (1, torch.zeros(2, 3)))


class _Graph:
    def __init__(self):
        self.replays = 0

    def replay(self):
        self.replays += 1


def test_a_call_replays_with_its_arguments():
    graph, held, out = _Graph(), torch.zeros(2, 3), torch.ones(1)
    captured = Captured(graph, (held,), out)
    assert captured(torch.full((2, 3), 5.0)) is out
    assert graph.replays == 1 and (held == 5).all()
    with pytest.raises(TypeError, match="captured with 1 arguments, called with 2"):
        captured(held, held)
    with pytest.raises(ValueError, match=r"argument 0 of shape \(3, 2\)"):
        captured(torch.zeros(3, 2))
    assert graph.replays == 1


class _Stream:
    def __init__(self, device):
        self.device, self.waited_for = device, []

    def wait_stream(self, other):
        self.waited_for.append(other)


class _Device:
    """What stands in for CUDA: which device and stream are current, and on which ones calls were recorded."""

    def __init__(self, monkeypatch):
        self.index, self.stream, self.recorded, self.ending = 0, _Stream(torch.device("cuda", 0)), [], None
        self.recording = False
        # The package has the function under the module's name.
        monkeypatch.setattr(
            importlib.import_module("fusedres.capture"), "_device_of", lambda *_: torch.device("cuda:1")
        )
        monkeypatch.setattr(torch.cuda, "CUDAGraph", _Graph)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device=None: _Stream(device or torch.device("cuda:0")))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.stream)
        for name in ("device", "stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, f"_{name}"))

    @contextmanager
    def _device(self, device):
        before, self.index = self.index, device.index
        yield
        self.index = before

    @contextmanager
    def _stream(self, stream):
        before, self.stream = self.stream, stream
        yield
        self.stream = before

    @contextmanager
    def _graph(self, graph, stream=None):
        with self._stream(stream or _Stream(torch.device("cuda:0"))):
            self.recorded.append((self.index, self.stream))
            self.recording = True
            try:
                yield
            finally:
                self.recording = False
                if self.ending is not None:
                    raise self.ending


@pytest.fixture
def cuda(monkeypatch):
    return _Device(monkeypatch)


def test_devices_that_differ_are_named():
    with FakeTensorMode():  # tensors of GPUs that are not there
        first, second = (torch.empty(2, 3, device=f"cuda:{i}") for i in range(2))
        model = nn.Module()
        model.weight = nn.Parameter(second)
        with pytest.raises(ValueError, match=r"example\[0\] is on cuda:0 but weight on cuda:1"):
            capture(model, first)
        with pytest.raises(ValueError, match=r"example\[0\] is on cuda:1 but example\[1\] on cuda:0"):
            capture(model, (second, first))
        model.register_buffer("count", torch.empty(()))
        with pytest.raises(ValueError, match="count is on cpu"):
            capture(model, second)
    with pytest.raises(ValueError, match="no input and no parameter"):
        capture(nn.ReLU(), ())


def test_the_call_is_recorded_on_a_stream_of_the_models_device(cuda):
    outer, streams = cuda.stream, []

    class Model(nn.Linear):
        def forward(self, x):
            streams.append((cuda.index, cuda.stream))
            return super().forward(x)

    capture(Model(3, 3), torch.zeros(2, 3))
    assert cuda.recorded == [streams[0]] and set(streams) == {streams[0]}
    index, stream = streams[0]
    assert index == 1 and stream.device == torch.device("cuda:1")
    assert stream.waited_for == [outer] and outer.waited_for == [stream]
    assert cuda.index == 0 and cuda.stream is outer


def test_what_a_replay_reads_is_kept(cuda):
    def captured(trains):
        model, target = nn.Linear(3, 3), torch.ones(2, 3)
        weight = StorageWeakRef(model.weight.untyped_storage())

        def step(x):
            (model(x) - target).square().sum().backward()

        held = capture(model, torch.zeros(2, 3), step=step if trains else None)
        model.weight.data = torch.zeros(3, 3)  # as model.to(...) does
        return held, weight, weakref.ref(model), weakref.ref(step)

    for trains in (False, True):
        held, weight, model, step = captured(trains)
        gc.collect()
        assert not weight.expired() and model() is not None and (step() is not None) == trains
        del held
        gc.collect()
        assert weight.expired() and model() is None and step() is None


def test_gradients_are_the_recorded_steps_or_as_they_were(cuda):
    model, ones = nn.Linear(3, 3), torch.ones(3, 3)
    model.weight.grad, before = ones, model.weight.detach().clone()

    def step(x):
        loss = model(x).sum()
        loss.backward()
        with torch.no_grad():
            model.weight.add_(1)
        return loss

    def fails(x):
        step(x)
        if cuda.recording:
            raise TypeError("not this")

    capture(model, torch.ones(2, 3))
    assert model.weight.grad is ones and model.bias.grad is None
    with pytest.raises(TypeError, match="not this"):
        capture(model, torch.ones(2, 3), step=fails)
    assert model.weight.grad is ones and (ones == 1).all() and model.bias.grad is None
    capture(model, torch.ones(2, 3), step=step)
    assert (model.weight.grad == 2).all()  # of the one call
    assert torch.equal(model.weight, before)


class _Casts(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._to_copy.default
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("entered", ["outside", "outside and inside"])
def test_autocast_casts_in_the_recorded_call_and_keeps_none_of_it(cuda, entered):
    again = torch.autocast("cpu", torch.bfloat16)
    model, casts = nn.Linear(3, 3), []

    def step(x):
        with _Casts() as counted:
            if entered == "outside":
                model(x)
            else:
                with again:
                    model(x)
        casts.append(counted.count)

    with torch.autocast("cpu", torch.bfloat16):
        model(torch.ones(2, 3))  # fills the cache
        capture(model, torch.ones(2, 3), step=step)
        assert torch.is_autocast_cache_enabled()
        step(torch.ones(2, 3))
        step(torch.ones(2, 3))
    assert casts[:-1] == [3] * (len(casts) - 1)  # input, weight and bias, at every call until autocast's own cache
    assert casts[-1] == 1


def test_errors_of_a_recording_say_what_happened(cuda):
    raised = None

    def step(x):
        if cuda.recording:
            raise raised

    def error(of):
        nonlocal raised
        raised = of
        with pytest.raises(type(of)) as caught:
            capture(nn.Linear(3, 3), torch.ones(2, 3), step=step)
        return caught.value

    for cuda.ending in (None, RuntimeError("CUDA error: operation failed due to a previous error during capture")):
        full = torch.OutOfMemoryError("CUDA out of memory")
        assert error(full) is full
        other = RuntimeError("no kernel image is available")
        found = error(other)
        assert found.__cause__ is other and "no kernel image" in str(found) and "waits" not in str(found)
        found = error(RuntimeError("CUDA error: operation not permitted when stream is capturing\nAdvice."))
        assert "waits for the GPU" in str(found) and "not permitted when stream is capturing)" in str(found)


def test_random_numbers_of_the_cpu_are_refused_with_their_origin(cuda):
    with pytest.raises(RuntimeError, match="random numbers on the CPU, as the dropout") as caught:
        capture(nn.Linear(3, 3), torch.ones(2, 3), step=lambda x: torch.rand(()))
    assert "stochastic" not in str(caught.value)  # it draws on the device
